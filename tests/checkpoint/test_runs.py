"""Runs of a part against the part itself, taken from a tensor that holds its own indices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.checkpoint.runs import Overlap, Runs
from moe_train.parallel.tensor_slice import TensorSlice


def indices(shape: tuple[int, ...], part: TensorSlice | None) -> np.ndarray:
    """Logical index of each element of a part, in its order."""
    whole = torch.arange(math.prod(shape)).view(shape)
    return (whole if part is None else part.take(whole)).reshape(-1).numpy()


@st.composite
def shapes(draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))


@st.composite
def parts(draw, shape: tuple[int, ...]) -> TensorSlice | None:
    """Any box, of the shape itself or of one whose rows are split up; now and then the whole."""
    if draw(st.integers(0, 4)) == 0:
        return None
    blocks = draw(st.sampled_from([d for d in range(1, shape[0] + 1) if shape[0] % d == 0]))
    view = shape if blocks == 1 else (blocks, shape[0] // blocks, *shape[1:])
    box = []
    for size in view:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return TensorSlice(view, tuple(box))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_places_and_counts(data):
    shape = data.draw(shapes())
    part = data.draw(parts(shape))
    expected, runs = indices(shape, part), Runs(shape, part)
    assert runs.numel == len(expected)
    assert [runs.place(index) for index in range(len(expected))] == expected.tolist()
    total = math.prod(shape)
    assert [runs.below(at) for at in range(total + 2)] == [int((expected < at).sum()) for at in range(total + 2)]


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_overlaps(data):
    """Every common element is named once, at its place in both."""
    shape = data.draw(shapes())
    mine, theirs = data.draw(parts(shape)), data.draw(parts(shape))
    my_indices, their_indices = indices(shape, mine), indices(shape, theirs)
    start = data.draw(st.integers(0, len(my_indices) - 1))
    stop = data.draw(st.integers(start + 1, len(my_indices)))
    their_start = data.draw(st.integers(0, len(their_indices) - 1))
    their_stop = data.draw(st.integers(their_start + 1, len(their_indices)))
    found = Runs(shape, mine).overlap(start, stop, Runs(shape, theirs), their_start, their_stop)
    common = np.intersect1d(my_indices[start:stop], their_indices[their_start:their_stop])
    if found is None:
        assert not len(common)
        return
    ours = np.concatenate([np.arange(a, a + n) for a, n in zip(found.ours, found.length, strict=True)])
    others = np.concatenate([np.arange(a, a + n) for a, n in zip(found.theirs, found.length, strict=True)])
    assert (my_indices[ours] == common).all()
    assert (their_indices[others] == common).all()
    assert ours.min() >= start
    assert ours.max() < stop
    assert others.min() >= their_start
    assert others.max() < their_stop


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)), min_size=1),
)
def test_blocks_say_the_same_as_their_runs(steps):
    """Any ascending runs, many of them alike in a row."""
    ours = theirs = 0
    runs = []
    for gap, their_gap, length, repeats in steps:
        for _ in range(repeats):
            runs.append((ours, theirs, length))
            ours, theirs = ours + length + gap, theirs + length + their_gap
    mine, theirs_, lengths = (np.array(column) for column in zip(*runs, strict=True))
    overlap = Overlap(ours=mine, theirs=theirs_, length=lengths)
    unrolled = [
        (a + i * step, b + i * their_step, n)
        for a, b, n, step, their_step, count in overlap.strided()
        for i in range(count)
    ]
    assert unrolled == runs


@pytest.mark.parametrize("columns", [2, 3])
def test_equal_rows_are_one_block(columns):
    """A copy of thousands of rows must not be thousands of copies."""
    shape = (3000, 6)
    whole = Runs(shape, None)
    width = 6 // columns
    part = Runs(shape, TensorSlice.columns(shape, width, 2 * width))
    found = part.overlap(1, part.numel - 1, whole, 0, whole.numel)
    assert found is not None
    assert len(found.length) == 3000
    assert len(list(found.strided())) == 3, "the first row, the last row and all rows between"
