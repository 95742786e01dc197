"""What a router's scores become, and what an optimizer does, in the form that kernels take."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """score: `softmax`, `softmax_after_topk`, `sigmoid` or `sqrtsoftplus`. top_k: experts per token.

    normalize: divide the chosen weights by their sum (plus eps, and not below min_sum), then multiply by scale.
    num_groups, topk_groups: only experts of the best `topk_groups` groups can be chosen. best_two: a group's score is
    the sum of its two best scores, not its best one.
    """

    score: str
    top_k: int
    normalize: bool = False
    eps: float = 0.0
    min_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    best_two: bool = True


@dataclass(frozen=True, kw_only=True)
class AdamWRule:
    """As torch.optim.AdamW names them; beta_1 and beta_2 are its `betas`."""

    lr: float
    beta_1: float
    beta_2: float
    eps: float
    weight_decay: float
