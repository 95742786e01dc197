"""Capacity against loops over tokens: who finds room, what weights and gradients remain, and what is counted."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_train.moe import CapacityRouter, HashRouter, RouterSpec, ScoreRouter
from moe_train.moe.balance import sequence_aux_loss
from moe_train.moe.dispatch import Destinations, by_expert, combine, dispatch, plan_dispatch
from moe_train.moe.placement import SlotPlan
from moe_train.moe.sequences import Sequences
from moe_train.parallel import ParallelGroup

EXPERTS, TOP_K, HIDDEN = 5, 2, 4
LENGTHS = (7, 0, 9, 1)
INDEX = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
RAGGED = Sequences(count=4, index_T=INDEX, ragged=True)


def spec(**changes) -> RouterSpec:
    return RouterSpec(**{"num_experts": EXPERTS, "top_k": TOP_K, "score": "softmax", "normalize": True, **changes})


def linear(weight):
    return lambda x: F.linear(x, weight)


def made(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    weight[1] *= 3  # some experts are wanted by many
    return x, weight


def naive_kept(ids, weights, factor: float, drop: str) -> list[list[bool]]:
    kept = [[False] * TOP_K for _ in ids]
    for sequence, length in enumerate(LENGTHS):
        room = math.ceil(factor * length * TOP_K / EXPERTS - 1e-9)
        for expert in range(EXPERTS):
            wanting = [
                (t, k) for t in range(len(ids)) for k in range(TOP_K) if INDEX[t] == sequence and ids[t][k] == expert
            ]
            if drop == "probability":
                wanting.sort(key=lambda place: -weights[place[0]][place[1]])
            for t, k in wanting[:room]:
                kept[t][k] = True
    return kept


@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 9.0])
@pytest.mark.parametrize("options", [{}, {"normalize": False, "scale": 2.5}, {"score": "sigmoid", "eps": 1e-20}])
def test_the_same_assignments_find_room_as_in_the_loops(drop, factor, options):
    x, weight = made()
    plain = ScoreRouter(spec(**options)).route(linear(weight), x)
    kept = torch.tensor(naive_kept(plain.topk_ids_TK.tolist(), plain.topk_weights_TK.tolist(), factor, drop))
    routing = CapacityRouter(ScoreRouter(spec(**options)), factor, drop).route(linear(weight), x, None, None, RAGGED)
    assert torch.equal(routing.topk_ids_TK >= 0, kept)
    assert kept.all() == (factor == 9.0), "the case shows something"
    assert torch.equal(torch.where(kept, routing.topk_ids_TK, ~routing.topk_ids_TK), plain.topk_ids_TK)
    # not scaled up: what is dropped is missing
    assert torch.equal(routing.topk_weights_TK, plain.topk_weights_TK * kept)


def test_equal_weights_are_dropped_from_the_end():
    x = torch.ones(6, HIDDEN, dtype=torch.float64)
    weight = torch.arange(EXPERTS, dtype=torch.float64).unsqueeze(1).expand(-1, HIDDEN)
    sequences = Sequences.of(6, 1, None, x.device)
    for drop in ("probability", "position"):
        router = CapacityRouter(ScoreRouter(spec()), 1.0, drop)
        routing = router.route(linear(weight), x, None, None, sequences)
        assert (routing.topk_ids_TK >= 0).tolist() == [[True, True]] * 3 + [[False, False]] * 3  # ceil(6 * 2 / 5)


def test_room_is_a_whole_number_whatever_the_factor_is_made_of():
    sequences = Sequences.of(50, 1, None, torch.device("cpu"))
    assert 1.1 * 50 > 55
    assert sequences.rows_per_expert(1.1, 2, 2).tolist() == [55]
    assert sequences.rows_per_expert(0.01, 2, 2).tolist() == [1]


def test_gradients_of_kept_weights_are_exact_and_of_dropped_ones_zero():
    x, weight = made()
    router = CapacityRouter(ScoreRouter(spec()), 0.8, "probability")
    ids = router.route(linear(weight), x, None, None, RAGGED).topk_ids_TK

    def weights(x, weight):
        return router.route(linear(weight), x, None, ids, RAGGED).topk_weights_TK

    torch.autograd.gradcheck(weights, (x.requires_grad_(), weight.requires_grad_()))
    (weights(x, weight) * (ids < 0)).sum().backward()
    assert (ids < 0).any()
    assert not weight.grad.any()


def test_recompute_replays_the_drops():
    x, weight = made()
    router = CapacityRouter(ScoreRouter(spec()), 0.8, "position")
    first = router.route(linear(weight), x, None, None, RAGGED)
    other = linear(weight.flip(0))  # it would choose others
    again = router.route(other, x, None, first.topk_ids_TK, RAGGED)
    assert torch.equal(again.topk_ids_TK, first.topk_ids_TK)
    assert torch.equal(again.topk_weights_TK == 0, first.topk_ids_TK < 0)


def test_an_evaluation_drops_nothing():
    x, weight = made()
    routing = CapacityRouter(ScoreRouter(spec()), 0.1, "probability").route(linear(weight), x)
    plain = ScoreRouter(spec()).route(linear(weight), x)
    assert torch.equal(routing.topk_ids_TK, plain.topk_ids_TK)
    assert torch.equal(routing.topk_weights_TK, plain.topk_weights_TK)


def test_losses_see_what_was_asked_for():
    x, weight = made()
    router, index = CapacityRouter(ScoreRouter(spec()), 0.3, "position"), INDEX
    dropped = router.route(linear(weight), x, None, None, RAGGED)
    plain = ScoreRouter(spec()).route(linear(weight), x)
    found = sequence_aux_loss(dropped, router.spec, 4, index)
    assert torch.equal(found, sequence_aux_loss(plain, spec(), 4, index))


def test_a_hash_layer_with_the_same_expert_twice():
    table = torch.tensor([[0, 0], [0, 1]])
    router = CapacityRouter(HashRouter(spec(), lambda gate: table), 1.0, "position")
    x, weight = made()
    ids = torch.tensor([0, 1, 0, 1, 1])
    routing = router.route(linear(weight), x[:5], ids, None, Sequences.of(5, 1, None, x.device))
    assert routing.topk_ids_TK.tolist() == [[0, 0], [~0, 1], [~0, ~0], [~0, 1], [~0, ~1]]


@pytest.mark.parametrize("all_dropped", [False, True])
def test_dispatch_and_combine_leave_dropped_rows_out(all_dropped):
    x, weight = made()
    ids = CapacityRouter(ScoreRouter(spec()), 0.8, "position").route(linear(weight), x, None, None, RAGGED).topk_ids_TK
    if all_dropped:
        ids = torch.where(ids < 0, ids, ~ids)
    group = ParallelGroup.single()
    made_plan = plan_dispatch(ids, Destinations(SlotPlan(EXPERTS, 1), 0, x.device), group, partial=True)
    assert made_plan.rows_per_slot.tolist() == [int((ids == e).sum()) for e in range(EXPERTS)]
    weights = torch.rand(ids.shape, dtype=torch.float64) * (ids >= 0)
    scale_E = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)

    def layer(x, weights):
        given = dispatch(x, weights, made_plan, group)
        y = by_expert(*given, made_plan, lambda rows, counts: rows * scale_E.repeat_interleave(counts).unsqueeze(1))
        return combine(y, made_plan, group)

    expected = (weights * scale_E[ids.clamp(min=0)]).sum(dim=1, keepdim=True) * x
    assert (layer(x, weights) - expected).abs().max() < 1e-14
    torch.autograd.gradcheck(layer, (x.requires_grad_(), weights.requires_grad_()))
