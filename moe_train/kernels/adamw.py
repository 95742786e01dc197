"""AdamW in one pass over memory. torch's fused one wants scaled float32 gradients, and leaves the weights to copy."""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.rule import AdamWRule


def adamw_step_(
    master_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    gradient_N: torch.Tensor,
    factor_1: torch.Tensor,
    corrections_2: torch.Tensor,
    used_N: torch.Tensor | None,
    rule: AdamWRule,
) -> None:
    """Master weights, moments and the weights in use, in place; on the device nothing is waited for.

    Args:
        gradient_N: in any floating type. factor_1: what to multiply it by, in the type of the master weights.
        corrections_2: 1 - beta_1^t and sqrt(1 - beta_2^t) of this step, likewise.
        used_N: where the new weights go in the type of forward; None: the master weights are those.
    """
    assert master_N.is_contiguous()
    assert gradient_N.shape == master_N.shape
    step_ = dense_implementation("adamw", master_N).step_
    step_(master_N, exp_avg_N, exp_avg_sq_N, gradient_N.contiguous(), factor_1, corrections_2, used_N, rule)
