"""One step of AdamW (arXiv 1711.05101) as torch.optim.AdamW does it: decay, moments, update, and the weights in use.

N elements. `corrections` holds 1 - beta_1^t and sqrt(1 - beta_2^t) of step t; `factor` scales the gradient.
"""

import torch

from moe_train.kernels.rule import AdamWRule


def step_(
    master_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    gradient_N: torch.Tensor,
    factor_1: torch.Tensor,
    corrections_2: torch.Tensor,
    used_N: torch.Tensor | None,
    rule: AdamWRule,
) -> None:
    """Changes master weights and moments in place, and writes the new weights to `used_N` in its own type."""
    gradient = gradient_N.to(master_N.dtype) * factor_1
    master_N.mul_(1 - rule.lr * rule.weight_decay)
    exp_avg_N.lerp_(gradient, 1 - rule.beta_1)
    exp_avg_sq_N.mul_(rule.beta_2).addcmul_(gradient, gradient, value=1 - rule.beta_2)
    denominator = (exp_avg_sq_N.sqrt() / corrections_2[1]).add_(rule.eps)
    master_N.sub_(exp_avg_N / denominator * (rule.lr / corrections_2[0]))
    if used_N is not None:
        used_N.copy_(master_N)
