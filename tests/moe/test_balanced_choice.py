"""Expert choice and sinkhorn against loops: who takes whom, the weights, and that a sequence is all they look at."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_train.errors import RoutingError
from moe_train.moe import ExpertChoiceRouter, RouterSpec, ScoreRouter, SinkhornRouter
from moe_train.moe.balanced_choice import balancing_shifts
from moe_train.moe.sequences import Sequences

EXPERTS, TOP_K, HIDDEN = 5, 2, 4
LENGTHS = (10, 0, 20, 3)
INDEX = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
RAGGED = Sequences(count=4, index_T=INDEX, ragged=True)
ROUTERS = (ExpertChoiceRouter, SinkhornRouter)


def spec(**changes) -> RouterSpec:
    return RouterSpec(**{"num_experts": EXPERTS, "top_k": TOP_K, "score": "softmax", "normalize": True, **changes})


def linear(weight):
    return lambda x: F.linear(x, weight)


def made(tokens: int = sum(LENGTHS)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    weight[1] *= 3
    return x, weight


@pytest.mark.parametrize("options", [{}, {"normalize": False, "scale": 2.5}, {"score": "sigmoid", "eps": 1e-20}])
def test_each_expert_takes_its_best_tokens_of_a_sequence(options):
    x, weight = made()
    router = ExpertChoiceRouter(spec(**options))
    routing = router.route(linear(weight), x, None, None, RAGGED)
    logits = x @ weight.t()
    scores = logits.sigmoid() if options.get("score") == "sigmoid" else logits.softmax(dim=-1)
    expected = torch.zeros_like(scores)
    for sequence, length in enumerate(LENGTHS):
        here = [t for t in range(len(x)) if INDEX[t] == sequence]
        for expert in range(EXPERTS):
            best = sorted(here, key=lambda t, e=expert: -float(scores[t, e]))[: math.ceil(length * TOP_K / EXPERTS)]
            expected[best, expert] = scores[best, expert]
    if router.spec.normalize:
        expected = expected / expected.sum(dim=1, keepdim=True).clamp(min=1e-300)
    found = torch.zeros(len(x), EXPERTS + 1, dtype=torch.float64)
    ids = routing.topk_ids_TK
    found.scatter_add_(1, torch.where(ids < 0, EXPERTS, ids), routing.topk_weights_TK)
    assert (found[:, :EXPERTS] - expected * router.spec.scale).abs().max() < 1e-14
    assert not found[:, EXPERTS].any(), "no expert weighs nothing"
    numbers = (expected > 0).sum(dim=1)
    assert 0 in numbers, "some token has no expert"
    assert ids.shape[1] == numbers.max() > TOP_K


def test_a_token_without_an_expert_has_no_gradient_that_is_not_a_number():
    x, weight = made()
    x.requires_grad_()
    routing = ExpertChoiceRouter(spec()).route(linear(weight), x, None, None, RAGGED)
    (routing.topk_weights_TK * torch.rand_like(routing.topk_weights_TK)).sum().backward()
    without = (routing.topk_ids_TK < 0).all(dim=1)
    assert without.any()
    assert not x.grad[without].any()
    assert torch.isfinite(x.grad).all()


def test_soft_loads_are_even_after_the_shifts():
    x, weight = made()
    logits = x @ weight.t() / 4  # the sharper they are, the more rounds it takes
    shifts = balancing_shifts(logits, RAGGED)
    soft = (logits + shifts[INDEX]).softmax(dim=-1)
    for sequence, length in enumerate(LENGTHS):
        loads = soft[sequence == INDEX].sum(dim=0)
        assert (loads - length / EXPERTS).abs().max() < 1e-6
    assert not shifts[1].any(), "a sequence without tokens"
    assert shifts.sum(dim=1).abs().max() < 1e-12


def test_sinkhorn_chooses_after_the_shifts_and_weighs_before_them():
    x, weight = made(40)
    x[:, 0] = 3.0  # the same for all tokens: some experts are every token's favourites
    sequences = Sequences.of(40, 2, None, x.device)
    routing = SinkhornRouter(spec()).route(linear(weight), x, None, None, sequences)
    logits = x @ weight.t()
    matrix = logits.exp().view(2, 20, EXPERTS)
    for _ in range(32):
        matrix = matrix / matrix.sum(dim=2, keepdim=True)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    ids = matrix.view(40, EXPERTS).topk(TOP_K, dim=1).indices
    assert torch.equal(routing.topk_ids_TK, ids)
    weights = logits.softmax(dim=-1).gather(1, ids)
    assert (routing.topk_weights_TK - weights / weights.sum(dim=1, keepdim=True)).abs().max() < 1e-14

    def worst(ids):
        return ids.flatten().bincount(minlength=EXPERTS).max()

    assert worst(ids) < worst(ScoreRouter(spec()).route(linear(weight), x).topk_ids_TK)


@pytest.mark.parametrize("router_class", ROUTERS)
def test_other_sequences_change_nothing(router_class):
    x, weight = made(24)
    router = router_class(spec())

    def chosen(x, count):
        ids = router.route(linear(weight), x, None, None, Sequences.of(len(x), count, None, x.device)).topk_ids_TK
        return [sorted(e for e in row if e >= 0) for row in ids.tolist()]

    assert chosen(x, 3) == [row for part in x.chunk(3) for row in chosen(part, 1)]
    assert chosen(x, 3) != chosen(x, 1), "the case shows something"


@pytest.mark.parametrize("router_class", ROUTERS)
def test_padding_changes_nothing(router_class):
    x, weight = made()
    router = router_class(spec())
    whole = router.route(linear(weight), x, None, None, RAGGED)
    start = 0
    for length in LENGTHS:
        part = x[start : start + length]
        alone = router.route(linear(weight), part, None, None, Sequences.of(length, 1, None, x.device))
        width = alone.topk_ids_TK.shape[1]
        assert torch.equal(whole.topk_ids_TK[start : start + length, :width], alone.topk_ids_TK)
        start += length


@pytest.mark.parametrize("router_class", ROUTERS)
def test_an_evaluation_chooses_as_the_family_does_and_recompute_replays(router_class):
    x, weight = made()
    bias = torch.linspace(-0.2, 0.2, EXPERTS)
    router = router_class(spec(has_bias=True), lambda gate: bias)
    plain = ScoreRouter(spec(has_bias=True), lambda gate: bias).route(linear(weight), x)
    routing = router.route(linear(weight), x)
    assert torch.equal(routing.topk_ids_TK, plain.topk_ids_TK)
    assert torch.equal(routing.topk_weights_TK, plain.topk_weights_TK)
    first = router.route(linear(weight), x, None, None, RAGGED)
    again = router.route(linear(weight.flip(0)), x, None, first.topk_ids_TK, RAGGED)
    assert torch.equal(again.topk_ids_TK, first.topk_ids_TK)


@pytest.mark.parametrize("router_class", ROUTERS)
@pytest.mark.parametrize("changes", [{"num_groups": 5, "topk_groups": 2}, {"score": "softmax_after_topk"}])
def test_groups_and_weights_after_the_choice_are_refused(router_class, changes):
    with pytest.raises(RoutingError, match=r"moe.router can be expert_choice or sinkhorn only where"):
        router_class(spec(**changes))
