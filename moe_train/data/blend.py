"""Several data sets -> one endless stream, each used in proportion to its weight at every moment.

The choice is a periodic pattern. With the weights as fractions of a common denominator B, the pattern has B places,
data set d owns exactly weight_d * B of them, and they are spread so that after any number n of samples it was used
within 1 of n * weight_d (Megatron's greedy choice keeps no such bound for many sets). Sample i then needs one division:
no table grows with i, and i = 10**9 costs as much as i = 0.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from moe_train.data.sampler import PackedDataset

MAX_PERIOD = 1 << 16
"""Weights that need a longer pattern are rounded to multiples of 1 / MAX_PERIOD."""


class BlendedDataset:
    """`datasets` by `weights` (any positive numbers). Sample i is a function of the members and i alone.

    `weights` afterwards holds the shares in use, summing to 1.
    """

    def __init__(self, datasets: Sequence[PackedDataset], weights: Sequence[float]):
        assert len(datasets) == len(weights) > 0
        assert len({dataset.sequence_length for dataset in datasets}) == 1
        self.datasets = tuple(datasets)
        self.sequence_length = datasets[0].sequence_length
        self.vocab_size = datasets[0].vocab_size
        self._shares = pattern_shares(weights)
        self._pattern = spread(self._shares)
        self._rank = _rank_within(self._pattern, len(datasets))
        period = len(self._pattern)
        self.weights = tuple(share / period for share in self._shares)
        members = " ".join(f"{dataset.identity}:{share}" for dataset, share in zip(datasets, self._shares, strict=True))
        self.identity = hashlib.sha256(members.encode()).hexdigest()[:16]

    @property
    def num_samples(self) -> int:
        """Samples before some member begins to repeat itself."""
        period = len(self._pattern)
        return min(d.num_samples * period // share for d, share in zip(self.datasets, self._shares, strict=True))

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the data set, index inside it) of sample `index`."""
        assert index >= 0, index
        cycle, place = divmod(index, len(self._pattern))
        which = int(self._pattern[place])
        return which, cycle * self._shares[which] + int(self._rank[place])

    def sample(self, index: int) -> np.ndarray:
        """Tokens of sample `index`, [sequence_length + 1] int64: inputs are [:-1], labels [1:]."""
        which, inside = self.locate(index)
        return self.datasets[which].sample(inside)

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start..start+count-1, [count, sequence_length + 1] int64. `start` is all the state there is."""
        out = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row in range(count):
            out[row] = self.sample(start + row)
        return out


def pattern_shares(weights: Sequence[float]) -> list[int]:
    """Places of each data set in the pattern; their sum is its length. Exact where MAX_PERIOD places suffice.

    Every data set keeps at least one place.
    """
    # through repr, so that 0.7 is seven tenths as it was written and not the nearest binary fraction
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    exact = [weight / total for weight in exact]
    period = lcm(*(weight.denominator for weight in exact))
    if period <= MAX_PERIOD:
        return [int(weight * period) for weight in exact]
    return [max(1, round(weight * MAX_PERIOD)) for weight in exact]


def spread(shares: Sequence[int]) -> np.ndarray:
    """Which data set has each place, [sum(shares)] int32.

    Use j of data set d may not come before place floor(j / w) nor after ceil((j + 1) / w) - 1, where w is its weight;
    that is what "within 1" means. Earliest deadline first meets all of these windows, because the fractional schedule
    does and the uses are of unit length.
    """
    period = sum(shares)
    used = [0] * len(shares)
    pattern = np.empty(period, dtype=np.int32)
    for place in range(period):
        ready = [d for d, share in enumerate(shares) if used[d] * period < (place + 1) * share]
        chosen = min(ready, key=lambda d: -(-(used[d] + 1) * period // shares[d]))
        pattern[place] = chosen
        used[chosen] += 1
    return pattern


def _rank_within(pattern: np.ndarray, num_datasets: int) -> np.ndarray:
    """How many earlier places of the pattern have the same data set, [period] int64."""
    rank = np.empty(len(pattern), dtype=np.int64)
    for which in range(num_datasets):
        places = np.flatnonzero(pattern == which)
        rank[places] = np.arange(len(places))
    return rank
