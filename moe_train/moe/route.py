"""Tokens -> experts: scores, choice and weights, in float32 whatever the model computes in.

T tokens, H hidden size, E experts, K experts per token (top-k).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_train import kernels
from moe_train.errors import RoutingError

Score = Literal["softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus"]
GroupScore = Literal["best_two", "best"]


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How a family turns router logits into experts and weights.

    score: softmax over all experts; softmax over the chosen ones, which are those with the largest logits; an
        independent sigmoid, or sqrt(softplus) (DeepSeek-V4), per expert.
    top_k: experts per token.
    normalize: divide the chosen weights by their sum (plus `eps`, and not below `min_sum`). Without effect after
        `softmax_after_topk`, whose weights sum to 1.
    scale: multiply the weights (`routed_scaling_factor`).
    num_groups, topk_groups: group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): only experts of the
        `topk_groups` groups with the largest group score can be chosen.
    group_score: of a group, the sum of its two best scores, or its best one (DeepSeek-V2).
    has_bias: a correction bias is added for the choice, never to the weights.
    partial: some ids may be negative; see `Routing`.
    """

    num_experts: int
    top_k: int
    score: Score
    normalize: bool
    eps: float = 0.0
    min_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "best_two"
    has_bias: bool = False
    partial: bool = False

    def __post_init__(self):
        for name, legal in (("score", get_args(Score)), ("group_score", get_args(GroupScore))):
            if getattr(self, name) not in legal:
                raise RoutingError(
                    f"a router's {name} ({getattr(self, name)}) must be one of {', '.join(legal)}: another formula "
                    "needs a gate_router of its own"
                )
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= self.num_experts:
            raise RoutingError(
                f"top-k ({self.top_k}) must lie between 1 and the number of experts ({self.num_experts}): "
                "set num_experts_per_tok or the number of experts under model.config"
            )
        if self.num_experts % self.num_groups or not 1 <= self.topk_groups <= self.num_groups:
            raise RoutingError(
                f"n_group ({self.num_groups}) must divide the number of experts ({self.num_experts}) and topk_group "
                f"({self.topk_groups}) must lie between 1 and n_group: set them under model.config"
            )
        reachable = self.num_experts // self.num_groups * self.topk_groups
        if reachable < self.top_k:
            raise RoutingError(
                f"top-k ({self.top_k}) exceeds the {reachable} experts that topk_group ({self.topk_groups}) of n_group "
                f"({self.num_groups}) groups hold: raise topk_group under model.config"
            )


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """What losses need of a routing, added up in the same pass over the logits; see `kernels.RouteOutput`.

    counts_SE: how often the tokens of a sequence chose an expert. share_sums_SE: sums of their scores, normalised to
    sum 1 per token. z_sum: sum of logsumexp(logits)^2. The last two carry a gradient.
    """

    counts_SE: torch.Tensor
    share_sums_SE: torch.Tensor
    z_sum: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The routing of T tokens. Only `topk_weights_TK`, `scores_TE` and `logits_TE` carry a gradient, and the sums.

    `logits_TE` and `scores_TE` are None where a router gives none; losses cannot be computed from it then, unless it
    has `sums`, per sequence of T / S consecutive tokens.
    A negative id goes nowhere and weighs 0: ~e was to go to expert e and found no room there, ~E is of no expert at all
    (a token may have fewer than the widest row). Only a router whose spec is `partial` has such ids.
    """

    logits_TE: torch.Tensor | None
    scores_TE: torch.Tensor | None
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    sums: RoutingSums | None = None


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] in float32 (float64 stays): a bf16 product would decide near ties by rounding."""
    if x_TH.dim() == 2 and x_TH.dtype == weight_EH.dtype == torch.bfloat16:
        return _WideLogits.apply(x_TH, weight_EH)  # type: ignore[return-value]
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype))


class _WideLogits(torch.autograd.Function):
    """Float32 logits of bf16 factors on the tensor cores, which multiply those exactly and add up in float32.

    Saves the factors as they are. In backward the gradient is two bf16 numbers, high and low: 2^-17 of it is lost,
    where one alone would lose 2^-8.
    """

    @staticmethod
    def forward(ctx, x_TH, weight_EH):
        ctx.save_for_backward(x_TH, weight_EH)
        return _wide_product(x_TH, weight_EH.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x_TH, weight_EH = ctx.saved_tensors
        high_TE = grads[0].to(torch.bfloat16)
        both_T2E = torch.cat([high_TE, (grads[0] - high_TE).to(torch.bfloat16)], dim=1)
        dx_TH = both_T2E @ torch.cat([weight_EH, weight_EH])
        high_EH, low_EH = _wide_product(both_T2E.t(), x_TH).chunk(2)
        return dx_TH, (high_EH + low_EH).to(weight_EH.dtype)


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of two bf16 matrices, in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def route_tokens(
    logits_TE: torch.Tensor,
    spec: RouterSpec,
    bias_E: torch.Tensor | None = None,
    topk_ids_TK: torch.Tensor | None = None,
) -> Routing:
    """Score, choose, weigh. `topk_ids_TK` replays an earlier choice (activation recompute)."""
    scores_TE = score_experts(logits_TE, spec.score)
    ranked_TE = logits_TE if spec.score == "softmax_after_topk" else scores_TE
    if topk_ids_TK is None:
        topk_ids_TK = choose_experts(ranked_TE.detach(), spec, bias_E)
    weights_TK = weigh_choice(ranked_TE, topk_ids_TK, spec)
    return Routing(logits_TE=logits_TE, scores_TE=scores_TE, topk_ids_TK=topk_ids_TK, topk_weights_TK=weights_TK)


def weigh_choice(ranked_TE: torch.Tensor, topk_ids_TK: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Weights [T, K] of the experts chosen, from what orders the experts of a token.

    A token without any divides 0 by 0, which the masks before and after it keep from output and gradient.
    """
    if spec.partial:
        wanted_TK = wanted_experts(topk_ids_TK)
        nobody_TK = wanted_TK == spec.num_experts
        weights_TK = ranked_TE.gather(1, wanted_TK.clamp(max=spec.num_experts - 1)).masked_fill(nobody_TK, 0.0)
    else:
        weights_TK = ranked_TE.gather(1, topk_ids_TK)
    if spec.score == "softmax_after_topk":
        weights_TK = weights_TK.softmax(dim=-1)
    elif spec.normalize:
        sum_T1 = weights_TK.sum(dim=-1, keepdim=True) + spec.eps
        weights_TK = weights_TK / (sum_T1.clamp(min=spec.min_sum) if spec.min_sum else sum_T1)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    return torch.where(topk_ids_TK < 0, 0.0, weights_TK) if spec.partial else weights_TK


def wanted_experts(ids: torch.Tensor) -> torch.Tensor:
    """The expert that each id asks for, with or without room there; E: none."""
    return torch.where(ids < 0, ~ids, ids)


def route_fused(
    logits_TE: torch.Tensor,
    spec: RouterSpec,
    bias_E: torch.Tensor | None,
    topk_ids_TK: torch.Tensor | None,
    num_sequences: int,
) -> Routing:
    """`route_tokens` as one operator for float32 logits, with the sums in place of the scores."""
    rule = kernels.RouterRule(
        score=spec.score,
        top_k=spec.top_k,
        normalize=spec.normalize,
        eps=spec.eps,
        min_sum=spec.min_sum,
        scale=spec.scale,
        num_groups=spec.num_groups,
        topk_groups=spec.topk_groups,
        best_two=spec.group_score == "best_two",
    )
    out = kernels.route(logits_TE, rule, bias_E=bias_E, chosen_TK=topk_ids_TK, num_sequences=num_sequences)
    return Routing(
        logits_TE=logits_TE,
        scores_TE=None,
        topk_ids_TK=out.ids_TK,
        topk_weights_TK=out.weights_TK,
        sums=RoutingSums(counts_SE=out.counts_SE, share_sums_SE=out.share_sums_SE, z_sum=out.z_sum),
    )


def score_experts(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    """Scores of all experts; those of `softmax_after_topk` are probabilities too, as losses want them."""
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrtsoftplus":
        return sqrt_softplus(logits_TE)
    return logits_TE.softmax(dim=-1)


def sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    """sqrt(log(1 + exp(x))).

    Far below zero it is exp(x / 2) to the last bit, and is computed so: there softplus vanishes, and the gradient of
    the square root would be infinity times zero.
    """
    edge = -40.0
    far = torch.exp(x.clamp(max=edge) / 2)
    return torch.where(x < edge, far, F.softplus(x.clamp(min=edge)).sqrt())


@torch.no_grad()
def choose_experts(scores_TE: torch.Tensor, spec: RouterSpec, bias_E: torch.Tensor | None) -> torch.Tensor:
    """Expert ids [T, K], best first. Scores: whatever orders the experts of a token."""
    if spec.has_bias:
        if bias_E is None:
            raise RoutingError("this router has a correction bias, and none was given")
        scores_TE = scores_TE + bias_E
    if spec.num_groups > 1:
        scores_TGE = scores_TE.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
        counted = min(2 if spec.group_score == "best_two" else 1, scores_TGE.shape[-1])
        groups_TG = scores_TGE.topk(counted, dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
        kept_TG.scatter_(1, groups_TG.topk(spec.topk_groups, dim=-1).indices, True)
        scores_TE = scores_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).view_as(scores_TE)
    return scores_TE.topk(spec.top_k, dim=-1).indices


def check_routing(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, T: int, K: int, E: int, *, check_range: bool = True
) -> None:
    """Raises `ValueError` unless ids [T, K] are int64 within 0..E-1 and weights [T, K] are floating point.

    Args:
        check_range: look at the ids themselves, which waits for the device; shapes and types cost nothing.
    """
    if not isinstance(ids_TK, torch.Tensor) or ids_TK.dtype != torch.int64:
        raise ValueError(f"expert ids must be an int64 tensor, not {_kind(ids_TK)}")
    if not isinstance(weights_TK, torch.Tensor) or not weights_TK.is_floating_point():
        raise ValueError(f"routing weights must be a floating-point tensor, not {_kind(weights_TK)}")
    for what, tensor in (("expert ids", ids_TK), ("routing weights", weights_TK)):
        if tuple(tensor.shape) != (T, K):
            raise ValueError(f"{what} have shape {list(tensor.shape)} for {T} tokens and top-k {K}: return [{T}, {K}]")
    if check_range and ids_TK.numel():
        lowest, highest = torch.stack(torch.aminmax(ids_TK)).tolist()
        if lowest < 0 or highest >= E:
            raise ValueError(f"expert ids lie between {lowest} and {highest}, and the experts are 0..{E - 1}")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
