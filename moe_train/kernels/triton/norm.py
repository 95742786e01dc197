"""`reference/norm.py`: each row is read once in either direction; the weight's gradient is added up per program first.

BR rows of BH elements: a tile. As many rows as fit into it, so that the heads of an attention are no waste.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.triton.host import cdiv, power_of_2

TILE_ELEMENTS = 2048
PROGRAMS = 1056
"""Of the backward pass: eight for each multiprocessor of an H200."""


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    (rows, width), tile = x_TH.shape, _tile(x_TH.shape[1])
    y_TH = torch.empty(rows, width, dtype=x_TH.dtype, device=x_TH.device)
    scale_T = torch.empty(rows, dtype=torch.float32, device=x_TH.device)
    if y_TH.numel():
        _forward_kernel[(cdiv(rows, tile["BR"]),)](
            x_TH, weight_H, y_TH, scale_T, rows, x_TH.stride(0), eps, H=width, **tile
        )
    return y_TH, scale_T


def backward(
    dy_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, scale_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    (rows, width), tile = x_TH.shape, _tile(x_TH.shape[1])
    programs = min(cdiv(rows, tile["BR"]), PROGRAMS)
    dx_TH = torch.empty(rows, width, dtype=x_TH.dtype, device=x_TH.device)
    parts_PH = torch.empty(programs, width, dtype=torch.float32, device=x_TH.device)
    if dx_TH.numel():
        _backward_kernel[(programs,)](
            dy_TH, x_TH, weight_H, scale_T, dx_TH, parts_PH, rows, x_TH.stride(0), H=width, **tile
        )
    return dx_TH, parts_PH.sum(dim=0).to(weight_H.dtype)


def _tile(width: int) -> dict[str, int]:
    columns = power_of_2(width)
    return {"BR": max(TILE_ELEMENTS // columns, 1), "BH": columns, "num_warps": 4 if columns <= 4096 else 8}


@triton.jit
def _forward_kernel(x, weight, y, scale, T, stride, eps, H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BH)
    there = row < T
    both = there[:, None] & (column < H)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=both, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / H + eps)
    factor = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    normed = value * inverse[:, None] * factor[None, :]
    tl.store(y + row[:, None] * H + column[None, :], normed.to(y.dtype.element_ty), mask=both)
    tl.store(scale + row, inverse, mask=there)


@triton.jit
def _backward_kernel(dy, x, weight, scale, dx, parts, T, stride, H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr):
    column = tl.arange(0, BH)
    factor = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    part = tl.zeros([BR, BH], tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(T, BR):
        row = block.to(tl.int64) * BR + tl.arange(0, BR)
        there = row < T
        both = there[:, None] & (column < H)[None, :]
        target = row[:, None] * H + column[None, :]
        gradient = tl.load(dy + target, mask=both, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * stride + column[None, :], mask=both, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row, mask=there, other=0.0)
        normed = value * inverse[:, None]
        part += gradient * normed
        gradient *= factor[None, :]
        along = tl.sum(gradient * normed, axis=1) / H
        out = inverse[:, None] * (gradient - normed * along[:, None])
        tl.store(dx + target, out.to(dx.dtype.element_ty), mask=both)
        block += tl.num_programs(0)
    tl.store(parts + tl.program_id(0) * H + column, tl.sum(part, axis=0), mask=column < H)
