"""`reference/rotary.py`: one pass in either direction.

A row is one head of one position; BR rows of both halves, BD elements each: a tile.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.triton.host import cdiv, power_of_2

TILE_ELEMENTS = 2048


def forward(x_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    """See the reference."""
    return _turn(x_BSND, cos_PD, sin_PD, False)


def backward(dy_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    """See the reference."""
    return _turn(dy_BSND, cos_PD, sin_PD, True)


def _turn(x_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, adjoint: bool) -> torch.Tensor:
    y_BSND = torch.empty(x_BSND.shape, dtype=x_BSND.dtype, device=x_BSND.device)
    width = x_BSND.shape[-1]
    rows, columns = x_BSND.numel() // max(width, 1), power_of_2(width // 2)
    if y_BSND.numel():
        height = max(TILE_ELEMENTS // columns, 1)
        _kernel[(cdiv(rows, height),)](
            x_BSND, cos_PD, sin_PD, y_BSND, rows, x_BSND.shape[2], len(cos_PD),
            HALF=width // 2, ADJOINT=adjoint, BR=height, BD=columns,
        )  # fmt: skip
    return y_BSND


@triton.jit
def _kernel(
    x, cos, sin, y, rows, heads, P, HALF: tl.constexpr, ADJOINT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    both = (row < rows)[:, None] & (column < HALF)[None, :]
    source = row[:, None] * (2 * HALF) + column[None, :]
    angle = ((row // heads) % P)[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(x + source, mask=both, other=0.0).to(tl.float32)
    second = tl.load(x + source + HALF, mask=both, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos + angle, mask=both, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=both, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=both, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, mask=both, other=0.0).to(tl.float32)
    if ADJOINT:
        out_1, out_2 = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
    else:
        out_1, out_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    tl.store(y + source, out_1.to(y.dtype.element_ty), mask=both)
    tl.store(y + source + HALF, out_2.to(y.dtype.element_ty), mask=both)
