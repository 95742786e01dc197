"""`reference/row_maps.py` by counting: how often in each block, where each block's rows start, where each row goes.

No sort and no atomics: a row's rank among equal destinations of its block is counted by comparison with all of them.
R copies of tokens, D destinations and one more behind them for padding, P blocks of B copies.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


def row_maps(destination_R: torch.Tensor, num_destinations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    total, device = destination_R.numel(), destination_R.device
    order = torch.empty(total, dtype=torch.int64, device=device)
    place = torch.empty(total, dtype=torch.int64, device=device)
    blocks = triton.cdiv(total, BLOCK)
    counts_DP = torch.zeros(num_destinations + 1, blocks, dtype=torch.int32, device=device)
    if not total:
        return order, place, torch.zeros(num_destinations, dtype=torch.int64, device=device)
    _count_kernel[(blocks,)](destination_R, counts_DP, total, num_destinations, B=BLOCK)
    ends_DP = counts_DP.view(-1).cumsum(0)
    _place_kernel[(blocks,)](destination_R, counts_DP, ends_DP, order, place, total, num_destinations, B=BLOCK)
    return order, place, counts_DP[:num_destinations].sum(dim=1)


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
    target = goal.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + target, tl.sum(same.to(tl.int32), axis=1), mask=inside)


@triton.jit
def _place_kernel(destination, counts, ends, order, place, total, D, B: tl.constexpr):
    copy, inside, goal, same = _block_of(destination, total, D, B)
    lane = tl.arange(0, B)
    rank = tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    source = goal.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(ends + source, mask=inside, other=0) - tl.load(counts + source, mask=inside, other=0)
    position = start + rank
    tl.store(place + copy, tl.where(goal == D, -1, position), mask=inside)
    tl.store(order + position, copy, mask=inside)
