"""Losses and the bias that keep experts in use. Pure functions; each says what it equals at perfect balance.

T tokens in S whole sequences, E experts, K experts per token.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from moe_train.moe.route import RouterSpec, Routing, RoutingSums, wanted_experts
from moe_train.moe.sequences import Sequences

AuxLoss = Literal["sequence", "micro_batch", "global_batch"]
"""Over which tokens f_e and P_e of an auxiliary loss are taken."""
BiasUpdate = Literal["sign", "zero_mean_sign", "proportional", "quantile"]
"""How a correction bias follows the load; see `update_bias_`, and `blend_bias_` for quantile."""


def sequence_aux_loss(
    routing: Routing, spec: RouterSpec, num_sequences: int, sequence_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over sequences of  sum_e f_e * P_e  (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    f_e = E / (K * tokens) * number of times expert e was chosen in the sequence, with or without room there; P_e = mean
    over the sequence of the scores, normalised to sum 1. Each sequence adds 1.0 at perfect balance. It looks at one
    sequence at a time, so it does not depend on how a batch is cut into micro-batches or ranks.

    Args:
        sequence_T: which sequence each token is of, where padding was left out; None: T / S consecutive tokens each.
    """
    if routing.sums is not None:
        assert sequence_T is None
        return _aux_loss_of_sums(routing, routing.sums, spec.top_k, num_sequences)
    scores_TE = _shares(routing, spec)
    num_tokens, num_experts = scores_TE.shape
    if sequence_T is None:
        length = num_tokens // max(num_sequences, 1)
        tokens_S1: float | torch.Tensor = float(max(length, 1))
        mean_SE = scores_TE.view(num_sequences, length, num_experts).sum(dim=1) / tokens_S1
        sequence_T = torch.arange(num_tokens, device=scores_TE.device) // max(length, 1)
    else:
        one_hot_ST = (sequence_T == torch.arange(num_sequences, device=scores_TE.device).unsqueeze(1)).to(scores_TE)
        tokens_S1 = one_hot_ST.sum(dim=1, keepdim=True).clamp(min=1)
        mean_SE = one_hot_ST @ scores_TE / tokens_S1  # a product and no scatter: the same bits every time
    wanted_TK = wanted_experts(routing.topk_ids_TK) if spec.partial else routing.topk_ids_TK
    place_R = (sequence_T.unsqueeze(1) * num_experts + wanted_TK).reshape(-1)
    counts_SE = scores_TE.new_zeros(num_sequences * num_experts)
    counts_SE.scatter_add_(0, place_R, torch.ones_like(place_R, dtype=scores_TE.dtype))
    chosen_SE = counts_SE.view(num_sequences, num_experts) * (num_experts / (spec.top_k * tokens_S1))
    return (chosen_SE * mean_SE).sum()


def _aux_loss_of_sums(routing: Routing, sums: RoutingSums, top_k: int, num_sequences: int) -> torch.Tensor:
    counts_SE, share_sums_SE = sums.counts_SE, sums.share_sums_SE
    if num_sequences != len(counts_SE):  # the sums of all are the sums over what was one sequence each
        assert num_sequences == 1
        counts_SE, share_sums_SE = counts_SE.sum(0, keepdim=True), share_sums_SE.sum(0, keepdim=True)
    tokens = max(routing.topk_ids_TK.shape[0] // max(num_sequences, 1), 1)
    chosen_SE = counts_SE * (counts_SE.shape[1] / (top_k * tokens))
    return (chosen_SE * (share_sums_SE / tokens)).sum()


def micro_batch_aux_loss(routing: Routing, spec: RouterSpec, num_sequences: int) -> torch.Tensor:
    """The same sum with f_e and P_e over all tokens given, as if they were one sequence: 1.0 at perfect balance, times
    the number of sequences (Switch Transformer, arXiv 2101.03961, equations 4 to 6, for any top-k)."""
    return sequence_aux_loss(routing, spec, 1) * num_sequences


def score_sums(routing: Routing, spec: RouterSpec) -> torch.Tensor:
    """What a micro-batch gives to P_e of the global batch: sum over its tokens of the scores, normalised [E]."""
    return _shares(routing, spec).sum(dim=0) if routing.sums is None else routing.sums.share_sums_SE.sum(dim=0)


def global_batch_aux_loss(
    sums: Mapping[int, torch.Tensor], counts_LE: torch.Tensor, top_k: int, num_sequences: int
) -> torch.Tensor:
    """A micro-batch's part of  sum_e f_e * P_e  over a whole optimizer step (arXiv 2501.11873, section 2), all layers.

    f_e is known and P_e is linear in the tokens, so the parts of all ranks and micro-batches, and their gradients, add
    up to the loss of the whole batch, however it was cut. Times the number of sequences, as the other forms are.

    Args:
        sums: `score_sums` by layer.
        counts_LE: tokens per layer and expert of the whole step, over all ranks.
        num_sequences: of the whole step.
    """
    layers = list(sums)
    sums_LE = torch.stack([sums[layer] for layer in layers])
    counts_LE = counts_LE[layers].to(sums_LE.dtype)
    total_L1 = counts_LE.sum(dim=1, keepdim=True)  # top-k times the number of tokens
    chosen_LE = counts_LE * (counts_LE.shape[1] / total_L1)
    mean_LE = sums_LE * (top_k / total_L1)
    return (chosen_LE * mean_LE).sum() * num_sequences


def _shares(routing: Routing, spec: RouterSpec) -> torch.Tensor:
    """Scores that add up to 1 for each token."""
    scores_TE = routing.scores_TE
    assert scores_TE is not None
    return scores_TE if spec.score == "softmax" else scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum()


@torch.no_grad()
def update_bias_(bias_LE: torch.Tensor, counts_LE: torch.Tensor, rate: float, form: BiasUpdate = "sign") -> None:
    """Auxiliary-loss-free balancing (arXiv 2408.15664), in place, once per optimizer step.

    sign: bias_e += rate * sign(mean load - load_e), the paper's algorithm 1. zero_mean_sign: less the mean of these
    steps over the experts, so that the biases keep their sum, as torchtitan does. proportional: bias_e += rate *
    (mean load - load_e) / mean load, whose steps shrink as the load evens out and do not depend on the batch's size; a
    layer that routed nothing keeps its bias.

    Args:
        counts_LE: tokens per expert of the whole step, over all ranks.
    """
    load_LE = counts_LE.to(torch.float64)
    mean_L1 = load_LE.mean(dim=-1, keepdim=True)
    step_LE = mean_L1 - load_LE
    if form == "proportional":
        step_LE = step_LE / mean_L1.clamp(min=torch.finfo(torch.float64).tiny)
    else:
        step_LE = step_LE.sign()
        if form == "zero_mean_sign":
            step_LE = step_LE - step_LE.mean(dim=-1, keepdim=True)
    bias_LE.add_(step_LE.to(bias_LE.dtype), alpha=rate)


@torch.no_grad()
def quantile_sums(scores_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, sequences: Sequences) -> torch.Tensor:
    """Sum over sequences of the bias that would have given every expert its part of that sequence, float64 [E].

    Quantile balancing (J. Su, kexue.fm/archives/11619; Kimi K3 report, section 2.3.3): a token takes expert e if its
    score and bias exceed the token's (K + 1)-th best biased score; the bias that lets just tokens * K / E of them in is
    minus the quantile of the scores' excess. Here of each sequence exactly, so that it does not depend on how a batch
    is cut; Megatron takes it of a micro-batch, Kimi K3 of a histogram of the whole batch.
    """
    scores_TE = scores_TE.double()
    cutoff_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=1).values[:, -1:]
    excess_SPE = sequences.padded(scores_TE - cutoff_T1, float("-inf"))
    let_in_S = sequences.lengths_S * top_k // bias_E.numel()
    if not excess_SPE.shape[1]:
        return scores_TE.new_zeros(bias_E.numel())
    place_S1E = let_in_S.view(-1, 1, 1).expand(-1, 1, bias_E.numel())
    quantile_SE = excess_SPE.sort(dim=1, descending=True).values.gather(1, place_S1E).squeeze(1)
    return -torch.where(sequences.lengths_S.unsqueeze(1) > 0, quantile_SE, 0.0).sum(dim=0)


@torch.no_grad()
def blend_bias_(bias_E: torch.Tensor, wanted_E: torch.Tensor, rate: float) -> None:
    """Go the part `rate` of the way to the bias that a step's quantiles ask for, less its mean; in place."""
    wanted_E = wanted_E - wanted_E.mean()
    bias_E.lerp_(wanted_E.to(bias_E.dtype), rate)
