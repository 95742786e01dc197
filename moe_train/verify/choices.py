"""Choices over whole sequences, written out token by token for the oracle. Imports nothing of the layer.

Each returns how far its nearest decision was from being another one. S tokens of one sequence, E experts, K experts
per token.
"""

import math
from collections.abc import Sequence

import torch

INFINITE = float("inf")


def room(tokens: int, factor: float, top_k: int, num_experts: int) -> int:
    """Rows that an expert takes of a sequence; a billionth of one more is none."""
    return math.ceil(factor * tokens * top_k / num_experts - 1e-9)


def dropped_weights(
    weights_SK: torch.Tensor, ids_SK: torch.Tensor, num_experts: int, factor: float, drop: str
) -> tuple[torch.Tensor, float]:
    """Weights of one sequence with zeros where an expert has no room, and the margin."""
    tokens, top_k = ids_SK.shape
    kept = torch.zeros_like(weights_SK)
    margin = INFINITE
    places = room(tokens, factor, top_k, num_experts)
    for expert in range(num_experts):
        wanting = [(t, k) for t in range(tokens) for k in range(top_k) if int(ids_SK[t, k]) == expert]
        if drop == "probability":
            wanting.sort(key=lambda place: -float(weights_SK[place]))
            if len(wanting) > places:
                margin = min(margin, float(weights_SK[wanting[places - 1]] - weights_SK[wanting[places]]))
        for place in wanting[:places]:
            kept[place] = 1
    return weights_SK * kept, margin


def experts_choose(scores_SE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, float]:
    """Which experts took which tokens, 0 or 1 [S, E], and the margin."""
    tokens, num_experts = scores_SE.shape
    taken, margin = torch.zeros_like(scores_SE), INFINITE
    places = room(tokens, 1.0, top_k, num_experts)
    for expert in range(num_experts):
        line = sorted(range(tokens), key=lambda t: -float(scores_SE[t, expert]))
        taken[line[:places], expert] = 1
        if places < tokens:
            margin = min(margin, float(scores_SE[line[places - 1], expert] - scores_SE[line[places], expert]))
    return taken, margin


def sinkhorn_choice(logits_SE: torch.Tensor, top_k: int, rounds: int) -> tuple[torch.Tensor, float]:
    """Ids [S, K], best first, and the margin between logarithms."""
    num_experts = logits_SE.shape[1]
    matrix = logits_SE.exp()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    ordered, ids = matrix.log().sort(dim=1, descending=True)
    gap = float((ordered[:, top_k - 1] - ordered[:, top_k]).min()) if top_k < num_experts else INFINITE
    return ids[:, :top_k], gap


def forced_ids(
    tokens: int, number: int, top_k: int, num_experts: int, shares: tuple[float, ...] | None
) -> torch.Tensor:
    """Ids [S, K] of sequence `number` of a run: in turn, or K points one apart over experts laid end to end."""
    rows = []
    for place in range(tokens):
        if shares is None:
            rows.append([(place * top_k + k + number) % num_experts for k in range(top_k)])
            continue
        point = (place * 0.6180339887498949 + number * 0.7548776662466927) % 1.0
        row = []
        for k in range(top_k):
            expert, end = 0, shares[0] * top_k
            while expert < num_experts - 1 and end <= point + k:
                expert += 1
                end = sum(shares[: expert + 1]) * top_k
            row.append(expert)
        rows.append(row)
    return torch.tensor(rows)


def jitter_factors(tokens: int, hidden: int, number: int, key: int, width: float) -> torch.Tensor:
    """[S, H] in [1 - width, 1 + width), from MurmurHash3's finaliser in Python's whole numbers."""

    def mixed(word: int) -> int:
        word &= 0xFFFFFFFF
        word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return word ^ word >> 16

    start = mixed(number ^ key % 2**32)
    words = [[mixed(mixed(start ^ place) ^ mixed(h)) for h in range(hidden)] for place in range(tokens)]
    return 1 - width + 2 * width * torch.tensor(words, dtype=torch.float64) / 2**32


def balancing_bias(scores_SE: torch.Tensor, bias_E: torch.Tensor, top_k: int) -> list[float]:
    """The bias that lets each expert have tokens * K / E tokens of one sequence, if the others' stay."""
    tokens, num_experts = scores_SE.shape
    cutoffs = [sorted((row + bias_E).tolist(), reverse=True)[top_k] for row in scores_SE]
    found = []
    for expert in range(num_experts):
        excess = [float(scores_SE[t, expert]) - cutoffs[t] for t in range(tokens)]
        found.append(-sorted(excess, reverse=True)[tokens * top_k // num_experts])
    return found


def by_sequence(tensors: Sequence[torch.Tensor], sequences: int):
    """The parts of each sequence, one tuple per sequence."""
    return zip(*(tensor.chunk(sequences) for tensor in tensors), strict=True)
