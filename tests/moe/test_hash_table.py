"""Hash routing tables: balanced, distinct, seeded; what may not route is refused."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import RoutingError
from moe_train.moe.hash_table import balanced_table, check_table

exact = settings(derandomize=True, deadline=None, max_examples=150)


def counts(entries: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(entries.flatten(), minlength=num_experts)


@st.composite
def sizes(draw) -> tuple[int, int, int]:
    """(vocabulary, experts, K), many of them with a last block that shares a divisor with the experts."""
    experts = draw(st.integers(1, 24))
    return draw(st.integers(1, 5 * experts)), experts, draw(st.integers(1, experts))


@given(sizes=sizes(), seed=st.integers(0, 2**32))
@exact
def test_a_table_is_distinct_per_id_and_balanced_per_column_and_over_all(sizes, seed):
    vocab, experts, top_k = sizes
    table = balanced_table(vocab, experts, top_k, seed)
    assert table.shape == (vocab, top_k)
    assert table.dtype == torch.int64
    check_table(table, vocab, experts, top_k)
    assert all(len(set(row)) == top_k for row in table.tolist())
    for part in [table, *table.unbind(1)]:
        found = counts(part, experts)
        assert found.max() - found.min() <= 1
    # each block of consecutive ids on its own, so that frequent and rare ids are shared out
    for block in table[: vocab - vocab % experts].view(-1, experts, top_k):
        assert all(counts(column, experts).tolist() == [1] * experts for column in block.unbind(1))


def test_every_size_of_the_last_block():
    for experts in range(1, 13):
        for top_k in range(1, experts + 1):
            for rest in range(1, experts + 1):
                table = balanced_table(rest, experts, top_k, 0)
                assert all(len(set(row)) == top_k for row in table.tolist()), (experts, top_k, rest)
                for part in [table, *table.unbind(1)]:
                    assert counts(part, experts).max() - counts(part, experts).min() <= 1, (experts, top_k, rest)


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    table = balanced_table(1000, 16, 4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.device("meta"):
        assert torch.equal(balanced_table(1000, 16, 4, seed=7), table)
    other = balanced_table(1000, 16, 4, seed=8)
    # two draws agree in one entry of 16
    assert (table == other).float().mean() < 0.1


def test_the_draw_stays_what_it_was():
    """A run that is started again, with another version of torch, routes the same ids to the same experts."""
    assert balanced_table(6, 4, 2, seed=0).tolist() == [[1, 3], [2, 1], [0, 2], [3, 0], [3, 0], [1, 2]]


def test_sets_of_experts_are_as_many_and_as_mixed_as_independent_draws():
    vocab, experts, top_k = 8192, 32, 4
    rows = balanced_table(vocab, experts, top_k, seed=0)
    distinct = len({frozenset(row) for row in rows.tolist()})
    # 8192 draws of C(32, 4) = 35,960 sets leave 35,960 * (1 - exp(-8192 / 35,960)) = 7,326 different ones
    assert 7_000 < distinct < 7_700
    onehot = torch.zeros(vocab, experts).scatter_(1, rows, 1.0)
    pairs = (onehot.T @ onehot)[~torch.eye(experts, dtype=torch.bool)]
    expected = vocab * top_k * (top_k - 1) / (experts * (experts - 1))
    assert (pairs.mean() - expected).abs() < 1e-3 * expected
    # Poisson: standard deviation sqrt(99) = 10 around a mean of 99
    assert (pairs - expected).abs().max() < 50
    # neighbours in the vocabulary share no more experts than two ids at random places of one ring do: 0.39
    shared = (onehot[1:] * onehot[:-1]).sum(dim=1).mean()
    assert abs(shared - top_k * (top_k - 1) / (experts - 1)) < 0.05


def test_a_large_vocabulary_takes_no_time():
    start = time.perf_counter()
    table = balanced_table(150_000, 256, 8, seed=0)
    check_table(table, 150_000, 256, 8)
    assert time.perf_counter() - start < 2
    assert counts(table, 256).max() - counts(table, 256).min() <= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 4, 2), r"vocab_size \(0\)"),
        ((8, 0, 1), r"num_experts \(0\)"),
        ((8, 4, 0), r"top_k \(0\)"),
        ((8, 4, 5), r"top_k \(5\).*experts \(4\)"),
        ((8.0, 4, 2), r"vocab_size \(8.0\)"),
    ],
)
def test_sizes_without_a_table_are_named(arguments, named):
    with pytest.raises(RoutingError, match=named):
        balanced_table(*arguments, seed=0)


def changed(table: torch.Tensor, row: int, column: int, entry: int) -> torch.Tensor:
    table = table.clone()
    table[row, column] = entry
    return table


TABLE = balanced_table(10, 4, 2, seed=0)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (TABLE.T, r"shape \[2, 10\] must be \[vocab_size \(10\), top_k \(2\)\]"),
        (TABLE[:9], r"shape \[9, 2\]"),
        (TABLE[:, :1], r"shape \[10, 1\]"),
        (TABLE.flatten(), r"shape \[20\]"),
        (TABLE.float(), r"dtype torch.float32 must be int64 or int32"),
        (TABLE.bool(), r"dtype torch.bool"),
        (changed(TABLE, 3, 1, 4), r"entry 4 of token id 3 must lie between 0 and 3"),
        (changed(TABLE, 9, 0, -1), r"entry -1 of token id 9 must lie between 0 and 3"),
    ],
)
def test_a_table_that_cannot_route_is_refused(table, sentence):
    with pytest.raises(RoutingError, match=sentence):
        check_table(table, 10, 4, 2)


def test_duplicates_and_int32_are_legal():
    check_table(torch.zeros(10, 2, dtype=torch.int64), 10, 4, 2)
    check_table(TABLE.int(), 10, 4, 2)
