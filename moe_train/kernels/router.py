"""The router behind its linear layer, as one operator: scores, choice, weights and the sums that balancing needs.

T tokens in S sequences of equal length, E experts, K experts per token.
"""

from dataclasses import astuple, dataclass

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.operator import Operator
from moe_train.kernels.rule import RouterRule


@dataclass(frozen=True, kw_only=True)
class RouteOutput:
    """ids_TK: experts of a token, best first, int64; -1 for padding. weights_TK: float32; 0 for padding.

    counts_SE: how often each expert was chosen, int64. share_sums_SE: sum over a sequence's tokens of the scores,
    normalised to sum 1. z_sum: sum over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5).
    weights_TK, share_sums_SE and z_sum carry a gradient.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    counts_SE: torch.Tensor
    share_sums_SE: torch.Tensor
    z_sum: torch.Tensor


def route(
    logits_TE: torch.Tensor,
    rule: RouterRule,
    *,
    bias_E: torch.Tensor | None = None,
    chosen_TK: torch.Tensor | None = None,
    valid_T: torch.Tensor | None = None,
    num_sequences: int = 1,
) -> RouteOutput:
    """Logits [T, E] in float32 -> experts, weights and sums. Equal scores are decided by the lowest index.

    Args:
        bias_E: added for the choice, never to the weights.
        chosen_TK: int64, the choice of an earlier call (activation recompute); nothing is chosen then.
        valid_T: bool, False for padding: no expert, weight 0, in no sum. None: all are tokens.
        num_sequences: S, must divide T; the sums are per sequence.
    """
    assert logits_TE.dtype == torch.float32, f"logits in {logits_TE.dtype}"
    assert num_sequences >= 1, f"{num_sequences} sequences"
    assert logits_TE.shape[0] % num_sequences == 0, f"{logits_TE.shape[0]} tokens in {num_sequences} sequences"
    outputs = _route(logits_TE.contiguous(), bias_E, chosen_TK, valid_T, num_sequences, *astuple(rule))
    ids_TK, weights_TK, counts_SE, sums_SE, z = outputs
    return RouteOutput(ids_TK=ids_TK, weights_TK=weights_TK, counts_SE=counts_SE, share_sums_SE=sums_SE, z_sum=z)


def forward(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    chosen_TK: torch.Tensor | None,
    valid_T: torch.Tensor | None,
    num_sequences: int,
    score: str,
    top_k: int,
    normalize: bool,
    eps: float,
    min_sum: float,
    scale: float,
    num_groups: int,
    topk_groups: int,
    best_two: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rule = RouterRule(
        score=score,
        top_k=top_k,
        normalize=normalize,
        eps=eps,
        min_sum=min_sum,
        scale=scale,
        num_groups=num_groups,
        topk_groups=topk_groups,
        best_two=best_two,
    )
    kernel = implementation("router", logits_TE.device)
    return kernel.forward(logits_TE, bias_E, chosen_TK, valid_T, num_sequences, rule)


def fake_forward(logits_TE, bias_E, chosen_TK, valid_T, num_sequences, score, top_k, *rest):
    num_tokens, num_experts = logits_TE.shape
    return (
        logits_TE.new_empty((num_tokens, top_k), dtype=torch.int64),
        logits_TE.new_empty((num_tokens, top_k)),
        logits_TE.new_empty((num_sequences, num_experts), dtype=torch.int64),
        logits_TE.new_empty((num_sequences, num_experts)),
        logits_TE.new_empty(()),
    )


def backward(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    valid_T: torch.Tensor | None,
    dweights_TK: torch.Tensor,
    dsums_SE: torch.Tensor,
    dz: torch.Tensor,
    score: str,
    top_k: int,
    normalize: bool,
    eps: float,
    min_sum: float,
    scale: float,
) -> torch.Tensor:
    rule = RouterRule(score=score, top_k=top_k, normalize=normalize, eps=eps, min_sum=min_sum, scale=scale)
    kernel = implementation("router", logits_TE.device)
    return kernel.backward(logits_TE, ids_TK, valid_T, dweights_TK, dsums_SE, dz, rule)


def fake_backward(logits_TE, *rest):
    return torch.empty_like(logits_TE)


def _save(ctx, inputs, output):
    logits_TE, _, _, valid_T, _, *rule = inputs
    ctx.save_for_backward(logits_TE, output[0], valid_T)
    ctx.mark_non_differentiable(output[0], output[2])
    ctx.rule = rule[:6]


def _adjoint(ctx, _ids, dweights_TK, _counts, dsums_SE, dz):
    logits_TE, ids_TK, valid_T = ctx.saved_tensors
    dlogits_TE = _route_backward(logits_TE, ids_TK, valid_T, dweights_TK, dsums_SE, dz, *ctx.rule)
    return (dlogits_TE, *[None] * 13)


_route_backward = Operator("route_backward", backward, fake_backward)
_route = Operator("route", forward, fake_forward, _save, _adjoint)
