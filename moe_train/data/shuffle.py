"""Keyed hashes and permutations that are the same in every run, on every machine, with every numpy.

numpy's own generators may change their streams between versions (NEP 19), and a resumed run must not.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def hashed(values: np.ndarray, *key: int) -> np.ndarray:
    """splitmix64 of each value under a key of any number of integers; [n] -> [n] uint64, uniform over 0..2**64-1."""
    state = 0
    for part in key:
        state = _mix_int(state ^ (part & _MASK))
    mixed = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(state)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def permutation(num_items: int, *key: int) -> np.ndarray:
    """A permutation of 0..num_items-1, [num_items] int64, a function of the key alone."""
    return np.argsort(hashed(np.arange(num_items), *key), kind="stable")


def _mix_int(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
