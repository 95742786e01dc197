"""Tokens -> experts: scores, choice and weights, in float32 whatever the model computes in.

T tokens, H hidden size, E experts, K experts per token (top-k).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from moe_train.errors import RoutingError


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How a family turns router logits into experts and weights.

    score: softmax over all experts, or an independent sigmoid per expert.
    top_k: experts per token.
    normalize: divide the chosen weights by their sum (plus `eps`).
    scale: multiply the weights (`routed_scaling_factor`).
    num_groups, topk_groups: group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): only experts of the
        `topk_groups` groups with the largest sum of their two best scores can be chosen.
    has_bias: a correction bias is added for the choice, never to the weights.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"]
    normalize: bool
    eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    has_bias: bool = False

    def __post_init__(self):
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
class Routing:
    """The routing of T tokens. Only `topk_weights_TK`, `scores_TE` and `logits_TE` carry a gradient."""

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


def router_logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] in float32 (float64 stays): a bf16 product would decide near ties by rounding."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype))


def route_tokens(
    logits_TE: torch.Tensor,
    spec: RouterSpec,
    bias_E: torch.Tensor | None = None,
    topk_ids_TK: torch.Tensor | None = None,
) -> Routing:
    """Score, choose, weigh. `topk_ids_TK` replays an earlier choice (activation recompute)."""
    scores_TE = logits_TE.softmax(dim=-1) if spec.score == "softmax" else logits_TE.sigmoid()
    if topk_ids_TK is None:
        topk_ids_TK = choose_experts(scores_TE.detach(), spec, bias_E)
    weights_TK = scores_TE.gather(1, topk_ids_TK)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + spec.eps)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    return Routing(logits_TE=logits_TE, scores_TE=scores_TE, topk_ids_TK=topk_ids_TK, topk_weights_TK=weights_TK)


@torch.no_grad()
def choose_experts(scores_TE: torch.Tensor, spec: RouterSpec, bias_E: torch.Tensor | None) -> torch.Tensor:
    """Expert ids [T, K], best first."""
    if spec.has_bias:
        if bias_E is None:
            raise RoutingError("this router has a correction bias, and none was given")
        scores_TE = scores_TE + bias_E
    if spec.num_groups > 1:
        scores_TGE = scores_TE.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
        best_two = scores_TGE.topk(min(2, scores_TGE.shape[-1]), dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(best_two, dtype=torch.bool)
        kept_TG.scatter_(1, best_two.topk(spec.topk_groups, dim=-1).indices, True)
        scores_TE = scores_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).view_as(scores_TE)
    return scores_TE.topk(spec.top_k, dim=-1).indices
