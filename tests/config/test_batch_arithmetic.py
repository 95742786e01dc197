"""Accumulation against brute force, and the advice given with a refusal."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config import accumulation_steps
from moe_train.config.schema import BatchSection
from moe_train.errors import ConfigError

sizes = st.integers(1, 60)
ranks = st.integers(1, 8)


def brute_force(global_size: int, micro_size: int, data_parallel: int) -> int | None:
    """The number of micro-batches that adds up to the global batch, if there is one."""
    return next((n for n in range(1, global_size + 1) if n * micro_size * data_parallel == global_size), None)


@settings(deadline=None)  # brute force takes its time
@given(sizes, sizes, ranks)
def test_equals_brute_force(global_size, micro_size, data_parallel):
    expected = brute_force(global_size, micro_size, data_parallel)
    batch = BatchSection(global_size=global_size, micro_size=micro_size)
    if expected is not None:
        assert accumulation_steps(batch, data_parallel) == expected
        return
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(batch, data_parallel)
    check_advice(str(caught.value), global_size, micro_size, data_parallel)


def check_advice(message: str, global_size: int, micro_size: int, data_parallel: int) -> None:
    """Every number offered is legal, and no legal one is left out."""
    advice = message.partition("set batch.global_size to ")[2]
    offered, _, micro = advice.partition(", or batch.micro_size to one of ")
    neighbours = [int(n) for n in re.findall(r"\d+", offered)]
    legal = [
        g for g in range(1, global_size + micro_size * data_parallel + 1) if brute_force(g, micro_size, data_parallel)
    ]
    expected = [g for g in legal if g < global_size][-1:] + [g for g in legal if g > global_size][:1]
    assert neighbours == expected
    sizes = [int(n) for n in re.findall(r"\d+", micro)]
    assert sizes == [m for m in range(1, global_size + 1) if brute_force(global_size, m, data_parallel)]


def test_message_names_both_keys_and_the_ranks():
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(BatchSection(global_size=12, micro_size=4), 2)
    assert str(caught.value) == (
        "batch.global_size (12) must be a multiple of batch.micro_size (4) x data-parallel ranks (2) = 8: "
        "set batch.global_size to 8 or 16, or batch.micro_size to one of [1, 2, 3, 6]"
    )
