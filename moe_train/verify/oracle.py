"""One process that cannot be wrong in the same way: the stock model, the formulas written out, torch's own optimizer.

Imports nothing of the layer, its collectives, the sharded optimizer or the trainer; what it needs to know arrives as
plain values in a `Question`. B sequences of S tokens, T = B * S, E experts, K experts per token, L MoE layers.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from moe_train.verify.choices import (
    balancing_bias,
    by_sequence,
    dropped_weights,
    experts_choose,
    forced_ids,
    jitter_factors,
    sinkhorn_choice,
)
from moe_train.verify.float64 import Float64
from moe_train.verify.record import StepRecord, Truth


@dataclass(frozen=True, kw_only=True)
class Question:
    """Everything the oracle is told.

    state: initial weights by Hugging Face name. experts: names of the stacked expert parameters. routers: module names,
    in model order; each returns (logits [T, E], weights [T, K], ids [T, K]). bias: the routers' buffer with the
    correction bias. score: softmax or sigmoid. tables: by router, the experts of each token id [V, K] where it hashes,
    else None; normalize, norm_eps, scale: of the weights there. aux_loss: what the auxiliary loss balances: sequence,
    micro_batch (of `micro_size` sequences) or global_batch. router: top_k, expert_choice, sinkhorn (of
    `sinkhorn_rounds`), or forced: by shares of each expert, or in turn. jitter: half the width of the factors on the
    blocks' inputs; jitter_key: of the first layer. capacity_factor: None: nothing is dropped; drop: by probability or
    position. bias_update: sign, zero_mean_sign, proportional or quantile. rates: learning rate of each step. tokens:
    [steps, B, S + 1].
    """

    config: PretrainedConfig = field(repr=False)
    state: dict[str, torch.Tensor] = field(repr=False)
    experts: frozenset[str]
    routers: tuple[str, ...]
    bias: str | None
    score: str
    normalize: bool
    norm_eps: float
    scale: float
    tables: tuple[np.ndarray | None, ...] = field(repr=False)
    top_k: int
    num_groups: int
    topk_groups: int
    router: str
    sinkhorn_rounds: int
    forced: tuple[float, ...] | None
    jitter: float
    jitter_key: int
    capacity_factor: float | None
    drop: str
    aux_coef: float
    aux_loss: str
    micro_size: int
    z_coef: float
    bias_rate: float
    bias_update: str
    rates: tuple[float, ...]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    no_decay: tuple[str, ...]
    grad_clip: float
    tokens: np.ndarray = field(repr=False)


@dataclass
class Seen:
    """What one layer's router did in the forward that has just run; `bias_E` as it was then.

    weights_TK: 0 where an expert had no room.
    """

    logits_TE: torch.Tensor
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    bias_E: torch.Tensor | None


def answer(question: Question) -> Truth:
    """Run every step of the question in float64."""
    torch.manual_seed(0)  # what is drawn here is overwritten by `state`
    config = copy.deepcopy(question.config)
    if question.jitter:
        config.router_jitter_noise = 0.0  # drawn from a generator there
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.load_state_dict(question.state, strict=True)
    model.double().train()
    margins = _choose_otherwise(question, model)
    named = dict(model.named_parameters())
    initial = _arrays(named)
    optimizer = _optimizer(question, named)
    steps, chosen, gradient, margin, logits = [], [], {}, float("inf"), []
    with Float64():
        for rate, tokens in zip(question.rates, question.tokens, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            margins.clear()
            record, margin_now, raw, said, ids = _step(question, model, optimizer, torch.from_numpy(tokens))
            steps.append(record)
            chosen.append(ids)
            logits.append(said)
            gradient = gradient or raw
            margin = min(margin, margin_now, *margins)
    return Truth(
        steps=steps,
        initial=initial,
        gradient=gradient,
        updated=_arrays(named),
        logits=np.stack(logits),
        chosen=np.stack(chosen),
        is_expert=question.experts,
        margin=margin,
        bias_of_scores=question.bias_update == "quantile",
    )


def _arrays(named: dict[str, torch.nn.Parameter]) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in named.items()}


def _optimizer(question: Question, named: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    """Weight decay on matrices alone, unless a part of their name is in `no_decay`."""
    kept = [p for n, p in named.items() if p.dim() < 2 or any(part in n for part in question.no_decay)]
    decayed = [p for p in named.values() if all(p is not other for other in kept)]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": question.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ],
        betas=question.betas,
        eps=question.eps,
        foreach=False,
    )


def _choose_otherwise(question: Question, model) -> list[float]:
    """Change what the stock routers return where the recipe does: tables, dropped assignments.

    Returns a list, to which each forward adds the margins of such decisions.
    """
    ids_of_forward: list[torch.Tensor] = []
    margins: list[float] = []
    sequences_read = [0, 0]  # before this forward and after it

    def note(module, args, kwargs):
        ids_of_forward[:] = [kwargs["input_ids"]]
        sequences_read[:] = [sequences_read[1], sequences_read[1] + len(kwargs["input_ids"])]

    def jitter(key):
        def hook(module, args):
            (x_BSH,) = args
            _, length, hidden = x_BSH.shape
            numbers = range(sequences_read[0], sequences_read[1])
            factors = [jitter_factors(length, hidden, number, key, question.jitter) for number in numbers]
            return (x_BSH * torch.stack(factors),)

        return hook

    def chooser(table):
        def hook(module, inputs, output):
            logits_TE, weights_TK, ids_TK = output
            sequences = len(ids_of_forward[0])
            if table is not None:
                ids_TK = torch.from_numpy(table)[ids_of_forward[0].flatten()]
                weights_TK = _weights(question, logits_TE, ids_TK)
            elif question.router == "forced":
                length, size = len(logits_TE) // sequences, logits_TE.shape[1]
                parts = [
                    forced_ids(length, number, question.top_k, size, question.forced)
                    for number in range(sequences_read[0], sequences_read[1])
                ]
                ids_TK = torch.cat(parts)
                weights_TK = _weights(question, logits_TE, ids_TK)
            elif question.router == "sinkhorn":
                parts = [
                    sinkhorn_choice(logits, question.top_k, question.sinkhorn_rounds)
                    for logits in logits_TE.detach().chunk(sequences)
                ]
                ids_TK = torch.cat([ids for ids, _ in parts])
                weights_TK = _weights(question, logits_TE, ids_TK)
                margins.extend(margin for _, margin in parts)
            elif question.router == "expert_choice":
                scores_TE = _scores(question, logits_TE)
                parts = [experts_choose(scores, question.top_k) for scores in scores_TE.detach().chunk(sequences)]
                taken_TE = torch.cat([taken for taken, _ in parts])
                ids_TK = torch.arange(logits_TE.shape[1]).expand_as(logits_TE)
                weights_TK = _taken_weights(question, scores_TE, taken_TE)
                margins.extend(margin for _, margin in parts)
            if question.capacity_factor is not None:
                parts = [
                    dropped_weights(weights, ids, logits_TE.shape[1], question.capacity_factor, question.drop)
                    for weights, ids in by_sequence((weights_TK, ids_TK), sequences)
                ]
                weights_TK = torch.cat([weights for weights, _ in parts])
                margins.extend(margin for _, margin in parts)
            return logits_TE, weights_TK, ids_TK

        return hook

    model.register_forward_pre_hook(note, with_kwargs=True)
    for layer, (name, table) in enumerate(zip(question.routers, question.tables, strict=True)):
        if question.jitter:
            block = model.get_submodule(name.rpartition(".")[0])
            block.register_forward_pre_hook(jitter(question.jitter_key + layer))
        if table is not None or question.capacity_factor is not None or question.router != "top_k":
            model.get_submodule(name).register_forward_hook(chooser(table))
    return margins


def _weights(question: Question, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """The family's weights of experts that somebody else chose."""
    scores_TE = _scores(question, logits_TE)
    weights_TK = torch.stack([row[ids] for row, ids in zip(scores_TE, ids_TK, strict=True)])
    if question.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + question.norm_eps)
    return weights_TK * question.scale


def _taken_weights(question: Question, scores_TE: torch.Tensor, taken_TE: torch.Tensor) -> torch.Tensor:
    """The family's weights of the experts that took each token, 0 for the others."""
    rows = []
    for scores_E, taken_E in zip(scores_TE, taken_TE, strict=True):
        weights_E = scores_E * taken_E
        if question.normalize and taken_E.any():
            weights_E = weights_E / (weights_E.sum() + question.norm_eps)
        rows.append(weights_E * question.scale)
    return torch.stack(rows)


def _step(question: Question, model, optimizer, tokens: torch.Tensor):
    """(record, smallest margin, gradients before clipping, logits, experts of each token)."""
    seen = _watch(question, model)
    optimizer.zero_grad()
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    sequences = tokens.shape[0]
    layers = list(seen.values())
    scored = [layer for layer, table in zip(layers, question.tables, strict=True) if table is None]
    if question.router == "forced":
        scored = []
    aux = z = torch.zeros(())
    if scored:
        aux = torch.stack([_aux_loss(question, layer, sequences) for layer in scored]).mean()
        z = torch.stack([layer.logits_TE.logsumexp(-1).square().mean() for layer in scored]).mean()
    (loss + question.aux_coef * aux + question.z_coef * z).backward()
    parameters = list(model.parameters())
    raw = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    norm, factor = _clip(question, parameters)
    optimizer.step()
    num_experts = layers[0].logits_TE.shape[1]
    rows_LE = torch.stack([_count(layer.ids_TK[layer.weights_TK > 0], num_experts) for layer in layers])
    counts_LE = torch.stack([
        rows_E if _experts_choose(question, table) else _count(layer.ids_TK, num_experts)
        for rows_E, layer, table in zip(rows_LE, layers, question.tables, strict=True)
    ])  # fmt: skip
    margin = min((_margin(question, layer) for layer in scored if question.router == "top_k"), default=float("inf"))
    record = StepRecord(
        loss=float(loss.detach()),
        aux_loss=float(aux.detach()) if question.aux_coef else 0.0,
        z_loss=float(z.detach()) if question.z_coef else 0.0,
        grad_norm=norm,
        clip_factor=factor,
        counts_LE=counts_LE.numpy(),
        rows_LE=rows_LE.numpy(),
        bias_LE=_update_biases(question, model, counts_LE, layers, sequences),
    )
    ids_LTK = _told(question, layers)
    return record, margin, raw, logits.detach().numpy().copy(), ids_LTK.numpy().copy()


def _experts_choose(question: Question, table: np.ndarray | None) -> bool:
    return question.router == "expert_choice" and table is None


def _told(question: Question, layers: list[Seen]) -> torch.Tensor:
    """Experts of each token [L, T, K]: ~e where expert e had no room, ~E for no expert."""
    nobody = ~layers[0].logits_TE.shape[1]
    widest = max(layer.ids_TK.shape[1] for layer in layers)
    found = []
    for layer, table in zip(layers, question.tables, strict=True):
        without = torch.full_like(layer.ids_TK, nobody) if _experts_choose(question, table) else ~layer.ids_TK
        ids_TK = torch.where(layer.weights_TK > 0, layer.ids_TK, without)
        found.append(F.pad(ids_TK, (0, widest - ids_TK.shape[1]), value=nobody))
    return torch.stack(found)


def _count(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return F.one_hot(ids.flatten(), num_experts).sum(dim=0)


def _watch(question: Question, model) -> dict[str, Seen]:
    """Filled, in model order, by the forward that comes next."""
    seen: dict[str, Seen] = {}

    def watcher(name: str):
        def hook(module, inputs, output):
            bias = getattr(module, question.bias).clone() if question.bias else None
            seen[name] = Seen(logits_TE=output[0], weights_TK=output[1].detach(), ids_TK=output[2], bias_E=bias)
            handles[name].remove()

        return hook

    handles = {name: model.get_submodule(name).register_forward_hook(watcher(name)) for name in question.routers}
    return seen


def _scores(question: Question, logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.softmax(-1) if question.score == "softmax" else logits_TE.sigmoid()


def _aux_loss(question: Question, layer: Seen, sequences: int) -> torch.Tensor:
    """Mean over blocks of sum_e f_e P_e (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    A block is a sequence, as there, a micro-batch, or all there is.
    """
    together = {"sequence": 1, "micro_batch": question.micro_size, "global_batch": sequences}[question.aux_loss]
    blocks = sequences // together
    scores_TE = _scores(question, layer.logits_TE)
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    num_experts = scores_TE.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for share_SE, ids_SK in zip(share_TE.chunk(blocks), layer.ids_TK.chunk(blocks), strict=True):
        for expert in range(num_experts):
            times = int((ids_SK == expert).sum())
            total = total + num_experts / (question.top_k * len(ids_SK)) * times * share_SE[:, expert].mean()
    return total / blocks


def _clip(question: Question, parameters: list[torch.nn.Parameter]) -> tuple[float, float]:
    """Norm before clipping, and the factor; the gradients are clipped in place."""
    if not question.grad_clip:
        squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt()), 1.0
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, question.grad_clip, foreach=False))
    factor = question.grad_clip / (norm + 1e-6)
    assert factor < 1, "the clip must bind, or the certificate shows less than it says"
    return norm, factor


@torch.no_grad()
def _update_biases(
    question: Question, model, counts_LE: torch.Tensor, layers: list[Seen], sequences: int
) -> np.ndarray:
    """Auxiliary-loss-free balancing (arXiv 2408.15664); returns the biases afterwards."""
    if not question.bias:
        return np.zeros((0, counts_LE.shape[1]))
    biases = [getattr(model.get_submodule(name), question.bias) for name in question.routers]
    for bias_E, counts_E, layer, table in zip(biases, counts_LE.tolist(), layers, question.tables, strict=True):
        if table is not None:
            continue
        if question.bias_update == "quantile":
            parts = [
                balancing_bias(scores, bias_E, question.top_k)
                for scores in _scores(question, layer.logits_TE).chunk(sequences)
            ]
            wanted = [sum(values) / sequences for values in zip(*parts, strict=True)]
            for expert, value in enumerate(wanted):
                centred = value - sum(wanted) / len(wanted)
                bias_E[expert] += question.bias_rate * (centred - float(bias_E[expert]))
            continue
        mean = sum(counts_E) / len(counts_E)
        signs = [(mean > count) - (mean < count) for count in counts_E]
        steps = {
            "sign": signs,
            "zero_mean_sign": [sign - sum(signs) / len(signs) for sign in signs],
            "proportional": [1 - count / mean for count in counts_E],
        }[question.bias_update]
        for expert, step in enumerate(steps):
            bias_E[expert] += question.bias_rate * step
    return torch.stack(biases).numpy().copy()


@torch.no_grad()
def _margin(question: Question, layer: Seen) -> float:
    """How far the nearest choice, of groups or experts, was from being another one."""
    scores_TE = _scores(question, layer.logits_TE)
    if layer.bias_E is not None:
        scores_TE = scores_TE + layer.bias_E
    tokens, num_experts = scores_TE.shape
    margin = float("inf")
    if question.num_groups > 1:
        groups_TGE = scores_TE.view(tokens, question.num_groups, -1)
        best_two_TG = groups_TGE.sort(-1, descending=True).values[..., :2].sum(-1)
        margin = _gap(best_two_TG, question.topk_groups)
        kept_TG = best_two_TG >= best_two_TG.sort(-1, descending=True).values[:, question.topk_groups - 1, None]
        scores_TE = groups_TGE.masked_fill(~kept_TG[..., None], -torch.inf).view(tokens, num_experts)
    return min(margin, _gap(scores_TE, question.top_k))


def _gap(scores: torch.Tensor, chosen: int) -> float:
    """Smallest distance between the last chosen and the first not chosen."""
    if chosen >= scores.shape[1]:
        return float("inf")
    ordered = scores.sort(-1, descending=True).values
    return float((ordered[:, chosen - 1] - ordered[:, chosen]).min())
