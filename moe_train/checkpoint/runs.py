"""Where the elements of a part lie in the flattened logical tensor, as runs of neighbours. Arithmetic: nothing is read.

A part's elements are in the order of the logical tensor, so two parts of one tensor overlap in runs that ascend on
both sides: what is asked for is copied run by run from what is stored, however either of them was cut.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.parallel.tensor_slice import TensorSlice


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two parts have in common: `length` elements each, from `ours` on in one and from `theirs` on in the other.

    int64 arrays, both ascending.
    """

    ours: np.ndarray
    theirs: np.ndarray
    length: np.ndarray

    def strided(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """The same as few blocks: (ours, theirs, length, step of ours, step of theirs, how many)."""
        count = len(self.length)
        if count == 1:
            yield int(self.ours[0]), int(self.theirs[0]), int(self.length[0]), 0, 0, 1
            return
        steps = np.stack([np.diff(self.ours), np.diff(self.theirs), np.diff(self.length)])
        breaks = np.flatnonzero((steps[:, 1:] != steps[:, :-1]).any(axis=0)) + 1
        first = 0
        while first < count:
            last = first
            if first < count - 1 and not steps[2, first]:
                after = np.searchsorted(breaks, first, side="right")
                last = int(breaks[after]) if after < len(breaks) else count - 1
            ours, theirs = (int(steps[side, first]) if last > first else 0 for side in (0, 1))
            start = int(self.ours[first]), int(self.theirs[first]), int(self.length[first])
            yield *start, ours, theirs, last - first + 1
            first = last + 1


class Runs:
    """A part of a logical tensor of this shape; None: the whole."""

    def __init__(self, shape: Sequence[int], part: TensorSlice | None):
        self.total = math.prod(shape)
        view = part.view_shape if part else (self.total,)
        self._box = part.box if part else ((0, self.total),)
        self._strides = [math.prod(view[dim + 1 :]) for dim in range(len(view))]
        self._sizes = [stop - start for start, stop in self._box]
        self._inner = [math.prod(self._sizes[dim + 1 :]) for dim in range(len(view))]
        self.numel = math.prod(self._sizes)
        cut = len(view) - 1  # the last dimension that is not whole: a run has some of it and all behind it
        while cut and self._sizes[cut] == view[cut]:
            cut -= 1
        self._cut, self._run = cut, max(self._sizes[cut] * self._inner[cut], 1)

    def place(self, index: int) -> int:
        """Logical index of one element."""
        number, place = divmod(index, self._run)
        place += self._box[self._cut][0] * self._strides[self._cut]
        for dim in reversed(range(self._cut)):
            number, at = divmod(number, self._sizes[dim])
            place += (at + self._box[dim][0]) * self._strides[dim]
        return place

    def below(self, index: int) -> int:
        """How many elements lie before a logical index."""
        if index >= self.total:
            return self.numel
        count = 0
        for (start, stop), stride, inner in zip(self._box, self._strides, self._inner, strict=True):
            at, index = divmod(index, stride)
            count += min(max(at - start, 0), stop - start) * inner
            if not start <= at < stop:
                break
        return count

    def _starts(self, numbers: np.ndarray) -> np.ndarray:
        """Logical index at which the runs of these numbers start."""
        starts = np.full(len(numbers), self._box[self._cut][0] * self._strides[self._cut], dtype=np.int64)
        for dim in reversed(range(self._cut)):
            numbers, at = np.divmod(numbers, self._sizes[dim])
            starts += (at + self._box[dim][0]) * self._strides[dim]
        return starts

    def _between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The runs of elements start to stop: (logical index, element, length)."""
        first, last = start // self._run, (stop - 1) // self._run
        numbers = np.arange(first, last + 1, dtype=np.int64)
        elements = numbers * self._run
        ends = np.minimum(elements + self._run, stop)
        logical = self._starts(numbers)
        skipped = start - first * self._run
        logical[0] += skipped
        elements[0] += skipped
        return logical, elements, ends - elements

    def overlap(self, start: int, stop: int, other: "Runs", other_start: int, other_stop: int) -> Overlap | None:
        """Elements start to stop that are among elements other_start to other_stop of another part."""
        mine, elements, lengths = self._between(start, stop)
        other_start = max(other_start, other.below(int(mine[0])))
        other_stop = min(other_stop, other.below(int(mine[-1] + lengths[-1])))
        if other_start >= other_stop:
            return None
        theirs, other_elements, other_lengths = other._between(other_start, other_stop)
        ends, other_ends = mine + lengths, theirs + other_lengths
        from_ = np.searchsorted(other_ends, mine, side="right")
        counts = np.searchsorted(theirs, ends, side="left") - from_
        ours = np.repeat(np.arange(len(mine)), counts)
        if not len(ours):
            return None
        skipped = np.cumsum(counts) - counts
        others = np.arange(len(ours)) + np.repeat(from_ - skipped, counts)
        low = np.maximum(mine[ours], theirs[others])
        return Overlap(
            ours=elements[ours] + low - mine[ours],
            theirs=other_elements[others] + low - theirs[others],
            length=np.minimum(ends[ours], other_ends[others]) - low,
        )
