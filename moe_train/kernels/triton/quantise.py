"""`reference/quantise.py`: a row is read once from memory and once more from the cache, and written for every copy.

T tokens, C copies per token, H hidden size; BR x BH: a tile. Row numbers times H are 64-bit.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.choose import interpreted
from moe_train.kernels.fp8 import LARGEST, SMALLEST, Fp8Rows, empty_fp8_rows
from moe_train.kernels.grouped_gemm import empty_rows
from moe_train.kernels.triton.host import cdiv, dense_rows, power_of_2

TILE_ELEMENTS, WARPS = 2048, 4
TILE_ROWS, TILE_COLUMNS = 128, 64
"""Of a transposed weight: 128 bytes at a time both ways."""

LIMIT: tl.constexpr = tl.constexpr(LARGEST)
FLOOR: tl.constexpr = tl.constexpr(SMALLEST)


def spread(
    x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, *, plain: bool, fp8: bool, aligned: bool = False
) -> tuple[torch.Tensor | None, Fp8Rows | None]:
    """See the reference."""
    shape = (num_rows, x_TH.shape[1])
    rows_RH = None
    if plain:
        rows_RH = empty_rows(*shape, x_TH) if aligned else x_TH.new_empty(shape)
    quantised = empty_fp8_rows(shape, x_TH.device) if fp8 else None
    if num_rows and (plain or fp8):
        _spread(dense_rows(x_TH), place_TC, rows_RH, quantised, place_TC.shape[1])
    return rows_RH, quantised


def along(weight_LNK: torch.Tensor, into: Fp8Rows) -> None:
    """See the reference."""
    if weight_LNK.numel():
        _spread(weight_LNK.view(-1, weight_LNK.shape[2]), None, None, into, 1)


def across(weight_LNK: torch.Tensor, into: Fp8Rows) -> None:
    """See the reference."""
    experts, rows, columns = weight_LNK.shape
    if weight_LNK.numel():
        _across_kernel[(cdiv(columns, TILE_COLUMNS), experts)](
            weight_LNK, *into, rows, columns, ROUND=interpreted(), BN=TILE_ROWS, BK=TILE_COLUMNS
        )


def _spread(x: torch.Tensor, place: torch.Tensor | None, plain: torch.Tensor | None, fp8: Fp8Rows | None, copies: int):
    tokens, hidden = x.shape
    columns = min(TILE_ELEMENTS, power_of_2(hidden))
    height = TILE_ELEMENTS // columns
    values, scales = fp8 or (None, None)
    _spread_kernel[(cdiv(tokens, height),)](
        x,
        place,
        plain,
        values,
        scales,
        tokens,
        x.stride(0),
        hidden if plain is None else plain.stride(0),
        hidden,
        C=copies,
        ROUND=interpreted(),
        BR=height,
        BH=columns,
        num_warps=WARPS,
    )


@triton.jit
def magnitude(value):
    """Bits of |value|, which order as the values do, with infinity above all numbers and NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest):
    """A row's scale and its inverse, from the bits of its largest magnitude."""
    floor = tl.full(largest.shape, FLOOR, tl.float32).to(tl.int32, bitcast=True)
    value = tl.maximum(largest, floor).to(tl.float32, bitcast=True)
    limit = tl.full(largest.shape, LIMIT, tl.float32)
    return tl.div_rn(value, limit), tl.div_rn(limit, value)


@triton.jit
def to_fp8(value, ROUND: tl.constexpr):
    """Nearest e4m3 number, ties to even. ROUND: do it here, as the interpreter loses the carry into the exponent."""
    if ROUND:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        below_normal = (value + 24576.0) - 24576.0  # multiples of 2^-9
        value = tl.where(tl.abs(value) < 0.015625, below_normal, bits.to(tl.float32, bitcast=True))
    return value.to(tl.float8e4nv)


@triton.jit
def _spread_kernel(
    x,
    place,
    plain,
    values,
    scales,
    tokens,
    stride: tl.constexpr,
    pitch: tl.constexpr,
    hidden: tl.constexpr,
    C: tl.constexpr,
    ROUND: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = token < tokens
    inverse = tl.full([BR], 0.0, tl.float32)
    if values is not None:
        largest = tl.zeros([BR], tl.int32)
        for start in range(0, hidden, BH):
            column = start + tl.arange(0, BH)
            both = inside[:, None] & (column < hidden)[None, :]
            value = tl.load(x + token[:, None] * stride + column[None, :], mask=both, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(magnitude(value), axis=1))
        scale, inverse = scale_of(largest)
        for c in range(C):
            row = token
            if place is not None:
                row = tl.load(place + token * C + c, mask=inside, other=-1)
            tl.store(scales + row, scale, mask=inside & (row >= 0))
    for start in range(0, hidden, BH):
        column = start + tl.arange(0, BH)
        in_row, in_pitch = (column < hidden)[None, :], (column < pitch)[None, :]
        value = tl.load(x + token[:, None] * stride + column[None, :], mask=inside[:, None] & in_row, other=0.0)
        quantised = to_fp8(value.to(tl.float32) * inverse[:, None], ROUND)
        for copy in tl.static_range(C):
            row = token
            if place is not None:
                row = tl.load(place + token * C + copy, mask=inside, other=-1)
            there = (inside & (row >= 0))[:, None]
            if plain is not None:
                tl.store(plain + row[:, None] * pitch + column[None, :], value, mask=there & in_pitch)
            if values is not None:
                tl.store(values + row[:, None] * hidden + column[None, :], quantised, mask=there & in_row)


@triton.jit
def _across_kernel(
    weight,
    values,
    scales,
    rows: tl.constexpr,
    columns,
    ROUND: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    expert = tl.program_id(1).to(tl.int64)
    source, target = weight + expert * rows * columns, values + expert * rows * columns
    in_column = column < columns
    largest = tl.zeros([BK], tl.int32)
    for start in range(0, rows, BN):
        row = (start + tl.arange(0, BN)).to(tl.int64)
        both = (row < rows)[:, None] & in_column[None, :]
        value = tl.load(source + row[:, None] * columns + column[None, :], mask=both, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(value), axis=0))
    scale, inverse = scale_of(largest)
    tl.store(scales + expert * columns + column, scale, mask=in_column)
    for start in range(0, rows, BN):
        row = (start + tl.arange(0, BN)).to(tl.int64)
        both = (row < rows)[:, None] & in_column[None, :]
        value = tl.load(source + row[:, None] * columns + column[None, :], mask=both, other=0.0).to(tl.float32)
        turned = tl.trans(to_fp8(value * inverse[None, :], ROUND))
        place = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(target + place, turned, mask=in_column[:, None] & (row < rows)[None, :])
