"""Forced loads: what each expert gets, whatever the router wants; and jitter's factors."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.errors import RoutingError
from moe_train.moe import ForcedRouter, RouterSpec, ScoreRouter, expert_shares
from moe_train.moe.jitter import jitter
from moe_train.moe.sequences import Sequences

EXPERTS, TOP_K, HIDDEN = 6, 2, 4
SPEC = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="softmax", normalize=True)
CPU = torch.device("cpu")


def sequences(tokens: int, count: int, first: int = 0) -> Sequences:
    return Sequences.of(tokens, count, None, CPU, first)


def loads(router: ForcedRouter, tokens: int, count: int) -> torch.Tensor:
    ids = router.choose(sequences(tokens, count))
    assert all(len(set(row)) == TOP_K for row in ids.tolist()), "different experts"
    return ids.flatten().bincount(minlength=EXPERTS)


def test_a_balanced_load_is_even_to_one_row():
    for tokens, count in ((12, 1), (11, 1), (80, 4)):
        found = loads(ForcedRouter(SPEC), tokens, count)
        assert found.max() - found.min() <= count


@pytest.mark.parametrize("weights", [[1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6], [0, 3, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1]])
def test_shares_are_met_to_a_few_rows(weights):
    shares = expert_shares(weights, TOP_K)
    tokens = 4096
    found = loads(ForcedRouter(SPEC, None, shares), tokens, 4)
    assert (found - torch.tensor(shares) * tokens * TOP_K).abs().max() < 16


def test_no_expert_gets_more_than_one_row_of_each_token():
    assert expert_shares([100, 1, 1, 1, 1], 2) == pytest.approx((0.5, 0.125, 0.125, 0.125, 0.125))
    assert expert_shares([1, 1, 0, 0], 2) == pytest.approx((0.5, 0.5, 0, 0))
    assert expert_shares([5, 4, 1], 1) == pytest.approx((0.5, 0.4, 0.1))
    with pytest.raises(RoutingError, match="has 1 experts above 0, and top-k is 2"):
        expert_shares([1, 0, 0], 2)


@pytest.mark.parametrize("shares", [None, expert_shares([3, 1, 1, 1, 1, 1], TOP_K)])
def test_the_choice_does_not_depend_on_how_sequences_are_cut(shares):
    router = ForcedRouter(SPEC, None, shares)
    parts = [router.choose(sequences(10, 1, first)) for first in range(7, 11)]
    assert torch.equal(router.choose(sequences(40, 4, 7)), torch.cat(parts))
    assert not torch.equal(parts[0], parts[1])


def test_weights_are_the_routers_and_an_evaluation_is_not_forced():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(12, HIDDEN, generator=generator), torch.randn(EXPERTS, HIDDEN, generator=generator)

    def gate(x):
        return F.linear(x, weight)

    router = ForcedRouter(SPEC)
    routing = router.route(gate, x, None, None, sequences(12, 2))
    chosen = (x @ weight.t()).softmax(dim=-1).gather(1, routing.topk_ids_TK)
    assert (routing.topk_weights_TK - chosen / chosen.sum(dim=1, keepdim=True)).abs().max() < 1e-6
    assert torch.equal(router.route(gate, x).topk_ids_TK, ScoreRouter(SPEC).route(gate, x).topk_ids_TK)
    assert not router.balanced


# -------------------------------------------------------------------------------------------------------------- jitter


def test_factors_fill_their_range_and_differ_everywhere():
    ones = torch.ones(4000, 16, dtype=torch.float64)
    factors = jitter(ones, 0.1, 12345, sequences(4000, 4))
    assert 0.9 <= factors.min() < 0.9001
    assert 1.0999 < factors.max() < 1.1
    assert abs(factors.mean() - 1) < 1e-3
    assert abs(factors.var() - 0.01 / 3) < 1e-4, "of a uniform distribution"
    assert factors.unique().numel() > 0.999 * factors.numel()
    for lag in (1, 1000):  # neighbours, and the same place of another sequence
        both = torch.stack([factors[:-lag].flatten(), factors[lag:].flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 0.02
    assert not torch.equal(jitter(ones, 0.1, 12346, sequences(4000, 4)), factors), "another layer"


def test_factors_do_not_depend_on_how_sequences_are_cut():
    x = torch.rand(40, 8)
    whole = jitter(x, 0.2, 7, sequences(40, 4, 3))
    parts = [jitter(part, 0.2, 7, sequences(10, 1, 3 + number)) for number, part in enumerate(x.chunk(4))]
    assert torch.equal(whole, torch.cat(parts))
    # padding left out, the others keep their factors
    kept = torch.arange(40) % 10 < 7
    index = torch.arange(40)[kept] // 10
    ragged = Sequences(count=4, index_T=index, ragged=True, first=3)
    assert torch.equal(jitter(x[kept], 0.2, 7, ragged), whole[kept])
