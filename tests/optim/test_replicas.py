"""Redundant copies of experts against one process that knows of none: weights, norm, one state per expert."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moe_train.config.schema import OptimizerSection
from moe_train.moe import SlotPlan, replica_routes
from moe_train.optim import ExpertStore, ExpertTensor, LayerExperts, ShardOptions, decays, optimizer_factory
from moe_train.optim.replicas import Replicas
from moe_train.parallel import ParallelGroup, Topology, build_groups
from moe_train.testing import assert_close, run_distributed

SHAPES = {"gate_up_proj": (4, 3), "down_proj": (3, 2)}
SECTION = OptimizerSection(lr=0.05, weight_decay=0.3)
STEPS, MICRO_BATCHES = 3, 2
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """plan: of each EP group. replanned: from the third step on."""

    plan: SlotPlan
    replanned: SlotPlan | None = None
    stage: int = 1
    copies: int = 1
    """Ranks that are home to the same experts."""
    dtype: torch.dtype = torch.float64
    state_device: torch.device = CPU
    broken: str = ""

    @property
    def world(self) -> int:
        return self.plan.world_size * self.copies

    def plan_at(self, step: int) -> SlotPlan:
        return self.replanned if self.replanned and step >= 2 else self.plan


PLANS = {
    "even": SlotPlan(4, 2, replicas=((2,), (0,))),
    "uneven, one expert on every rank": SlotPlan(5, 3, replicas=((4,), (0,), (3, 0))),
    "a rank for shared experts alone": SlotPlan(3, 3, shared_ranks=1, replicas=((), (), (0,))),
    "a rank that is nobody's home": SlotPlan(2, 3, replicas=((), (), (0,))),
    "a home without redundant slots": SlotPlan(4, 4, shared_ranks=1, replicas=((), (), (0,), (1,))),
}


# ---- who sends what


@pytest.mark.parametrize("plan", [*PLANS.values(), SlotPlan(3, 2, replicas=((2,), (1, 0))), SlotPlan(5, 3)], ids=str)
def test_both_ends_of_each_row_mean_the_same_expert(plan):
    """Weights home -> copies, followed row by row; gradients take the same way back."""
    ranks = range(plan.world_size)
    routes = [replica_routes(plan, rank) for rank in ranks]
    boxes: dict[tuple[int, int], list[int]] = {}
    for home in ranks:
        experts = iter([plan.home(home)[0] + place for place in routes[home].send])
        for holder in ranks:
            boxes[home, holder] = list(itertools.islice(experts, routes[home].send_counts[holder]))
        assert next(experts, None) is None
        assert all(plan.owner(plan.home(home)[0] + place) == home for place in routes[home].send)
    for holder in ranks:
        arriving = [expert for home in ranks for expert in boxes[home, holder]]
        assert [len(boxes[home, holder]) for home in ranks] == list(routes[holder].recv_counts)
        count = len(plan.slots(holder)) - plan.home(holder)[1]
        assert tuple(arriving[place] for place in routes[holder].place) == plan.slots(holder)[:count]


def test_a_plan_of_another_size_is_refused():
    with pytest.raises(ValueError, match="2 ranks does not fit an EP group of 1"):
        Replicas(SlotPlan(3, 2), ParallelGroup.single())
    old = Replicas(SlotPlan(3, 1), ParallelGroup.single())
    with pytest.raises(ValueError, match=r"num_experts \(4\)"):
        old.moved_to(SlotPlan(4, 1))


# ---- training


def draw(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def initial(name: str, expert: int) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=draw(len(name), expert), dtype=torch.float64)


def loss_of(weight: torch.Tensor, name: str, expert: int, place: tuple[int, int, int], share: float) -> torch.Tensor:
    """One holder's share of an expert's loss in one micro-batch of one EP group. Its gradient depends on the weight.

    Args:
        place: (step, micro-batch, EP group).
    """
    generator = draw(len(name), expert, *place)
    slope = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(weight.dtype)
    curvature = torch.rand(SHAPES[name], generator=generator, dtype=torch.float64).to(weight.dtype)
    return share * (slope * weight + 0.5 * curvature * weight.square()).sum()


def share_of(plan: SlotPlan, expert: int, rank: int) -> float:
    """Uneven, and 1 in all: the holders of an expert see different tokens."""
    holders = [r for r in range(plan.world_size) if expert in plan.slots(r)]
    return (holders.index(rank) + 1) / (len(holders) * (len(holders) + 1) / 2)


def build(case: Case, groups) -> tuple[ExpertStore, LayerExperts]:
    options = ShardOptions(
        stage=case.stage,
        compute_dtype=case.dtype,
        grad_dtype=torch.float32,
        device=CPU,
        state_device=case.state_device,
    )
    tensors = {
        name: ExpertTensor.routed(f"layer.experts.{name}", case.plan, shape, groups.expert, groups.expert_data, options)
        for name, shape in SHAPES.items()
    }
    for name, tensor in tensors.items():
        for expert in tensor.units:
            tensor.write_expert(expert, initial(name, expert))
    factory = optimizer_factory(SECTION, CPU)
    store = ExpertStore(list(tensors.values()), factory, decays(SECTION), groups.world, case.world)
    store.publish()
    return store, LayerExperts(tensors["gate_up_proj"], tensors["down_proj"])


@dataclass(frozen=True, kw_only=True)
class Result:
    """weights: after each publish and re-plan, {parameter: [(expert, forward weight)] in slot order}."""

    weights: list[dict[str, list[tuple[int, torch.Tensor]]]]
    norms: list[float]
    masters: list[tuple[str, int, int, torch.Tensor]]
    kinds: set[str]
    bytes_held: dict[str, int]


def train(rank: int, case: Case) -> Result:
    groups = build_groups(Topology(world=case.world, expert=case.plan.world_size))
    ep_rank, ep_group = groups.expert.rank_in_group, rank // case.plan.world_size
    store, layer = build(case, groups)
    break_it(store, case.broken)

    def weights_now() -> dict[str, list[tuple[int, torch.Tensor]]]:
        named = {tensor.name.rpartition(".")[2]: tensor for tensor in store.tensors}
        return {n: [(e, w.clone()) for e, w in zip(t.slots, t.gather(), strict=True)] for n, t in named.items()}

    seen, norms = [weights_now()], []
    for step in range(STEPS):
        plan = case.plan_at(step)
        if plan != store.tensors[0].replicas.plan:
            store.set_plans([plan])
            seen.append(weights_now())
        for micro in range(MICRO_BATCHES):
            with layer.fetch() as weights:
                total = 0.0 * (weights.gate_up_LIH.sum() + weights.down_LHI.sum())
                for name, stacked in zip(SHAPES, (weights.gate_up_LIH, weights.down_LHI), strict=True):
                    for expert, weight in zip(plan.slots(ep_rank), stacked, strict=True):
                        share = share_of(plan, expert, ep_rank)
                        total = total + loss_of(weight, name, expert, (step, micro, ep_group), share)
            total.backward()
        store.finish_gradients()
        norms.append(float(store.squared_norm()) ** 0.5)
        store.step(0.5)
        seen.append(weights_now())
    fragments = [f for f in store.fragments() if f.owner]
    return Result(
        weights=seen,
        norms=norms,
        masters=[(f.name.rpartition(".")[2], f.expert, f.start, f.views["master"].clone()) for f in fragments],
        kinds={kind for f in fragments for kind in f.views},
        bytes_held=store.bytes_held(),
    )


def break_it(store: ExpertStore, how: str) -> None:
    """Errors that the tests must find."""
    for tensor in store.tensors:
        if how == "gradients of copies stay where they are":
            tensor._add_copies = lambda gradient, replicas: None  # type: ignore[method-assign]
        if how == "copies are not refreshed":
            tensor.refresh_copies = lambda: None  # type: ignore[method-assign]
    if how == "the norm counts copies":
        original = store.squared_norm

        def counted() -> torch.Tensor:
            own = sum(
                (float(t.squared_norm()) * len(t.redundant) / max(len(t.units), 1) for t in store.tensors),
                0.0,
            )
            return original() + store.world.all_reduce_(torch.tensor(own, dtype=torch.float64))

        store.squared_norm = counted  # type: ignore[method-assign]


def oracle(case: Case) -> tuple[dict[str, list[torch.Tensor]], list[float]]:
    """One process, one AdamW over master weights; the holders of an expert only split its loss."""
    master_dtype = torch.promote_types(case.dtype, torch.float32)
    experts = range(case.plan.num_experts)
    masters = {name: [torch.nn.Parameter(initial(name, e).to(master_dtype)) for e in experts] for name in SHAPES}
    flat = [p for ps in masters.values() for p in ps]
    optimizer = torch.optim.AdamW(flat, lr=0.05, betas=SECTION.betas, eps=SECTION.eps, weight_decay=0.3)
    norms = []
    for step in range(STEPS):
        plan = case.plan_at(step)
        for (name, parameters), expert in itertools.product(masters.items(), experts):
            total = torch.zeros(SHAPES[name], dtype=master_dtype)
            holders = [rank for rank in range(plan.world_size) if expert in plan.slots(rank)]
            for micro, group, rank in itertools.product(range(MICRO_BATCHES), range(case.copies), holders):
                weight = parameters[expert].detach().to(case.dtype).requires_grad_()
                loss_of(weight, name, expert, (step, micro, group), share_of(plan, expert, rank)).backward()
                total += weight.grad
            parameters[expert].grad = total / case.world
        norms.append(float(torch.cat([p.grad.flatten().double() for p in flat]).norm()))
        for p in flat:
            p.grad *= 0.5
        optimizer.step()
    return {name: [p.detach() for p in ps] for name, ps in masters.items()}, norms


def check(case: Case) -> list[Result]:
    results = run_distributed(train, case.world, case)
    for part in (check_norms, check_states, check_copies, check_in_use):
        part(case, results)
    return results


def check_norms(case: Case, results: list[Result]) -> None:
    _, norms = oracle(case)
    for rank, result in enumerate(results):
        tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
        assert result.norms == pytest.approx(norms, rel=tolerance), f"rank {rank}: each logical element counts once"


def check_states(case: Case, results: list[Result]) -> None:
    """Master weights as one process has them, each element of each expert at one home."""
    expected, _ = oracle(case)
    held = dict.fromkeys(itertools.product(SHAPES, range(case.plan.num_experts)), 0)
    for rank, result in enumerate(results):
        for name, expert, start, values in result.masters:
            whole = expected[name][expert].flatten()[start : start + values.numel()]
            assert_close(values, whole, f"{name} of expert {expert} on rank {rank}", floor=1.0)
            held[name, expert] += values.numel()
        if result.kinds:
            assert result.kinds == {"master", "exp_avg", "exp_avg_sq"}
    assert held == {key: torch.Size(SHAPES[key[0]]).numel() for key in held}, "one state for each logical element"


def check_in_use(case: Case, results: list[Result]) -> None:
    expected, _ = oracle(case)
    for rank, result in enumerate(results):
        for name, slots in result.weights[-1].items():
            for expert, weight in slots:
                what = f"{name} of expert {expert} in use on rank {rank}"
                assert_close(weight, expected[name][expert], what, floor=1.0)


def check_copies(case: Case, results: list[Result]) -> None:
    """At every moment all slots that hold an expert hold the same bits."""
    copied = 0
    for moment in range(len(results[0].weights)):
        for name in SHAPES:
            seen: dict[int, torch.Tensor] = {}
            for rank, result in enumerate(results):
                slots = result.weights[moment][name]
                home = case.plan.home(rank % case.plan.world_size)
                assert [e for e, _ in slots][len(slots) - home[1] :] == list(range(home[0], sum(home)))
                for expert, weight in slots:
                    assert torch.equal(weight, seen.setdefault(expert, weight)), f"{name}, expert {expert}, {rank=}"
                copied += len(slots) - home[1]
    assert copied == len(results[0].weights) * len(SHAPES) * case.plan.num_redundant * case.copies


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PLANS)
def test_three_steps_equal_one_process(name, stage):
    check(Case(plan=PLANS[name], stage=stage))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_homes_that_are_sharded_over_two_ranks(stage):
    check(Case(plan=PLANS["even"], stage=stage, copies=2))


REPLANNED = [
    (PLANS["even"], SlotPlan(4, 2, replicas=((3,), (1,))), 2),
    (PLANS["uneven, one expert on every rank"], SlotPlan(5, 3, replicas=((2,), (4,), (2, 1))), 1),
    (PLANS["a home without redundant slots"], SlotPlan(4, 4, shared_ranks=1, replicas=((), (), (1,), (0,))), 1),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("plan", "replanned", "copies"), REPLANNED, ids=["even", "uneven", "shared rank"])
def test_another_plan_after_two_steps_changes_nothing(plan, replanned, copies, stage):
    results = check(Case(plan=plan, replanned=replanned, stage=stage, copies=copies))
    before, after = (results[-1].weights[moment]["down_proj"] for moment in (2, 3))
    assert [e for e, _ in before] == list(plan.slots(plan.world_size - 1))
    assert [e for e, _ in after] == list(replanned.slots(plan.world_size - 1))
    assert torch.equal(before[-1][1], after[-1][1]), "home weights stay"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_bfloat16_with_float32_masters(stage, offload):
    device = torch.device("cpu", 0) if offload else CPU  # unequal to the other one, as a host is to a GPU
    check(Case(plan=PLANS["even"], stage=stage, copies=2, dtype=torch.bfloat16, state_device=device))


@pytest.mark.parametrize("stage", [1, 3])
def test_offloaded_masters_of_the_same_type(stage):
    check(Case(plan=PLANS["even"], stage=stage, copies=2, state_device=torch.device("cpu", 0)))


BROKEN = {
    "gradients of copies stay where they are": {check_norms, check_states, check_in_use},
    "copies are not refreshed": {check_norms, check_states, check_copies, check_in_use},
    "the norm counts copies": {check_norms},
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_errors_are_found(stage, broken):
    case = Case(plan=PLANS["even"], stage=stage, copies=2, broken=broken)
    results = run_distributed(train, case.world, case)
    red = set()
    for part in (check_norms, check_states, check_copies, check_in_use):
        try:
            part(case, results)
        except AssertionError:
            red.add(part)
    assert red == BROKEN[broken]


def interrupted(rank: int, case: Case) -> str:
    store, layer = build(case, build_groups(Topology(world=case.world, expert=case.plan.world_size)))
    with layer.fetch() as weights:
        loss = weights.gate_up_LIH.sum() + weights.down_LHI.sum()
    loss.backward()
    try:
        store.set_plans([case.plan])
    except AssertionError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", [1, 3])
def test_no_new_plan_in_the_middle_of_a_step(stage):
    for message in run_distributed(interrupted, 2, Case(plan=PLANS["even"], stage=stage)):
        assert "in the middle of a step" in message


def test_bytes_count_copies_and_their_gradients():
    unit = sum(torch.Size(shape).numel() for shape in SHAPES.values()) * 8
    case = Case(plan=PLANS["even"], copies=2)  # 2 experts at home on 2 ranks, 1 copy
    held = [run_distributed(train, 4, replace(case, stage=stage))[0].bytes_held for stage in range(4)]
    assert held[0] == {"weights": 3 * unit, "gradients": 3 * unit, "states": 4 * unit}
    assert held[1] == {"weights": 3 * unit, "gradients": 3 * unit, "states": 2 * unit}
    assert held[2] == {"weights": 3 * unit, "gradients": 2 * unit, "states": 2 * unit}
    assert held[3] == {"weights": 2 * unit, "gradients": 2 * unit, "states": 2 * unit}


def exchanges(rank: int, case: Case, redundant: bool) -> list[str]:
    """Collectives over the EP group in a step, by where they were issued."""
    from unittest.mock import patch

    from moe_train.optim import replicas

    case = case if redundant else replace(case, plan=SlotPlan(case.plan.num_experts, case.plan.world_size))
    store, layer = build(case, build_groups(Topology(world=case.world, expert=case.plan.world_size)))
    where, issued = "", []
    original = replicas.all_to_all_rows

    def counted(*args: Any) -> torch.Tensor:
        issued.append(where)
        return original(*args)

    with patch.object(replicas, "all_to_all_rows", counted):
        for _ in range(MICRO_BATCHES):
            where = "micro-batch"
            with layer.fetch() as weights:
                loss = weights.gate_up_LIH.square().sum() + weights.down_LHI.square().sum()
            loss.backward()
        where = "finish"
        store.finish_gradients()
        where = "norm"
        store.squared_norm()
        where = "step"
        store.step(1.0)
    return issued


@pytest.mark.parametrize("stage", [0, 3])
def test_copies_are_exchanged_once_per_step_and_tensor_and_not_at_all_without_any(stage):
    case = Case(plan=PLANS["even"], stage=stage)
    assert run_distributed(exchanges, 2, case, True) == [["finish", "finish", "step", "step"]] * 2
    assert run_distributed(exchanges, 2, case, False) == [[]] * 2
