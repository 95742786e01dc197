"""Collectives and their adjoints against the same thing done by hand on one process."""

import pytest
import torch

from moe_train.errors import DataError
from moe_train.parallel import ParallelGroup, Topology, all_to_all_rows, build_groups, exchange_counts, raise_together
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


def counts(rank: int):
    group = build_groups(Topology(world=3, expert=3)).expert
    return exchange_counts(torch.arange(4) + 10 * rank, group, [2, 0, 2])


def test_counts_reach_the_rank_that_holds_the_expert():
    results = run_distributed(counts, 3)
    assert results[0].tolist() == [[0, 1], [10, 11], [20, 21]]
    assert results[1].tolist() == [[], [], []]
    assert results[2].tolist() == [[2, 3], [12, 13], [22, 23]]


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


def fail_on_rank_one(rank: int):
    group = build_groups(Topology(world=2, expert=2)).world
    try:
        raise_together(group, DataError("the corpus is empty") if rank == 1 else None)
    except DataError as error:
        return str(error)


def test_an_error_on_one_rank_is_raised_on_all():
    assert run_distributed(fail_on_rank_one, 2) == ["rank 1: the corpus is empty", "the corpus is empty"]
