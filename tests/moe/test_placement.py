"""assign_experts: contiguous, uneven, complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.moe import Placement, assign_experts


@given(experts=st.integers(0, 300), world=st.integers(1, 64))
def test_slices_are_contiguous_cover_all_and_differ_by_one(experts, world):
    slices = [assign_experts(experts, world, rank) for rank in range(world)]
    covered = [e for first, count in slices for e in range(first, first + count)]
    assert covered == list(range(experts))
    sizes = [count for _, count in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_256_experts_on_56_ranks():
    sizes = Placement(num_experts=256, world_size=56).experts_per_rank
    assert sizes == [5] * 32 + [4] * 24


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((8, 0, 0), "world_size"),
        ((8, 2, 2), "rank"),
        ((8, 2, -1), "rank"),
        ((-1, 2, 0), "num_experts"),
        ((8.0, 2, 0), "num_experts"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        assign_experts(*arguments)
