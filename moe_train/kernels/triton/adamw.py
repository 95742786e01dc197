"""`reference/adamw.py`: everything is read once and written once.

B elements: a block.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.rule import AdamWRule
from moe_train.kernels.triton.host import cdiv

BLOCK = 1024


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
    """See the reference."""
    size = master_N.numel()
    if size:
        _kernel[(cdiv(size, BLOCK),)](
            master_N, exp_avg_N, exp_avg_sq_N, gradient_N, factor_1, corrections_2, used_N, size,
            float(rule.lr), 1.0 - rule.lr * rule.weight_decay, 1.0 - rule.beta_1, float(rule.beta_2),
            1.0 - rule.beta_2, rule.eps, B=BLOCK,
        )  # fmt: skip


@triton.jit
def _kernel(
    master, exp_avg, exp_avg_sq, gradient, factor, corrections, used, size, lr, kept, fresh_1, beta_2, fresh_2, eps,
    B: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    there = element < size
    slope = tl.load(gradient + element, mask=there, other=0.0).to(tl.float32) * tl.load(factor)
    first = tl.load(exp_avg + element, mask=there, other=0.0)
    second = tl.load(exp_avg_sq + element, mask=there, other=0.0)
    weight = tl.load(master + element, mask=there, other=0.0) * kept
    first += (slope - first) * fresh_1
    second = second * beta_2 + slope * slope * fresh_2
    denominator = tl.sqrt(second) / tl.load(corrections + 1) + eps
    weight -= first / denominator * (lr / tl.load(corrections))
    tl.store(exp_avg + element, first, mask=there)
    tl.store(exp_avg_sq + element, second, mask=there)
    tl.store(master + element, weight, mask=there)
    if used is not None:
        tl.store(used + element, weight.to(used.dtype.element_ty), mask=there)
