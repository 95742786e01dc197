"""Whose grouped GEMM multiplies the rows of experts: our own on Hopper in bf16, torch's elsewhere."""

import functools
from types import ModuleType

import torch

from moe_train.kernels.choose import has_triton
from moe_train.kernels.reference import grouped_gemm as torch_gemm


def rows_by_weights(
    rows_RK: torch.Tensor, weight: torch.Tensor, offsets_L: torch.Tensor, *, across: bool = False
) -> torch.Tensor:
    """Each row times its expert's matrix [L, N, K], or with `across` [L, K, N] -> [R, N]. Rows from `offsets_L[-1]` on
    are left unwritten."""
    fits = rows_RK.is_contiguous() and weight.is_contiguous()
    return gemm_of(rows_RK, fits).rows_by_weights(rows_RK, weight, offsets_L, across)


def weight_gradient(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """left^T right over each expert's rows -> [L, M, N]."""
    fits = left_RM.is_contiguous() and right_RN.is_contiguous()
    return gemm_of(left_RM, fits).weight_gradient(left_RM, right_RN, offsets_L)


def gemm_of(rows: torch.Tensor, fits: bool = True) -> ModuleType:
    """fits: the operands lie as ours reads them."""
    if not (fits and rows.is_cuda and rows.dtype == torch.bfloat16 and has_triton() and is_hopper(rows.device.index)):
        return torch_gemm
    from moe_train.kernels.triton import grouped_gemm

    return grouped_gemm


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)
