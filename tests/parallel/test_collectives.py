"""Collectives and their adjoints against the same thing done by hand on one process."""

import pytest
import torch

from moe_train.errors import DataError
from moe_train.parallel import (
    ParallelGroup,
    Topology,
    all_to_all_rows,
    build_groups,
    copy_to,
    even_counts,
    exchange_numbers,
    finish_reduce,
    gather_rows,
    gather_rows_partial,
    raise_together,
    reduce_partial,
    scatter_rows,
    slice_rows,
    start_reduce,
)
from moe_train.testing import run_distributed

SPLITS = [[2, 0, 3], [1, 4, 0], [0, 0, 2]]  # row r: what rank r sends to each rank


def rows_of(rank: int) -> torch.Tensor:
    count = sum(SPLITS[rank])
    return torch.arange(count * 2, dtype=torch.float64).view(count, 2) + 100 * rank


def exchange(rank: int):
    group = build_groups(Topology(world=3, expert=3)).expert
    x = rows_of(rank).requires_grad_()
    received = all_to_all_rows(x, group, [SPLITS[source][rank] for source in range(3)], SPLITS[rank])
    weight = torch.arange(received.numel(), dtype=torch.float64).view_as(received) + 1000 * rank
    (received * weight).sum().backward()
    return received.detach(), x.grad


def test_rows_arrive_in_source_order_and_gradients_go_back():
    results = run_distributed(exchange, 3)
    for rank, (received, _) in enumerate(results):
        expected = [rows_of(source).split(SPLITS[source])[rank] for source in range(3)]
        assert torch.equal(received, torch.cat(expected))
    for rank, (_, grad) in enumerate(results):
        parts = []
        for target in range(3):
            counts = [SPLITS[source][target] for source in range(3)]
            weight = torch.arange(sum(counts) * 2, dtype=torch.float64).view(-1, 2) + 1000 * target
            parts.append(weight.split(counts)[rank])
        assert torch.equal(grad, torch.cat(parts))


def numbers(rank: int):
    group = build_groups(Topology(world=3, expert=3)).expert
    return exchange_numbers(torch.arange(6).view(2, 3).t() + 10 * rank, group)  # rows that do not lie in order


def test_each_rank_gets_its_row_of_every_other():
    for rank, found in enumerate(run_distributed(numbers, 3)):
        assert found.tolist() == [[rank, 3 + rank], [10 + rank, 13 + rank], [20 + rank, 23 + rank]]


def bad_splits(rank: int):
    group = build_groups(Topology(world=2, expert=2)).expert
    with pytest.raises(ValueError, match="do not add up to the 3 rows"):
        all_to_all_rows(torch.zeros(3, 1), group, [1, 1], [1, 1])
    with pytest.raises(ValueError, match="must name 2 ranks"):
        all_to_all_rows(torch.zeros(3, 1), group, [3], [3])
    return True


def test_wrong_split_sizes_are_refused_before_anything_is_sent():
    assert run_distributed(bad_splits, 2) == [True, True]


def test_one_rank_issues_no_collective():
    x = torch.ones(3, 2)
    assert all_to_all_rows(x, ParallelGroup.single(), [3], [3]) is x  # no process group exists here
    assert exchange_numbers(x, ParallelGroup.single()) is x


def fail_on_rank_one(rank: int):
    group = build_groups(Topology(world=2, expert=2)).world
    try:
        raise_together(group, DataError("the corpus is empty") if rank == 1 else None)
    except DataError as error:
        return str(error)


def test_an_error_on_one_rank_is_raised_on_all():
    assert run_distributed(fail_on_rank_one, 2) == ["rank 1: the corpus is empty", "the corpus is empty"]


COUNTS = [3, 0, 2]


def block(rank: int, rows: int, shift: float = 0.0) -> torch.Tensor:
    return torch.arange(rows * 2, dtype=torch.float64).view(rows, 2) + 100 * rank + shift


def each_with_its_adjoint(rank: int):
    """name -> (output, gradient of the input) where rank r weighs the output by `block(r, ...)`."""
    group = build_groups(Topology(world=3, expert=3)).expert
    total = sum(COUNTS)
    cases = {
        "reduce_partial": (lambda x: reduce_partial(x, group), block(rank, 4)),
        "copy_to": (lambda x: copy_to(x, group), block(rank, 4)),
        "gather_rows": (lambda x: gather_rows(x, group, COUNTS), block(rank, COUNTS[rank])),
        "gather_rows_partial": (lambda x: gather_rows_partial(x, group, COUNTS), block(rank, COUNTS[rank])),
        "slice_rows": (lambda x: slice_rows(x, group, COUNTS), block(7, total)),
        "scatter_rows": (lambda x: scatter_rows(x, group, COUNTS), block(rank, total)),
        "start_reduce": (lambda x: finish_reduce(*start_reduce(x, group)), block(rank, 4)),
    }
    found = {}
    for name, (function, x) in cases.items():
        x.requires_grad_()
        y = function(x)
        (y * block(rank, y.shape[0], 0.5)).sum().backward()
        found[name] = (y.detach(), x.grad)
    return found


def test_collectives_of_tokens_and_partial_sums_with_their_adjoints():
    results = run_distributed(each_with_its_adjoint, 3)
    total, ranks = sum(COUNTS), range(3)
    weights_4, weights_all = [block(r, 4, 0.5) for r in ranks], [block(r, total, 0.5) for r in ranks]
    gathered = torch.cat([block(r, COUNTS[r]) for r in ranks])
    parts = [list(sum(weights_all).split(COUNTS)), torch.cat([block(r, COUNTS[r], 0.5) for r in ranks])]
    for rank, found in enumerate(results):
        mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        summed = sum(block(r, 4) for r in ranks)
        expected = {
            "reduce_partial": (summed, weights_4[rank]),
            "start_reduce": (summed, weights_4[rank]),
            "copy_to": (block(rank, 4), sum(weights_4)),
            "gather_rows": (gathered, weights_all[rank][mine]),
            "gather_rows_partial": (gathered, parts[0][rank]),
            "slice_rows": (block(7, total)[mine], parts[1]),
            "scatter_rows": (sum(block(r, total) for r in ranks)[mine], parts[1]),
        }
        for name, (y, dx) in expected.items():
            assert torch.equal(found[name][0], y), (name, rank)
            assert torch.equal(found[name][1], dx), (name, rank)


def wrong_counts(rank: int):
    group = build_groups(Topology(world=2, expert=2)).expert
    for function in (gather_rows, gather_rows_partial, slice_rows, scatter_rows):
        with pytest.raises(ValueError, match="row counts"):
            function(torch.zeros(3, 1), group, [1, 1])
        with pytest.raises(ValueError, match="row counts"):
            function(torch.zeros(3, 1), group, [3])
    return True


def test_row_counts_that_do_not_fit_are_refused_before_anything_is_sent():
    assert run_distributed(wrong_counts, 2) == [True, True]


def test_shares_of_rows():
    class Three:
        world_size = 3

    assert [even_counts(n, Three()) for n in (0, 1, 4, 5, 9)] == [
        [0, 0, 0],
        [1, 0, 0],
        [2, 2, 0],
        [2, 2, 1],
        [3, 3, 3],
    ]
