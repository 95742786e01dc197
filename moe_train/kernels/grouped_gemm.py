"""Whose grouped GEMM multiplies the rows of experts: our own on Hopper in bf16, torch's elsewhere."""

import functools
from types import ModuleType

import torch

from moe_train.kernels.choose import has_triton
from moe_train.kernels.reference import grouped_gemm as torch_gemm

BLOCK = 64
"""Of K, that ours multiplies at once."""


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
