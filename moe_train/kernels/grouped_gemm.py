"""Whose grouped GEMM multiplies the rows of experts: our own on Hopper in bf16, torch's elsewhere."""

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from moe_train.kernels.choose import has_triton, implementation
from moe_train.kernels.operator import Operator
from moe_train.kernels.reference import grouped_gemm as torch_gemm

WIDE = 256
"""Columns of what ours computes at once."""
HIGH = 128
"""Rows of it."""
LINE = 128
"""Bytes of the cache that are read together. Where each row begins at a multiple of them, a block of 64 columns is one
of them and not two: of rows of 2000 bytes our products took 0.34, 0.34 and 0.55 ms in place of 0.36, 0.42 and 0.60."""


class RowGroups(NamedTuple):
    """Which of the sorted rows belong to which of L experts; made once for all products of a layer.

    offsets_L: where each expert's rows end, int32. table: for our own product: how many tiles of rows there are, then
    of each its expert, its first row and where the expert's rows end, int32; empty where it does not run.
    """

    offsets_L: torch.Tensor
    table: torch.Tensor


@torch.no_grad()
def row_groups(rows_per_expert: torch.Tensor, num_rows: int) -> RowGroups:
    """Of so many rows, of which the last may be no expert's."""
    return RowGroups(*_row_groups(rows_per_expert.contiguous(), num_rows))


def make_groups(rows_per_expert: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not is_ours(rows_per_expert.device):
        offsets_L = rows_per_expert.cumsum(0, dtype=torch.int32)
        return offsets_L, offsets_L.new_empty(0)
    from moe_train.kernels.triton import grouped_gemm

    return grouped_gemm.row_groups(rows_per_expert, num_rows)


def fake_groups(rows_per_expert, num_rows):
    experts, ours = len(rows_per_expert), is_ours(rows_per_expert.device)
    size = table_size(num_rows, experts, HIGH) if ours else 0
    return tuple(rows_per_expert.new_empty(length, dtype=torch.int32) for length in (experts, size))


def table_size(num_rows: int, experts: int, high: int) -> int:
    """Of `RowGroups.table`: every expert may have one tile that is not full."""
    return 1 + 3 * (-(-num_rows // high) + experts)


_row_groups = Operator("row_groups", make_groups, fake_groups)


def empty_rows(num_rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Room for rows of experts [num_rows, columns] where `like` is, and of its type if none is given.

    For our own product, each begins at a multiple of `LINE`. What is between them nobody reads, and whoever writes rows
    may write it too: the memory takes whole lines.
    """
    dtype = dtype or like.dtype
    unit = LINE // dtype.itemsize if begin_at_lines(dtype, like.device) else 1
    pitch = -(-columns // unit) * unit
    room = like.new_empty(num_rows, pitch, dtype=dtype)
    return room if pitch == columns else room[:, :columns]


def begin_at_lines(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of experts do, of this type and there."""
    return dtype == torch.bfloat16 and is_ours(device)


def rows_by_weights(
    rows_RK: torch.Tensor, weight: torch.Tensor, groups: RowGroups, *, across: bool = False
) -> torch.Tensor:
    """Each row times its expert's matrix [L, N, K], or with `across` [L, K, N] -> [R, N], as `empty_rows` lays them.
    Rows of no expert are left unwritten."""
    if (gemm := gemm_of(rows_RK, weight)) is torch_gemm:
        found = torch_gemm.rows_by_weights(rows_RK, weight, groups.offsets_L, across)
        if begin_at_lines(found.dtype, found.device):  # ours did not take the weights, and a compiler was told of lines
            return empty_rows(len(found), found.shape[1], found).copy_(found)
        return found
    return gemm.rows_by_weights(rows_RK, weight, groups.table, across)


def weight_gradient(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """left^T right over each expert's rows -> [L, M, N]."""
    return gemm_of(left_RM, right_RN).weight_gradient(left_RM, right_RN, offsets_L)


def gradient_by_tokens(
    left_RM: torch.Tensor, x_TN: torch.Tensor, place_TC: torch.Tensor, offsets_L: torch.Tensor
) -> torch.Tensor:
    """`weight_gradient` by the rows of tokens that are to be spread to `place_TC` (see `rows.spread`).

    The spread rows are the largest thing there is for a moment, at the very peak of backward: ours makes them in two
    parts of whole blocks of columns, unless one would be less than a quarter.
    """
    x_TN = x_TN.contiguous()
    rows, gemm = implementation("rows", x_TN.device), gemm_of(left_RM, x_TN)
    spread = functools.partial(rows.spread, place_TC=place_TC, num_rows=len(left_RM), aligned=True)
    columns = x_TN.shape[1]
    half = -(-columns // (2 * WIDE)) * WIDE
    if gemm is torch_gemm or 4 * half > 3 * columns:
        return weight_gradient(left_RM, spread(x_TN), offsets_L)
    out_LMN = x_TN.new_empty(len(offsets_L), left_RM.shape[1], columns)
    for part in (slice(half), slice(half, None)):
        gemm.weight_gradient(left_RM, spread(x_TN[:, part]), offsets_L, out_LMN[:, :, part])
    return out_LMN


def gemm_of(*operands: torch.Tensor) -> ModuleType:
    """Whose functions these are for. Ours reads dense rows that begin at multiples of 16 bytes, and of more than two
    dimensions only what is contiguous."""
    first = operands[0]
    ours = first.dtype == torch.bfloat16 and is_ours(first.device)
    if not (ours and all(_can_be_read(each) for each in operands)):
        return torch_gemm
    from moe_train.kernels.triton import grouped_gemm

    return grouped_gemm


def _can_be_read(operand: torch.Tensor) -> bool:
    if operand.dim() > 2 or operand.shape[0] < 2:  # of one row torch's stride means nothing
        dense, pitch = operand.is_contiguous(), operand.shape[-1]
    else:
        dense, pitch = operand.stride(1) == 1, operand.stride(0)
    return dense and operand.data_ptr() % 16 == 0 and pitch * operand.element_size() % 16 == 0


def is_ours(device: torch.device) -> bool:
    """Whether our own grouped GEMM runs there, for operands that it takes."""
    return device.type == "cuda" and has_triton() and is_hopper(device.index)


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)
