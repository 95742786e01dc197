"""The MoE layer as nested loops, for one process and any float type. Imports nothing from moe_train."""

from dataclasses import dataclass, field

import torch


@dataclass
class NaiveWeights:
    """router [E, H]; gate, up [E, I, H]; down [E, H, I].

    shared: nothing, or (gate [I, H], up [I, H], down [H, I], sigmoid gate [1, H]).
    """

    router: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    shared: tuple[torch.Tensor, ...] = field(default_factory=tuple)

    def leaves(self) -> list[torch.Tensor]:
        return [self.router, self.gate, self.up, self.down, *self.shared]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def choose(scores: torch.Tensor, top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-float(scores[e]), e))[:top_k]


def naive_layer(
    x: torch.Tensor,
    weights: NaiveWeights,
    top_k: int,
    normalize: bool = True,
    chosen: list[list[int]] | None = None,
) -> torch.Tensor:
    """Softmax router, SwiGLU experts; x [T, H] -> [T, H]. `chosen`: experts of each token, in place of the best."""
    given, rows = chosen, []
    for number, token in enumerate(x):
        logits = weights.router @ token
        probabilities = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
        chosen = given[number] if given is not None else choose(probabilities.detach(), top_k)
        total = sum(probabilities[e] for e in chosen) if normalize else 1.0
        row = torch.zeros_like(token)
        for e in chosen:
            row = row + probabilities[e] / total * swiglu(token, weights.gate[e], weights.up[e], weights.down[e])
        if weights.shared:
            gate, up, down, sigmoid_gate = weights.shared
            row = row + swiglu(token, gate, up, down) / (1 + torch.exp(-(sigmoid_gate @ token)))
        rows.append(row)
    return torch.stack(rows) if rows else x * 0


def naive_aux_loss(x: torch.Tensor, router: torch.Tensor, top_k: int, sequences: int) -> torch.Tensor:
    """Sum over sequences of sum_e f_e P_e with softmax scores."""
    total = torch.zeros((), dtype=x.dtype)
    for block in x.chunk(sequences):
        scores = torch.stack([torch.softmax(router @ token, 0) for token in block])
        experts = router.shape[0]
        for e in range(experts):
            times = sum(e in choose(row.detach(), top_k) for row in scores)
            total = total + experts / (top_k * len(block)) * times * scores[:, e].mean()
    return total
