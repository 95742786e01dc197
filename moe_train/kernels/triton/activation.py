"""`reference/activation.py`: one pass forward, one pass backward, which also gives the output again and <dA, A>.

R rows, I expert intermediate size; BR x BI: a tile. Rows beyond `offsets[-1]` are left unwritten: nobody reads them.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.grouped_gemm import empty_rows
from moe_train.kernels.triton.host import cdiv, power_of_2

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
TILE_ELEMENTS, TILE_COLUMNS = 1024, 256


def forward(
    h_R2I: torch.Tensor, offsets_L: torch.Tensor, weights_C: torch.Tensor, order_R: torch.Tensor, name: str
) -> torch.Tensor:
    """See the reference."""
    rows, inner = h_R2I.shape[0], h_R2I.shape[1] // 2
    out_RI = empty_rows(rows, inner, h_R2I)
    if out_RI.numel():
        tile = _tile(inner)
        _forward_kernel[(cdiv(rows, tile["BR"]), cdiv(inner, tile["BI"]))](
            h_R2I,
            offsets_L,
            weights_C,
            order_R,
            out_RI,
            len(offsets_L),
            h_R2I.stride(0),
            out_RI.stride(0),
            inner,
            KIND=KINDS[name],
            **tile,
        )
    return out_RI


def backward(
    dout_RI: torch.Tensor,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_C: torch.Tensor,
    order_R: torch.Tensor,
    name: str,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    rows, inner = dout_RI.shape
    dh_R2I, out_RI = empty_rows(*h_R2I.shape, h_R2I), dout_RI if in_place else empty_rows(rows, inner, dout_RI)
    dweights_C = torch.zeros_like(weights_C)
    if out_RI.numel():
        tile = _tile(inner)
        _backward_kernel[(cdiv(rows, tile["BR"]),)](
            dout_RI,
            h_R2I,
            offsets_L,
            weights_C,
            order_R,
            dh_R2I,
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
    return dh_R2I, out_RI, dweights_C


def _tile(inner: int) -> dict[str, int]:
    columns = min(TILE_COLUMNS, power_of_2(inner))
    return {"BR": TILE_ELEMENTS // columns, "BI": columns}


@triton.jit
def _activate(gate, KIND: tl.constexpr):
    """act(gate) and its slope."""
    if KIND == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value, slope = gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif KIND == 1:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value, slope = gate * cdf, cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif KIND == 2:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        cdf = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
        rise = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        value, slope = gate * cdf, cdf + gate * 2.0 * cdf * (1.0 - cdf) * rise
    elif KIND == 3:
        value, slope = tl.maximum(gate, 0.0), tl.where(gate > 0.0, 1.0, 0.0)
    else:
        positive = tl.maximum(gate, 0.0)
        value, slope = positive * positive, 2.0 * positive
    return value, slope


@triton.jit
def _forward_kernel(
    h,
    offsets,
    weights,
    order,
    out,
    L,
    h_pitch: tl.constexpr,
    pitch: tl.constexpr,
    inner: tl.constexpr,
    KIND: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BI + tl.arange(0, BI)
    there = row < tl.load(offsets + L - 1)
    both = there[:, None] & (column < inner)[None, :]
    source = h + row[:, None] * h_pitch + column[None, :]
    gate = tl.load(source, mask=both, other=0.0).to(tl.float32)
    up = tl.load(source + inner, mask=both, other=0.0).to(tl.float32)
    value, _ = _activate(gate, KIND)
    copy = tl.load(order + row, mask=there, other=0)
    value *= up
    value *= tl.load(weights + copy, mask=there, other=0.0).to(tl.float32)[:, None]
    whole = there[:, None] & (column < pitch)[None, :]
    tl.store(out + row[:, None] * pitch + column[None, :], value.to(out.dtype.element_ty), mask=whole)


@triton.jit
def _backward_kernel(
    dout,
    h,
    offsets,
    weights,
    order,
    dh,
    out,
    dweights,
    L,
    h_pitch: tl.constexpr,
    dh_pitch: tl.constexpr,
    dout_pitch: tl.constexpr,
    pitch: tl.constexpr,
    inner: tl.constexpr,
    KIND: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = row < tl.load(offsets + L - 1)
    copy = tl.load(order + row, mask=there, other=0)
    weight = tl.load(weights + copy, mask=there, other=0.0).to(tl.float32)
    dot = tl.zeros([BR, BI], tl.float32)
    for start in range(0, inner, BI):
        column = start + tl.arange(0, BI)
        both = there[:, None] & (column < inner)[None, :]
        source = h + row[:, None] * h_pitch + column[None, :]
        gate = tl.load(source, mask=both, other=0.0).to(tl.float32)
        up = tl.load(source + inner, mask=both, other=0.0).to(tl.float32)
        gradient = tl.load(dout + row[:, None] * dout_pitch + column[None, :], mask=both, other=0.0).to(tl.float32)
        value, slope = _activate(gate, KIND)
        plain = value * up
        dot += gradient * plain
        weighted = gradient * weight[:, None]
        in_out = there[:, None] & (column < pitch)[None, :]
        in_dh = there[:, None] & (column < dh_pitch - inner)[None, :]
        target = out + row[:, None] * pitch + column[None, :]
        tl.store(target, (plain * weight[:, None]).to(out.dtype.element_ty), mask=in_out)
        target = dh + row[:, None] * dh_pitch + column[None, :]
        tl.store(target, (weighted * up * slope).to(dh.dtype.element_ty), mask=both)
        tl.store(target + inner, (weighted * value).to(dh.dtype.element_ty), mask=in_dh)
    tl.store(dweights + copy, tl.sum(dot, axis=1).to(dweights.dtype.element_ty), mask=there)
