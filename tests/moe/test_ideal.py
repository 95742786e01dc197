"""Even splits against a formula written per slot, and against an example worked out by hand."""

import pytest

from moe_train.moe.ideal import ideal_split
from moe_train.moe.placement import SlotPlan, assign_experts
from moe_train.moe.planner import plan_slots


def test_an_example():
    """3 ranks, the first for shared experts; 4 experts; 10 tokens with 2 choices each."""
    plan = SlotPlan(4, 3, 1)
    for rank in (1, 2):
        split = ideal_split(plan, rank, 10, 2)
        assert (split.to_rank, split.from_rank, split.to_slot) == ([10, 10, 10], [10, 10, 10], [5, 5, 5, 5])
        assert split.from_rank_to_slot == [[5, 5]] * 3
    assert ideal_split(plan, 0, 10, 2).from_rank_to_slot is None
    assert ideal_split(plan, 0, 10, 2).from_rank == [10, 10, 10]


def slot_lists(slots: int, shared: int, world: int, rank: int, choices: int, top_k: int):
    """(to rank, from rank, to slot, from rank to slot), with one division for each number."""
    to_slot = [choices // slots + (1 if slot < choices % slots else 0) for slot in range(slots)]
    to_rank = [choices // top_k // shared + (r < choices // top_k % shared) for r in range(shared)]
    for r in range(world - shared):
        first, count = assign_experts(slots, world - shared, r)
        to_rank.append(sum(to_slot[first : first + count]))
    mine = None
    if rank >= shared:
        first, count = assign_experts(slots, world - shared, rank - shared)
        mine = [to_slot[first : first + count] for _ in range(world)]
    return to_rank, [to_rank[rank]] * world, to_slot, mine


@pytest.mark.parametrize("world", range(1, 7))
def test_every_small_plan(world):
    for shared in range(world):
        for experts in (1, 3, 4, 8):
            for redundant in {0, (world - shared) * (world > 1 + shared), 1 * (world > 1 + shared)}:
                plan = plan_slots(experts, world, shared, min(redundant, experts * (world - shared - 1)))
                for rank in range(world):
                    for tokens, top_k in ((0, 1), (7, 1), (10, 3), (64, 2)):
                        split = ideal_split(plan, rank, tokens, top_k)
                        found = (split.to_rank, split.from_rank, split.to_slot, split.from_rank_to_slot)
                        slots = experts + plan.num_redundant
                        assert found == slot_lists(slots, shared, world, rank, tokens * top_k, top_k)
                        assert sum(split.to_rank) == tokens * (top_k + (shared > 0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, 10, 2), r"rank \(3\) must lie between 0 and 2"),
        ((-1, 10, 2), r"rank \(-1\)"),
        ((0, -1, 2), r"num_tokens \(-1\) must be an integer of at least 0"),
        ((0, 10, 0), r"top_k \(0\) must be an integer of at least 1"),
        ((0, 1.5, 2), r"num_tokens \(1.5\)"),
        ((0, 10, True), r"top_k \(True\)"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ideal_split(SlotPlan(4, 3, 1), *arguments)


def test_no_list_is_shared():
    split = ideal_split(SlotPlan(4, 2), 0, 8, 1)
    split.from_rank_to_slot[0][0] = 99
    assert split.from_rank_to_slot[1] == [2, 2]
    assert split.to_slot == [2, 2, 2, 2]
