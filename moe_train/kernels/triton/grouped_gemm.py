"""`reference/grouped_gemm.py` for Hopper: persistent, fed and emptied by TMA, one tile of an expert's rows at a time.

torch's (CUTLASS) computes two tiles at once, so that an expert's rows are rounded up to 256. Here they are rounded up
to 128, and while a tile is stored, in two halves, the next one is on its way from memory. Descriptors that end at an
expert's last row (`triton.tools.ragged_tma`) leave no branch and no mask: what is read beyond it is zero, what is
written there goes nowhere.

R rows, L experts, N columns, K what is summed over; BM x BN: a tile, BK of K at a time. Rows are multiples of 16 bytes.
Rows from `offsets[-1]` on are neither used nor written.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_train.kernels.choose import interpreted
from moe_train.kernels.grouped_gemm import HIGH, WIDE, empty_rows, table_size
from moe_train.kernels.triton.host import BILLION, cdiv, descriptor, power_of_2, ragged_descriptor

TABLE_BLOCK = 32
GROUP, LARGE = 8, 2**23
"""Tiles of rows that take each block of columns in turn, before the next block, when an expert's matrix has more than
so many elements: what the programs at work read at a time then fits into the cache. On an H200 that takes 4 % off the
products of mixtral, 15 % off the first; smaller matrices lose 3 % by it."""
INTERPRETED_PROGRAMS = 3
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
FAR = tl.constexpr(BILLION)
"""`ragged_tma` counts rows from here: the last row of an expert is the last one before it."""


@dataclass(frozen=True)
class Tile:
    """What a program computes at a time, with how many warps. stages: of K, that are on their way from memory.

    per_processor: programs that run there at once. The default was the fastest of eight for products of qwen3, olmoe
    and mixtral on an H200, within what a GPU at its power limit lets one tell (5 %).
    """

    BM: int = HIGH
    BN: int = WIDE
    BK: int = 64
    num_warps: int = 8
    num_stages: int = 3
    per_processor: int = 1


FP8_TILE = Tile(BK=128)
SMALL = Tile(BN=128, num_warps=4, per_processor=2)
"""One program ends a tile while the other multiplies."""
FEW_ROWS = 512
"""Gradients of experts with no more rows than that on average take `SMALL` (160 rows each: 0.51 and 0.97 ms in place of
0.66 and 1.12)."""
SLOWER = 1.1
"""At most, of `SMALL` where it computes as much. It is for products that would fill the second half of a block of
columns with nothing (360 columns: 0.34 ms in place of 0.40, a gradient 0.28 in place of 0.35)."""


def row_groups(rows_per_expert: torch.Tensor, num_rows: int, high: int = HIGH) -> tuple[torch.Tensor, torch.Tensor]:
    """`RowGroups` for tiles of so many rows, in one launch."""
    experts, device = len(rows_per_expert), rows_per_expert.device
    offsets_L = torch.empty(experts, dtype=torch.int32, device=device)
    table = torch.empty(table_size(num_rows, experts, high), dtype=torch.int32, device=device)
    tiles = len(table) // 3
    _groups_kernel[(cdiv(tiles, TABLE_BLOCK),)](
        rows_per_expert, offsets_L, table, experts, tiles, BM=high, LP=power_of_2(experts), B=TABLE_BLOCK
    )
    return offsets_L, table


def rows_by_weights(
    rows_RK: torch.Tensor,
    weight: torch.Tensor,
    table: torch.Tensor,
    across: bool,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See the reference.

    table: of `row_groups`, for tiles as high as this one. scales: of the rows [R] and of the columns [L, N], for both
    operands in FP8; the output is bf16 then.
    """
    height, inner = rows_RK.shape
    size = weight.shape[2] if across else weight.shape[1]
    tile = tile or (rows_tile(size) if scales is None else FP8_TILE)
    kind = rows_RK.dtype if scales is None else torch.bfloat16
    out_RN = empty_rows(height, size, rows_RK, kind)
    if not out_RN.numel():
        return out_RN
    tiles = len(table) // 3
    assert len(table) == table_size(height, len(weight), tile.BM), f"{tiles} tiles for {height} rows"
    # across, a block of K that reaches beyond an expert's matrix must not read the next one's: its own dimension
    matrices = (
        descriptor(weight, [1, tile.BK, tile.BN]) if across else descriptor(weight.view(-1, inner), [tile.BN, tile.BK])
    )
    row_scales, column_scales = scales or (None, None)
    _rows_kernel[(_programs(tiles * cdiv(size, tile.BN), out_RN.device, tile),)](
        descriptor(rows_RK, [tile.BM, tile.BK]),
        matrices,
        ragged_descriptor(out_RN, [tile.BM, tile.BN // 2], whole=True),
        row_scales,
        column_scales,
        table,
        size,
        K=inner,
        ACROSS=across,
        OUT=TYPES[kind],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        GROUP=_group(inner * size),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_RN


def weight_gradient(
    left_RM: torch.Tensor,
    right_RN: torch.Tensor,
    offsets_L: torch.Tensor,
    out_LMN: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See the reference. out_LMN: where to, if it is there already; columns of a larger one, say."""
    experts, rows, columns = len(offsets_L), left_RM.shape[1], right_RN.shape[1]
    if out_LMN is None:
        out_LMN = left_RM.new_empty(experts, rows, columns)
    if not out_LMN.numel():
        return out_LMN
    if not len(left_RM):
        return out_LMN.zero_()
    tile = tile or gradient_tile(len(left_RM) // experts, columns)
    tiles = experts * cdiv(rows, tile.BM) * cdiv(columns, tile.BN)
    _gradient_kernel[(_programs(tiles, out_LMN.device, tile),)](
        ragged_descriptor(left_RM, [tile.BK, tile.BM]),
        ragged_descriptor(right_RN, [tile.BK, tile.BN]),
        descriptor(out_LMN, [1, tile.BM, tile.BN // 2]),
        offsets_L,
        tiles,
        rows,
        columns,
        OUT=TYPES[out_LMN.dtype],
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        GROUP=_group(rows * columns),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_LMN


def gradient_tile(rows_per_expert: int, width: int) -> Tile:
    """For gradients of so many columns, over so many rows of each expert on average."""
    return SMALL if rows_per_expert <= FEW_ROWS else rows_tile(width)


def rows_tile(width: int) -> Tile:
    """For products of so many columns."""
    default, small = (cdiv(width, tile.BN) * tile.BN for tile in (Tile(), SMALL))
    return SMALL if small * SLOWER < default else Tile()


def _group(elements: int) -> int:
    return GROUP if elements > LARGE else 1


def _programs(tiles: int, device: torch.device, tile: Tile) -> int:
    """As many as run at once."""
    if interpreted():
        return min(tiles, INTERPRETED_PROGRAMS)
    return min(tiles, tile.per_processor * _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["L", "tiles"])
def _groups_kernel(counts, offsets, table, L, tiles, BM: tl.constexpr, LP: tl.constexpr, B: tl.constexpr):
    """Every program goes through all experts, and writes a block of the tiles."""
    lane = tl.arange(0, LP)
    rows = tl.load(counts + lane, mask=lane < L, other=0).to(tl.int32)
    end = tl.cumsum(rows, 0)
    begin = end - rows
    count = (rows + BM - 1) // BM
    last = tl.cumsum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(table, tl.sum(count, 0))
        tl.store(offsets + lane, end, mask=lane < L)
    tile = tl.program_id(0) * B + tl.arange(0, B)
    past = (last[None, :] <= tile[:, None]) & (lane < L)[None, :]
    expert = tl.sum(past.to(tl.int32), axis=1)
    here = lane[None, :] == expert[:, None]
    before = tl.sum(tl.where(past, count[None, :], 0), axis=1)
    there = (expert < L) & (tile < tiles)
    place = table + 1 + 3 * tile
    tl.store(place, expert, mask=there)
    tl.store(place + 1, tl.sum(tl.where(here, begin[None, :], 0), axis=1) + (tile - before) * BM, mask=there)
    tl.store(place + 2, tl.sum(tl.where(here, end[None, :], 0), axis=1), mask=there)


@triton.jit
def _halves(total, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(total, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def _in_groups(tile, high, wide, GROUP: tl.constexpr):
    """Row and column of a tile, when GROUP rows are gone through column by column."""
    if GROUP == 1:
        return tile // wide, tile % wide
    group = tile // (GROUP * wide)
    rest = tile % (GROUP * wide)
    size = tl.minimum(high - group * GROUP, GROUP)
    return group * GROUP + rest % size, rest // size


@triton.jit
def _rows_kernel(
    a, b, out, a_scales, b_scales, table, N,
    K: tl.constexpr, ACROSS: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    wide = tl.cdiv(N, BN)
    high = tl.load(table)
    for tile in tl.range(tl.program_id(0), high * wide, tl.num_programs(0), flatten=True):
        number, column_block = _in_groups(tile, high, wide, GROUP)
        place = table + 1 + 3 * number
        expert, first, end = tl.load(place), tl.load(place + 1), tl.load(place + 2)
        start = column_block * BN
        total = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = a.load([first, k])
            if ACROSS:
                total = tl.dot(x, tl.reshape(b.load([expert, k, start]), [BK, BN]), total)
            else:
                total = tl.dot(x, b.load([expert * N + start, k]).T, total)
        if a_scales is not None:
            row, column = first + tl.arange(0, BM), start + tl.arange(0, BN)
            total *= tl.load(a_scales + row, mask=row < end, other=0.0)[:, None]
            total *= tl.load(b_scales + expert * N + column, mask=column < N, other=0.0)[None, :]
        left, right = _halves(total, BM, BN)
        row = FAR - end + first
        out.store([FAR, end, row, start], tl.reshape(left.to(OUT), [1, 1, BM, BN // 2]))
        out.store([FAR, end, row, start + BN // 2], tl.reshape(right.to(OUT), [1, 1, BM, BN // 2]))


@triton.jit
def _gradient_kernel(
    a, b, out, offsets, tiles, M, N,
    OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All tiles of a program are one loop over their blocks of rows; an expert without rows has one, of zeros."""
    wide = tl.cdiv(N, BN)
    area = tl.cdiv(M, BM) * wide
    steps = 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        expert = tile // area
        size = tl.load(offsets + expert) - tl.load(offsets + expert - 1, mask=expert > 0, other=0)
        steps += tl.maximum(tl.cdiv(size, BK), 1)
    tile = tl.program_id(0) - tl.num_programs(0)
    step, blocks, expert, high, start, end, base = -1, 0, 0, 0, 0, 0, 0
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, steps):
        step = tl.where(step == blocks - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            expert = tile // area
            high, start = _in_groups(tile % area, tl.cdiv(M, BM), wide, GROUP)
            high *= BM
            start *= BN
            end = tl.load(offsets + expert)
            size = end - tl.load(offsets + expert - 1, mask=expert > 0, other=0)
            base = FAR - size
            blocks = tl.maximum(tl.cdiv(size, BK), 1)
        x = tl.reshape(a.load([FAR, end, base + step * BK, high]), [BK, BM])
        y = tl.reshape(b.load([FAR, end, base + step * BK, start]), [BK, BN])
        total = tl.dot(x.T, y, total)
        if step == blocks - 1:
            left, right = _halves(total, BM, BN)
            out.store([expert, high, start], tl.reshape(left.to(OUT), [1, BM, BN // 2]))
            out.store([expert, high, start + BN // 2], tl.reshape(right.to(OUT), [1, BM, BN // 2]))
            total = tl.zeros([BM, BN], tl.float32)
