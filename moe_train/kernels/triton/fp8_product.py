"""Rows of experts times their weights, both in FP8 with a scale per row: a persistent grouped GEMM for few rows.

torch's (CUTLASS) computes two times two tiles at once, so that an expert's rows are rounded up to 256 or 512, and its
columns too. Here a tile is alone: with a thousand rows for an expert, less is computed for nothing.

R rows, L experts, N columns, K what is summed over; BM x BN: a tile, BK of K at a time. Rows from `offsets[-1]` on are
left unwritten.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_train.kernels.choose import interpreted
from moe_train.kernels.fp8 import Fp8Rows

PLAN_BLOCK = 32


@dataclass(frozen=True)
class Tile:
    """What a program computes at a time, with how many warps. stages: of K, that are on their way from memory.
    per_processor: programs that run beside each other on one."""

    BM: int = 128
    BN: int = 256
    BK: int = 128
    num_warps: int = 8
    num_stages: int = 3
    per_processor: int = 1


def product(rows: Fp8Rows, weight: Fp8Rows, offsets_L: torch.Tensor, tile: Tile = Tile()) -> torch.Tensor:
    """See `kernels.fp8.grouped_product`."""
    (height, columns), (experts, size, _) = rows.values.shape, weight.values.shape
    out_RN = torch.empty(height, size, dtype=torch.bfloat16, device=rows.values.device)
    if not out_RN.numel():
        return out_RN
    # every expert may have one tile that is not full
    tiles = triton.cdiv(height, tile.BM) + experts
    table = torch.empty(1 + 2 * tiles, dtype=torch.int32, device=offsets_L.device)
    _plan_kernel[(triton.cdiv(tiles, PLAN_BLOCK),)](
        offsets_L, table, experts, tiles, BM=tile.BM, LP=triton.next_power_of_2(experts), B=PLAN_BLOCK
    )
    programs = tiles * triton.cdiv(size, tile.BN)
    if loop := not interpreted():
        programs = min(
            programs, torch.cuda.get_device_properties(out_RN.device).multi_processor_count * tile.per_processor
        )
    _product_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows.values, [tile.BM, tile.BK]),
        TensorDescriptor.from_tensor(weight.values.view(-1, columns), [tile.BN, tile.BK]),
        rows.scales,
        weight.scales,
        offsets_L,
        table,
        out_RN,
        size,
        columns,
        LOOP=loop,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_RN


@triton.jit
def _plan_kernel(offsets, table, L, tiles, BM: tl.constexpr, LP: tl.constexpr, B: tl.constexpr):
    """How many tiles of rows there are; then of each its expert and its first row."""
    lane = tl.arange(0, LP)
    end = tl.load(offsets + lane, mask=lane < L, other=0)
    begin = tl.load(offsets + lane - 1, mask=(lane > 0) & (lane < L), other=0)
    count = tl.where(lane < L, (end - begin + BM - 1) // BM, 0)
    last = tl.cumsum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(table, tl.sum(count, 0))
    tile = tl.program_id(0) * B + tl.arange(0, B)
    past = (last[None, :] <= tile[:, None]) & (lane < L)[None, :]
    expert = tl.sum(past.to(tl.int32), axis=1)
    before = tl.sum(tl.where(past, count[None, :], 0), axis=1)
    first = tl.sum(tl.where(lane[None, :] == expert[:, None], begin[None, :], 0), axis=1)
    there = (expert < L) & (tile < tiles)
    tl.store(table + 1 + 2 * tile, expert, mask=there)
    tl.store(table + 2 + 2 * tile, first + (tile - before) * BM, mask=there)


@triton.jit
def _product_kernel(
    a,
    b,
    a_scales,
    b_scales,
    offsets,
    table,
    out,
    N,
    K: tl.constexpr,
    LOOP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    count = tl.load(table) * tl.cdiv(N, BN)
    if LOOP:
        for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            _product_tile(a, b, a_scales, b_scales, offsets, table, out, tile, N, K, BM, BN, BK)
    elif tl.program_id(0) < count:
        _product_tile(a, b, a_scales, b_scales, offsets, table, out, tl.program_id(0), N, K, BM, BN, BK)


@triton.jit
def _product_tile(
    a,
    b,
    a_scales,
    b_scales,
    offsets,
    table,
    out,
    tile,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    wide = tl.cdiv(N, BN)
    place = table + 1 + 2 * (tile // wide)
    expert, first = tl.load(place), tl.load(place + 1)
    start = (tile % wide) * BN
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a.load([first, k]), b.load([expert * N + start, k]).T, total)
    row, column = first + tl.arange(0, BM), start + tl.arange(0, BN)
    # rows behind are the next expert's, columns behind the next expert's too: computed, and not written
    in_rows, in_columns = row < tl.load(offsets + expert), column < N
    total *= tl.load(a_scales + row, mask=in_rows, other=0.0)[:, None]
    total *= tl.load(b_scales + expert * N + column, mask=in_columns, other=0.0)[None, :]
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
