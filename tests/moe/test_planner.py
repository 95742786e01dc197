"""Redundant slots: a plan wherever there is one, the same everywhere, and one that lowers the most loaded rank."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import TopologyError
from moe_train.moe import planner
from moe_train.moe.placement import SlotPlan, assign_experts
from moe_train.moe.planner import plan_slots, rank_loads, rank_shares

exact = settings(derandomize=True, deadline=None, max_examples=150)


@st.composite
def problems(draw) -> dict:
    """Any counts for which there is a plan, full ranks among them; loads with ties and zeros."""
    world = draw(st.integers(2, 9))
    experts = draw(st.integers(1, 16))
    shared = draw(st.integers(0, world - 1))
    most = experts * (world - shared - 1)
    return {
        "num_experts": experts,
        "world_size": world,
        "shared_ranks": shared,
        "redundant": most - draw(st.integers(0, most)),
        "loads": draw(st.none() | st.lists(st.sampled_from([0, 1, 2, 7, 100]), min_size=experts, max_size=experts)),
        "ranks_per_node": draw(st.none() | st.integers(1, 5)),
    }


def zipf(experts: int, exponent: float, seed: int) -> list[int]:
    """Loads of experts whose popularity falls with a power of their place, in random order."""
    loads = [int(1e6 * (place + 1) ** -exponent) for place in range(experts)]
    random.Random(seed).shuffle(loads)
    return loads


def highest(plan: SlotPlan, loads: list[int], ranks_per_node: int | None = None) -> float:
    """Rows of the most loaded rank over the mean of the routed ranks."""
    mean = sum(loads) / (plan.world_size - plan.shared_ranks)
    return max(rank_loads(plan, loads, ranks_per_node)) / mean


@given(problem=problems())
@exact
def test_a_plan_is_found_wherever_there_is_one(problem):
    plan = plan_slots(**problem)  # SlotPlan refuses one that is none
    assert (plan.num_experts, plan.world_size) == (problem["num_experts"], problem["world_size"])
    assert (plan.shared_ranks, plan.num_redundant) == (problem["shared_ranks"], problem["redundant"])


@given(problem=problems())
@exact
def test_the_same_question_has_the_same_answer(problem):
    loads = problem["loads"]
    again = problem | {"loads": None if loads is None else tuple(float(load) for load in loads)}
    first, second = plan_slots(**problem), plan_slots(**again)
    assert first == second
    assert first.digest() == second.digest()


@given(problem=problems())
@exact
def test_rank_loads_are_what_the_sources_send(problem):
    """Against a sum over every source and every destination that it may choose."""
    plan, per_node = plan_slots(**problem), problem["ranks_per_node"]
    loads = problem["loads"] or [3] * plan.num_experts
    sent = [0.0] * plan.world_size
    for source in range(plan.world_size):
        for expert, numbers in enumerate(plan.expert_destinations(source, per_node)):
            for number in numbers:
                sent[plan.destinations[number][0]] += loads[expert] / plan.world_size / len(numbers)
    assert rank_loads(plan, loads, per_node) == pytest.approx(sent, rel=1e-12, abs=1e-9)
    assert sum(sent) == pytest.approx(sum(loads), rel=1e-12)
    assert (np.array(loads) @ rank_shares(plan, per_node)).tolist() == pytest.approx(sent, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(("experts", "world"), [(8, 4), (64, 8), (64, 16)])
@pytest.mark.parametrize("copies", [0, 1, 2, 3])
def test_equal_loads_stay_even(experts, world, copies):
    """Experts that divide, and the same number of copies on every rank: nothing changes."""
    plan = plan_slots(experts, world, redundant=copies * world)
    assert rank_loads(plan, [1] * experts) == pytest.approx([experts / world] * world, rel=1e-12)
    assert plan.num_redundant == copies * world


@given(world=st.integers(2, 16), experts=st.integers(1, 64))
@exact
def test_copies_that_even_the_slots_out_never_raise_equal_loads(world, experts):
    """R = W - E % W: only ranks with one home less get a copy."""
    redundant = -experts % world
    if redundant > experts * (world - 1):
        return
    plan, loads = plan_slots(experts, world, redundant=redundant), [1] * experts
    assert len(set(plan.slots_per_rank)) == 1
    assert max(rank_loads(plan, loads)) <= max(rank_loads(SlotPlan(experts, world), loads)) * (1 + 1e-9)


SKEWED = [
    # experts, ranks, shared, copies, exponent, ranks per node, bound; behind it what was measured: without -> planned
    (64, 8, 0, 8, 0.5, None, 1.08),  # 1.32..1.54 -> 1.04..1.06
    (64, 8, 0, 8, 1.0, None, 1.20),  # 2.29..2.91 -> 1.15..1.17
    (64, 8, 0, 16, 1.0, None, 1.12),  # the same -> 1.06..1.09
    (60, 8, 1, 3, 0.5, None, 1.20),  # 1.27..1.40 -> 1.06..1.15
    (256, 64, 0, 64, 0.5, None, 1.10),  # 2.53..2.85 -> 1.02..1.07
    (256, 64, 0, 64, 1.0, None, 1.20),  # 10.6..10.9 -> 1.11..1.14
    (256, 64, 8, 24, 0.5, None, 1.25),  # 2.22..2.62 -> 1.15..1.20
    (64, 16, 0, 16, 1.0, 4, 1.20),  # 3.57..3.75 -> 1.11..1.13
    (256, 64, 0, 64, 1.0, 8, 1.20),  # 10.6..10.9 -> 1.11..1.14
]
"""The most loaded rank over the mean of the routed ranks, on three draws each."""


@pytest.mark.parametrize(("experts", "world", "shared", "copies", "exponent", "per_node", "bound"), SKEWED)
def test_skewed_loads_come_close_to_the_mean(experts, world, shared, copies, exponent, per_node, bound):
    for seed in range(3):
        loads = zipf(experts, exponent, seed)
        plan = plan_slots(experts, world, shared, copies, loads, per_node)
        without = highest(SlotPlan(experts, world, shared), loads, per_node)
        assert highest(plan, loads, per_node) < bound
        assert highest(plan, loads, per_node) < without


@pytest.mark.parametrize("exponent", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(("experts", "world"), [(8, 4), (16, 8), (60, 8), (64, 16)])
def test_one_copy_per_rank_never_raises_the_most_loaded_rank(experts, world, exponent):
    for seed in range(5):
        loads = zipf(experts, exponent, seed)
        without = max(rank_loads(SlotPlan(experts, world), loads))
        assert max(rank_loads(plan_slots(experts, world, redundant=world, loads=loads), loads)) <= without


def all_plans(experts: int, world: int, redundant: int):
    choices = []
    for rank in range(world):
        first, count = assign_experts(experts, world, rank)
        elsewhere = [e for e in range(experts) if not first <= e < first + count]
        slots = assign_experts(experts + redundant, world, rank)[1]
        choices.append(list(itertools.combinations(elsewhere, slots - count)))
    return (SlotPlan(experts, world, 0, replicas) for replicas in itertools.product(*choices))


@pytest.mark.parametrize("ranks_per_node", [None, 2])
def test_small_plans_are_close_to_the_best_there_is(ranks_per_node):
    """Measured: 1.4 % above the best on average and 29 % at worst, 0.3 % and 15 % where nodes are known."""
    ratios = []
    for seed in range(60):
        draw = random.Random(seed)
        world, experts = draw.choice([2, 3, 4]), draw.randint(2, 6)
        redundant = draw.randint(1, min(experts * (world - 1), 4))
        loads = [draw.choice([1, 2, 5, 10, 20, 100]) for _ in range(experts)]
        best = min(max(rank_loads(p, loads, ranks_per_node)) for p in all_plans(experts, world, redundant))
        found = plan_slots(experts, world, 0, redundant, loads, ranks_per_node)
        ratios.append(max(rank_loads(found, loads, ranks_per_node)) / best)
    assert min(ratios) > 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.02
    assert max(ratios) < 1.3
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 50


def rows_that_stay(plan: SlotPlan, loads: list[int], ranks_per_node: int) -> float:
    """Part of all rows that find a copy on the node they come from."""
    stay = 0.0
    for source in range(plan.world_size):
        for expert, numbers in enumerate(plan.expert_destinations(source, ranks_per_node)):
            if plan.destinations[numbers[0]][0] // ranks_per_node == source // ranks_per_node:
                stay += loads[expert] / plan.world_size
    return stay / sum(loads)


def test_copies_go_to_nodes_without_one():
    """One hot expert, three copies, nodes {0, 1}, {2, 3}, {4, 5}, {6, 7}: one on each."""
    loads = [8] + [1] * 31
    plan = plan_slots(32, 8, redundant=8, loads=loads, ranks_per_node=2)
    nodes = [rank // 2 for rank in plan.replica_ranks(0)]
    assert set(nodes) == {0, 1, 2, 3}
    for seed in range(3):
        loads = zipf(64, 0.8, seed)
        blind, aware = (plan_slots(64, 16, 0, 16, loads, per_node) for per_node in (None, 4))
        # measured: 0.25 without copies, 0.38 to 0.46 by plans that do not know the nodes, 0.43 to 0.50 by those that do
        assert rows_that_stay(aware, loads, 4) > rows_that_stay(blind, loads, 4)
        assert highest(aware, loads, 4) < 1.15


def test_a_hot_expert_whose_copies_fit_nowhere_gives_way():
    """2 experts on 2 ranks, one copy: the slot is on rank 0, home of the hot expert 0, so it holds expert 1."""
    assert plan_slots(2, 2, redundant=1, loads=[100, 1]).replicas == ((1,), ())


def test_a_copy_moves_others_along():
    """Ranks 0, 1, 2 with experts 0, 1, 2 and a slot each. With copy 1 on rank 2 and copy 2 on rank 0, copy 1's second
    place is taken: rank 0 is given to it, and copy 2 goes to rank 1."""
    slots = planner._Slots(SlotPlan(3, 3), [1, 1, 1], [1.0, 1.0, 1.0])
    slots.put(1, 2)
    slots.put(2, 0)
    assert slots.place(1, key=lambda rank: (rank,))
    assert slots.redundant == [[1], [2], [1]]
    assert slots.holders == [[0], [1, 2, 0], [2, 1]]
    assert slots.load == [2.0, 2.0, 2.0]
    assert not slots.place(0, key=lambda rank: (rank,))


def test_a_search_for_better_plans_ends_after_a_counted_number_of_trials(monkeypatch):
    loads = zipf(64, 1.0, 0)
    full = plan_slots(64, 16, redundant=16, loads=loads)
    monkeypatch.setattr(planner, "MOST_TRIALS", 0)
    greedy = plan_slots(64, 16, redundant=16, loads=loads)
    assert highest(full, loads) < highest(greedy, loads) < highest(SlotPlan(64, 16), loads)


def test_loads_of_zero_and_no_copies_are_legal():
    assert plan_slots(4, 2) == SlotPlan(4, 2)
    plan = plan_slots(4, 2, redundant=2, loads=[0, 0, 0, 0])
    assert [len(plan.replica_ranks(expert)) for expert in range(4)] == [2, 1, 2, 1]
    assert rank_loads(plan, [0] * 4) == [0.0, 0.0]
    # and share the copies out
    plan = plan_slots(4, 4, redundant=4, loads=[0, 0, 0, 0])
    assert [len(plan.replica_ranks(expert)) for expert in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 2, 0, 5), r"parallel.redundant_experts \(5\) exceeds 4.*at most 4"),
        ((4, 3, 1, 5), r"parallel.redundant_experts \(5\) exceeds 4.*parallel.shared_expert_ranks \(1\)"),
        ((4, 2, 1, 1), r"parallel.redundant_experts \(1\) exceeds 0"),
        ((4, 2, 0, -1), r"parallel.redundant_experts \(-1\)"),
        ((4, 2, 2, 0), r"parallel.shared_expert_ranks \(2\)"),
        ((4, 2, -1, 0), r"parallel.shared_expert_ranks \(-1\)"),
        ((4, 1, 0, 2), r"parallel.redundant_experts \(2\) needs expert parallelism"),
        ((4, 2, 0, 2, [1, 2, 3]), "3 loads do not fit 4 experts"),
        ((4, 2, 0, 2, [1, 2, -3, 4]), r"expert 2 \(-3.0\)"),
        ((4, 2, 0, 2, [1, float("nan"), 3, 4]), r"expert 1 \(nan\)"),
        ((4, 2, 0, 2, [1, 2, 3, float("inf")]), r"expert 3 \(inf\)"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(TopologyError, match=sentence):
        plan_slots(*arguments)


def test_nodes_without_ranks_are_refused():
    with pytest.raises(ValueError, match=r"ranks_per_node \(0\)"):
        plan_slots(4, 2, redundant=2, ranks_per_node=0)
