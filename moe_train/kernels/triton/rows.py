"""`reference/rows.py`: every program owns a tile of its output, so nothing is added by atomics.

T tokens, C copies per token, R rows, H hidden size; BR x BH: a tile. Row numbers times H are 64-bit.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.triton import quantise
from moe_train.kernels.triton.host import cdiv, dense_rows, power_of_2

TILE_ELEMENTS, TILE_COLUMNS, WARPS = 2048, 512, 4


def spread(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, aligned: bool = False) -> torch.Tensor:
    """See the reference. A token is read once and written for each copy, which a gather would read as often."""
    rows_RH, _ = quantise.spread(x_TH, place_TC, num_rows, plain=True, fp8=False, aligned=aligned)
    assert rows_RH is not None
    return rows_RH


def gather_sum(rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor | None) -> torch.Tensor:
    """See the reference."""
    (tokens, copies), hidden = place_TC.shape, rows_RH.shape[1]
    y_TH = torch.empty(tokens, hidden, dtype=rows_RH.dtype, device=rows_RH.device)
    if y_TH.numel():
        weights = None if weights_TC is None else weights_TC.contiguous()
        tile = _tile(hidden)
        grid = (cdiv(tokens, tile["BR"]), cdiv(hidden, tile["BH"]))
        rows_RH = dense_rows(rows_RH)
        _gather_sum_kernel[grid](rows_RH, place_TC, weights, y_TH, tokens, rows_RH.stride(0), hidden, C=copies, **tile)
    return y_TH


def weighted_sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference."""
    (tokens, copies), hidden = place_TC.shape, rows_RH.shape[1]
    # new_empty: what is like a transposed matrix is transposed too
    drows_RH, dweights_TC = rows_RH.new_empty(rows_RH.shape), weights_TC.new_empty(weights_TC.shape)
    if dweights_TC.numel():
        tile = _tile(hidden)
        _weighted_sum_backward_kernel[(cdiv(tokens, tile["BR"]), copies)](
            dy_TH.contiguous(),
            rows_RH.contiguous(),
            place_TC,
            weights_TC.contiguous(),
            drows_RH,
            dweights_TC,
            tokens,
            hidden,
            C=copies,
            **tile,
        )
    return drows_RH, dweights_TC


def _tile(hidden: int) -> dict[str, int]:
    columns = min(TILE_COLUMNS, power_of_2(hidden))
    return {"BR": TILE_ELEMENTS // columns, "BH": columns, "num_warps": WARPS}


@triton.jit
def _gather_sum_kernel(
    rows,
    place,
    weights,
    y,
    tokens,
    pitch: tl.constexpr,
    hidden: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = token < tokens
    in_row = (column < hidden)[None, :]
    total = tl.zeros([BR, BH], tl.float32)
    for c in tl.static_range(C):  # unrolled, so that all copies are on their way at once
        row = tl.load(place + token * C + c, mask=inside, other=-1)
        there = (row >= 0)[:, None] & in_row
        value = tl.load(rows + row[:, None] * pitch + column[None, :], mask=there, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * C + c, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += tl.where(there, value, 0.0)
    tl.store(y + token[:, None] * hidden + column[None, :], total.to(y.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit
def _weighted_sum_backward_kernel(
    dy,
    rows,
    place,
    weights,
    drows,
    dweights,
    tokens,
    hidden: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = token < tokens
    copy = token * C + tl.program_id(1)
    row = tl.load(place + copy, mask=inside, other=-1)
    there = row >= 0
    weight = tl.load(weights + copy, mask=inside, other=0.0).to(tl.float32)
    dot = tl.zeros([BR, BH], tl.float32)
    for start in range(0, hidden, BH):
        column = start + tl.arange(0, BH)
        both = there[:, None] & (column < hidden)[None, :]
        gradient = tl.load(dy + token[:, None] * hidden + column[None, :], mask=both, other=0.0).to(tl.float32)
        target = row[:, None] * hidden + column[None, :]
        dot += gradient * tl.load(rows + target, mask=both, other=0.0).to(tl.float32)
        tl.store(drows + target, (gradient * weight[:, None]).to(drows.dtype.element_ty), mask=both)
    tl.store(dweights + copy, tl.sum(dot, axis=1).to(dweights.dtype.element_ty), mask=inside)
