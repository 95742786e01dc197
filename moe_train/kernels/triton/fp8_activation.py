"""`reference/fp8_activation.py`: a program has whole rows, whose largest magnitude it needs before it writes them.

R rows, I expert intermediate size; BR x BI: a tile, of whole rows as far as they fit. Rows beyond `offsets[-1]` are
left unwritten: nobody reads them.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.choose import interpreted
from moe_train.kernels.fp8 import Fp8Rows, empty_fp8_rows
from moe_train.kernels.grouped_gemm import empty_rows
from moe_train.kernels.triton.activation import KINDS, _activate
from moe_train.kernels.triton.host import cdiv, power_of_2
from moe_train.kernels.triton.quantise import magnitude, scale_of, to_fp8

TILE_ELEMENTS, CHUNK = 1024, 2048
HELD_FORWARD, HELD_BACKWARD = 16384, 8192
"""Longest rows that a program keeps in its registers; of longer ones it computes every chunk twice."""


def forward(
    h_R2I: torch.Tensor, offsets_L: torch.Tensor, weights_C: torch.Tensor, order_R: torch.Tensor, name: str
) -> Fp8Rows:
    """See the reference."""
    rows, inner = h_R2I.shape[0], h_R2I.shape[1] // 2
    out = empty_fp8_rows((rows, inner), h_R2I.device)
    if rows:
        tile = _tile(inner, HELD_FORWARD)
        _forward_kernel[(cdiv(rows, tile["BR"]),)](
            h_R2I,
            offsets_L,
            weights_C,
            order_R,
            *out,
            len(offsets_L),
            h_R2I.stride(0),
            inner,
            KIND=KINDS[name],
            **tile,
        )
    return out


def backward(
    dout_RI: torch.Tensor,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_C: torch.Tensor,
    order_R: torch.Tensor,
    name: str,
    in_place: bool = False,
) -> tuple[torch.Tensor, Fp8Rows, torch.Tensor, torch.Tensor]:
    """See the reference."""
    rows, inner = dout_RI.shape
    dh_R2I = empty_rows(*h_R2I.shape, h_R2I)
    out_RI = dout_RI if in_place else empty_rows(rows, inner, dout_RI)
    quantised = empty_fp8_rows((rows, 2 * inner), h_R2I.device)
    dweights_C = torch.zeros_like(weights_C)
    if rows:
        tile = _tile(inner, HELD_BACKWARD)
        _backward_kernel[(cdiv(rows, tile["BR"]),)](
            dout_RI,
            h_R2I,
            offsets_L,
            weights_C,
            order_R,
            dh_R2I,
            *quantised,
            out_RI,
            dweights_C,
            len(offsets_L),
            h_R2I.stride(0),
            dh_R2I.stride(0),
            dout_RI.stride(0),
            out_RI.stride(0),
            inner,
            KIND=KINDS[name],
            **tile,
        )
    return dh_R2I, quantised, out_RI, dweights_C


def _tile(inner: int, longest: int) -> dict[str, int]:
    """HELD: a tile has whole rows. Eight elements a thread, as far as there are threads."""
    columns = power_of_2(inner)
    columns = columns if columns <= longest else CHUNK
    height = max(1, TILE_ELEMENTS // columns)
    warps = min(32, max(4, height * columns // 256))
    return {"HELD": columns >= inner, "ROUND": interpreted(), "BR": height, "BI": columns, "num_warps": warps}


@triton.jit
def _forward_tile(h, row, there, weight, start, pitch, inner, KIND: tl.constexpr, BI: tl.constexpr):
    column = start + tl.arange(0, BI)
    both = there[:, None] & (column < inner)[None, :]
    source = h + row[:, None] * pitch + column[None, :]
    gate = tl.load(source, mask=both, other=0.0).to(tl.float32)
    up = tl.load(source + inner, mask=both, other=0.0).to(tl.float32)
    value, _ = _activate(gate, KIND)
    return value * up * weight[:, None], column, both


@triton.jit
def _forward_kernel(
    h,
    offsets,
    weights,
    order,
    values,
    scales,
    L,
    pitch: tl.constexpr,
    inner: tl.constexpr,
    KIND: tl.constexpr,
    HELD: tl.constexpr,
    ROUND: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = row < tl.load(offsets + L - 1)
    copy = tl.load(order + row, mask=there, other=0)
    weight = tl.load(weights + copy, mask=there, other=0.0).to(tl.float32)
    if HELD:
        value, column, both = _forward_tile(h, row, there, weight, 0, pitch, inner, KIND, BI)
        scale, inverse = scale_of(tl.max(magnitude(value), axis=1))
        tl.store(values + row[:, None] * inner + column[None, :], to_fp8(value * inverse[:, None], ROUND), mask=both)
    else:
        largest = tl.zeros([BR], tl.int32)
        for start in range(0, inner, BI):
            value, _, _ = _forward_tile(h, row, there, weight, start, pitch, inner, KIND, BI)
            largest = tl.maximum(largest, tl.max(magnitude(value), axis=1))
        scale, inverse = scale_of(largest)
        for start in range(0, inner, BI):
            value, column, both = _forward_tile(h, row, there, weight, start, pitch, inner, KIND, BI)
            target = values + row[:, None] * inner + column[None, :]
            tl.store(target, to_fp8(value * inverse[:, None], ROUND), mask=both)
    tl.store(scales + row, scale, mask=there)


@triton.jit
def _backward_tile(
    dout, h, row, there, weight, start, dout_pitch, h_pitch, inner, KIND: tl.constexpr, BI: tl.constexpr
):
    """Gradients of gate and up, the output without its weight, its product with dout, and where they go."""
    column = start + tl.arange(0, BI)
    both = there[:, None] & (column < inner)[None, :]
    source = h + row[:, None] * h_pitch + column[None, :]
    gate = tl.load(source, mask=both, other=0.0).to(tl.float32)
    up = tl.load(source + inner, mask=both, other=0.0).to(tl.float32)
    gradient = tl.load(dout + row[:, None] * dout_pitch + column[None, :], mask=both, other=0.0).to(tl.float32)
    value, slope = _activate(gate, KIND)
    plain = value * up
    weighted = gradient * weight[:, None]
    return weighted * up * slope, weighted * value, plain, gradient * plain, column, both


@triton.jit
def _store_halves(target, dgate, dup, row, column, both, pitch, inner):
    place = target + row[:, None] * pitch + column[None, :]
    tl.store(place, dgate.to(target.dtype.element_ty), mask=both)
    tl.store(place + inner, dup.to(target.dtype.element_ty), mask=both)


@triton.jit
def _largest_of(dgate, dup):
    return tl.max(tl.maximum(magnitude(dgate), magnitude(dup)), axis=1)


@triton.jit
def _backward_kernel(
    dout,
    h,
    offsets,
    weights,
    order,
    dh,
    values,
    scales,
    out,
    dweights,
    L,
    h_pitch: tl.constexpr,
    dh_pitch: tl.constexpr,
    dout_pitch: tl.constexpr,
    out_pitch: tl.constexpr,
    inner: tl.constexpr,
    KIND: tl.constexpr,
    HELD: tl.constexpr,
    ROUND: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = row < tl.load(offsets + L - 1)
    copy = tl.load(order + row, mask=there, other=0)
    weight = tl.load(weights + copy, mask=there, other=0.0).to(tl.float32)
    if HELD:
        dgate, dup, plain, product, column, both = _backward_tile(
            dout, h, row, there, weight, 0, dout_pitch, h_pitch, inner, KIND, BI
        )
        target = row[:, None] * out_pitch + column[None, :]
        tl.store(out + target, (plain * weight[:, None]).to(out.dtype.element_ty), mask=both)
        dot = tl.sum(product, axis=1)
        _store_halves(dh, dgate, dup, row, column, both, dh_pitch, inner)
        scale, inverse = scale_of(_largest_of(dgate, dup))
        dgate, dup = to_fp8(dgate * inverse[:, None], ROUND), to_fp8(dup * inverse[:, None], ROUND)
        _store_halves(values, dgate, dup, row, column, both, 2 * inner, inner)
    else:
        dot = tl.zeros([BR], tl.float32)
        largest = tl.zeros([BR], tl.int32)
        for start in range(0, inner, BI):
            dgate, dup, plain, product, column, both = _backward_tile(
                dout, h, row, there, weight, start, dout_pitch, h_pitch, inner, KIND, BI
            )
            dot += tl.sum(product, axis=1)
            _store_halves(dh, dgate, dup, row, column, both, dh_pitch, inner)
            largest = tl.maximum(largest, _largest_of(dgate, dup))
        scale, inverse = scale_of(largest)
        for start in range(0, inner, BI):
            dgate, dup, plain, _, column, both = _backward_tile(
                dout, h, row, there, weight, start, dout_pitch, h_pitch, inner, KIND, BI
            )
            target = row[:, None] * out_pitch + column[None, :]
            # dout has been read for the last time, and `out` may lie in its place
            tl.store(out + target, (plain * weight[:, None]).to(out.dtype.element_ty), mask=both)
            dgate, dup = to_fp8(dgate * inverse[:, None], ROUND), to_fp8(dup * inverse[:, None], ROUND)
            _store_halves(values, dgate, dup, row, column, both, 2 * inner, inner)
    tl.store(scales + row, scale, mask=there)
    tl.store(dweights + copy, dot.to(dweights.dtype.element_ty), mask=there)
