"""Whose grouped GEMM multiplies the rows of experts: our own on Hopper in bf16, torch's elsewhere."""

import functools
from types import ModuleType

import torch

from moe_train.kernels.choose import has_triton, implementation
from moe_train.kernels.reference import grouped_gemm as torch_gemm

BLOCK = 64
"""Of K, that ours multiplies at once."""
WIDE = 256
"""Columns of what ours computes at once."""


def rows_by_weights(
    rows_RK: torch.Tensor, weight: torch.Tensor, offsets_L: torch.Tensor, *, across: bool = False
) -> torch.Tensor:
    """Each row times its expert's matrix [L, N, K], or with `across` [L, K, N] -> [R, N]. Rows from `offsets_L[-1]` on
    are left unwritten."""
    # across, ours reads K in blocks, the last of which would reach into the next expert's matrix
    gemm = torch_gemm if across and rows_RK.shape[1] % BLOCK else gemm_of(rows_RK, weight)
    return gemm.rows_by_weights(rows_RK, weight, offsets_L, across)


def weight_gradient(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """left^T right over each expert's rows -> [L, M, N]."""
    return gemm_of(left_RM, right_RN).weight_gradient(left_RM, right_RN, offsets_L)


def gradient_by_tokens(
    left_RM: torch.Tensor, x_TN: torch.Tensor, place_TC: torch.Tensor | None, offsets_L: torch.Tensor
) -> torch.Tensor:
    """`weight_gradient` by the rows of tokens that are to be spread: to `place_TC` (see `rows.spread`); None: they are
    rows already.

    The spread rows are the largest thing there is for a moment, at the very peak of backward: ours makes half of their
    columns at a time.
    """
    x_TN = x_TN.contiguous()
    if place_TC is None:
        return weight_gradient(left_RM, x_TN, offsets_L)
    spread, gemm = implementation("rows", x_TN.device).spread, gemm_of(left_RM, x_TN)
    columns = x_TN.shape[1]
    if gemm is torch_gemm or columns % (2 * WIDE):
        return weight_gradient(left_RM, spread(x_TN, place_TC), offsets_L)
    out_LMN = x_TN.new_empty(len(offsets_L), left_RM.shape[1], columns)
    for part in (slice(columns // 2), slice(columns // 2, None)):
        gemm.weight_gradient(left_RM, spread(x_TN[:, part], place_TC), offsets_L, out_LMN[:, :, part])
    return out_LMN


def gemm_of(*operands: torch.Tensor) -> ModuleType:
    """Whose functions these are for. Ours reads rows one behind the other, from a multiple of 16 bytes on."""
    first = operands[0]
    ours = first.is_cuda and first.dtype == torch.bfloat16 and has_triton() and is_hopper(first.device.index)
    if not (ours and all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in operands)):
        return torch_gemm
    from moe_train.kernels.triton import grouped_gemm

    return grouped_gemm


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)
