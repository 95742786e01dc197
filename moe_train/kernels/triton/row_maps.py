"""`reference/row_maps.py` by counting: how often in each block, how often in the blocks before, where each row goes.

No sort and no atomics: a row's rank among equal destinations of its block is counted by comparison with all of them.
R copies of tokens, D destinations, P blocks of B copies, BP x BD and BD: tiles. The last column counts padding.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.triton.host import cdiv, power_of_2

BLOCK = 64
SCANNED_BLOCKS, SCANNED_COLUMNS = 128, 4


def row_maps(destination_R: torch.Tensor, num_destinations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    total, device = destination_R.numel(), destination_R.device
    order = torch.empty(total, dtype=torch.int64, device=device)
    place = torch.empty(total, dtype=torch.int64, device=device)
    if not total:
        return order, place, torch.zeros(num_destinations, dtype=torch.int64, device=device)
    blocks, columns = cdiv(total, BLOCK), num_destinations + 1
    counts_PD = torch.zeros(blocks, columns, dtype=torch.int32, device=device)
    before_PD = torch.empty_like(counts_PD)
    totals_D = torch.empty(columns, dtype=torch.int64, device=device)
    _count_kernel[(blocks,)](destination_R, counts_PD, total, num_destinations, B=BLOCK)
    _scan_kernel[(cdiv(columns, SCANNED_COLUMNS),)](
        counts_PD,
        before_PD,
        totals_D,
        blocks,
        columns,
        STEPS=power_of_2(cdiv(blocks, SCANNED_BLOCKS)),
        BP=SCANNED_BLOCKS,
        BD=SCANNED_COLUMNS,
    )
    wide = power_of_2(columns)
    _place_kernel[(blocks,)](
        destination_R, before_PD, totals_D, order, place, total, num_destinations, B=BLOCK, BD=wide
    )
    return order, place, totals_D[:num_destinations]


@triton.jit
def _block_of(destination, total, D, B: tl.constexpr):
    """Copies of this block, which are inside, where they go, and which pairs go to the same place."""
    copy = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = copy < total
    goal = tl.load(destination + copy, mask=inside, other=0).to(tl.int32)
    goal = tl.where(inside, tl.where(goal < 0, D, goal), D + 1)
    return copy, inside, goal, goal[:, None] == goal[None, :]


@triton.jit
def _count_kernel(destination, counts, total, D, B: tl.constexpr):
    _, inside, goal, same = _block_of(destination, total, D, B)
    # copies that go to the same place write the same number
    target = tl.program_id(0).to(tl.int64) * (D + 1) + goal
    tl.store(counts + target, tl.sum(same.to(tl.int32), axis=1), mask=inside)


@triton.jit
def _scan_kernel(counts, before, totals, blocks, columns, STEPS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Down the columns: the counts of the blocks before each block, and of all."""
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    running = tl.zeros([BD], tl.int32)
    for step in range(STEPS):
        block = step * BP + tl.arange(0, BP)
        source = block.to(tl.int64)[:, None] * columns + column[None, :]
        there = (block < blocks)[:, None] & (column < columns)[None, :]
        count = tl.load(counts + source, mask=there, other=0)
        tl.store(before + source, running[None, :] + tl.cumsum(count, axis=0) - count, mask=there)
        running += tl.sum(count, axis=0)
    tl.store(totals + column, running.to(tl.int64), mask=column < columns)


@triton.jit
def _place_kernel(destination, before, totals, order, place, total, D, B: tl.constexpr, BD: tl.constexpr):
    copy, inside, goal, same = _block_of(destination, total, D, B)
    lane, column = tl.arange(0, B), tl.arange(0, BD)
    rank = tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    sizes = tl.load(totals + column, mask=column <= D, other=0).to(tl.int32)
    first = (
        tl.cumsum(sizes, axis=0)
        - sizes
        + tl.load(before + tl.program_id(0).to(tl.int64) * (D + 1) + column, mask=column <= D, other=0)
    )
    start = tl.gather(first, tl.minimum(goal, D), axis=0)
    position = (start + rank).to(tl.int64)
    tl.store(place + copy, tl.where(goal == D, -1, position), mask=inside)
    tl.store(order + position, copy, mask=inside)
