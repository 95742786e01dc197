"""The expert store against one unsharded AdamW: weights, norm and bytes, at every stage and layout."""

import gc
import time
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch

from moe_train.config.schema import OptimizerSection
from moe_train.moe import SlotPlan, assign_experts
from moe_train.optim import (
    ExpertStore,
    ExpertTensor,
    LayerExperts,
    ShardOptions,
    SharedExpertSource,
    decays,
    optimizer_factory,
)
from moe_train.parallel import ParallelGroup, Topology, build_groups
from moe_train.parallel.tensor_slice import TensorSlice
from moe_train.testing import assert_close, run_distributed

EXPERTS, SHAPES = 5, {"gate_up_proj": (6, 3), "down_proj": (3, 3)}
SECTION = OptimizerSection(lr=0.05, weight_decay=0.3)
STEPS, MICRO_BATCHES = 3, 2


def initial(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(EXPERTS, *SHAPES[name], generator=generator, dtype=torch.float64)


def coefficient(name: str, step: int, micro: int, rank: int) -> torch.Tensor:
    """d loss / d weight of one micro-batch on one rank."""
    generator = torch.Generator().manual_seed(hash((len(name), step, micro, rank)) % 2**31)
    return torch.randn(EXPERTS, *SHAPES[name], generator=generator, dtype=torch.float64)


def build(groups, stage: int, dtype=torch.float64, keep_gathered=False) -> tuple[ExpertStore, LayerExperts]:
    device = torch.device("cpu")
    options = ShardOptions(
        stage=stage, compute_dtype=dtype, grad_dtype=torch.float32, device=device, state_device=device,
        keep_gathered=keep_gathered,
    )  # fmt: skip
    plan = SlotPlan(EXPERTS, groups.expert.world_size)
    tensors = {
        name: ExpertTensor.routed(f"layer.experts.{name}", plan, shape, groups.expert, groups.expert_data, options)
        for name, shape in SHAPES.items()
    }
    for name, tensor in tensors.items():
        for expert in tensor.units:
            tensor.write_expert(expert, initial(name)[expert])
    store = ExpertStore(
        list(tensors.values()),
        optimizer_factory(SECTION, device),
        decays(SECTION),
        groups.world,
        groups.world.world_size,
    )
    store.publish()
    return store, LayerExperts(tensors["gate_up_proj"], tensors["down_proj"])


def train(rank: int, world: int, expert: int, stage: int):
    """Each rank's loss is linear in its slice, with the coefficients that the tokens of its EP group would bring."""
    groups = build_groups(Topology(world=world, expert=expert))
    store, layer = build(groups, stage)
    first, count = assign_experts(EXPERTS, expert, groups.expert.rank_in_group)
    held = slice(first, first + count)
    ep_ranks = groups.expert.ranks
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            with layer.fetch() as weights:
                # what arrives at an expert is the sum over the tokens of its EP group
                up = sum(coefficient("gate_up_proj", step, micro, r)[held] for r in ep_ranks)
                down = sum(coefficient("down_proj", step, micro, r)[held] for r in ep_ranks)
                loss = (weights.gate_up_LIH * up).sum() + (weights.down_LHI * down).sum()
            loss.backward()
        store.finish_gradients()
        norms.append(float(store.squared_norm()) ** 0.5)
        store.step(0.5)
    with torch.no_grad(), layer.fetch() as weights:
        return weights.gate_up_LIH.clone(), weights.down_LHI.clone(), norms, store.bytes_held()


def oracle(world: int, average_over: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    params = {name: torch.nn.Parameter(initial(name)) for name in SHAPES}
    optimizer = torch.optim.AdamW(params.values(), lr=0.05, betas=SECTION.betas, eps=SECTION.eps, weight_decay=0.3)
    norms = []
    for step in range(STEPS):
        for name, p in params.items():
            terms = [coefficient(name, step, m, r) for m in range(MICRO_BATCHES) for r in range(world)]
            p.grad = torch.stack(terms).sum(0) / (average_over or world)
        norms.append(float(torch.cat([p.grad.flatten() for p in params.values()]).norm()))
        for p in params.values():
            p.grad *= 0.5
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}, norms


LAYOUTS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "expert"), LAYOUTS)
def test_three_steps_equal_one_process(world, expert, stage):
    results = run_distributed(train, world, world, expert, stage)
    params, norms = oracle(world)
    for rank, (gate_up, down, found, _) in enumerate(results):
        first, count = assign_experts(EXPERTS, expert, rank % expert)
        assert_close(gate_up, params["gate_up_proj"][first : first + count], f"gate_up on rank {rank}", floor=1.0)
        assert_close(down, params["down_proj"][first : first + count], f"down on rank {rank}", floor=1.0)
        assert found == pytest.approx(norms, rel=1e-12), "each logical element is counted once"


def test_bytes_per_rank_fall_with_the_stage():
    held = {stage: run_distributed(train, 4, 4, 2, stage)[0][3] for stage in range(4)}
    experts = assign_experts(EXPERTS, 2, 0)[1]
    slice_bytes = experts * sum(torch.Size(s).numel() for s in SHAPES.values()) * 8  # float64
    assert held[0] == {"weights": slice_bytes, "gradients": slice_bytes, "states": 2 * slice_bytes}
    share = [-(-experts * torch.Size(s).numel() // 2) * 8 for s in SHAPES.values()]  # padded to two shards
    assert held[1]["states"] == 2 * sum(share)
    assert held[2] == {"weights": 2 * sum(share), "gradients": sum(share), "states": 2 * sum(share)}
    assert held[3] == {"weights": sum(share), "gradients": sum(share), "states": 2 * sum(share)}


def saved_weights(rank: int, shared: bool) -> tuple[bool, bool]:
    """Whether autograd holds on to weights between forward and backward at stage 3, gathered again or kept."""
    groups = build_groups(Topology(world=2, expert=1))
    kept = []
    for keep in (False, True):
        store, source = build(groups, 3, keep_gathered=keep)
        if shared:
            store, source = build_shared(groups, 3, keep_gathered=keep)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        held: list[torch.Tensor] = []
        original = store.tensors[0].gather
        store.tensors[0].gather = lambda original=original, held=held: held.append(original()) or held[-1]  # type: ignore
        with source.fetch() as weights:
            if isinstance(weights, dict):
                out = torch.einsum("th,ih->ti", x, weights["gate_proj.weight"])
            else:
                out = torch.einsum("th,eih->tei", x, weights.gate_up_LIH)
        alive = weakref.ref(held[0].untyped_storage())
        del weights, held[:]
        gc.collect()
        for _ in range(0 if keep else 100):  # gloo's own thread lets go of what it sent when it gets round to it
            if alive() is None:
                break
            time.sleep(0.1)
        kept.append(alive() is not None)
        out.sum().backward()
    return tuple(kept)  # type: ignore[return-value]


@pytest.mark.parametrize("shared", [False, True])
def test_stage_3_holds_no_gathered_weights_between_forward_and_backward(shared):
    assert run_distributed(saved_weights, 2, shared) == [(False, True)] * 2


def fragments(rank: int, world: int, expert: int, stage: int):
    groups = build_groups(Topology(world=world, expert=expert))
    store, _ = build(groups, stage)
    return [
        (f.name, f.expert, f.shape, f.start, f.stop, f.views["master"].clone()) for f in store.fragments() if f.owner
    ]


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(("world", "expert"), LAYOUTS)
def test_fragments_cover_every_logical_expert_once(world, expert, stage):
    pieces = [piece for rank in run_distributed(fragments, world, world, expert, stage) for piece in rank]
    for name, shape in SHAPES.items():
        for e in range(EXPERTS):
            mine = sorted((p[3], p[4], p[5]) for p in pieces if p[0].endswith(name) and p[1] == e)
            assert torch.equal(torch.cat([values for _, _, values in mine]), initial(name)[e].flatten())
            assert all(p[2] == shape for p in pieces if p[0].endswith(name) and p[1] == e)


def test_a_rank_without_experts_needs_no_optimizer():
    group = ParallelGroup.single()
    device = torch.device("cpu")
    options = ShardOptions(
        stage=1, compute_dtype=torch.float32, grad_dtype=torch.float32, device=device, state_device=device
    )
    tensor = ExpertTensor("e", [], (2, 2), group, options, num_experts=3)
    store = ExpertStore([tensor], optimizer_factory(SECTION, device), decays(SECTION), group, 4)
    store.finish_gradients()
    assert float(store.squared_norm()) == 0.0
    store.step(1.0)


# ---- a whole module on some of the ranks

MODULE = {
    "gate_proj.weight": (4, 3), "down_proj.weight": (3, 4), "expert_gate.weight": (1, 3), "norm.weight": (5,)
}  # fmt: skip


def drawn(*key: Any, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = tuple(sum(part.encode()) if isinstance(part, str) else part for part in key)
    generator = torch.Generator().manual_seed(hash(numbers) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build_shared(groups, stage: int, holders: int = 1, keep_gathered=False) -> tuple[ExpertStore, SharedExpertSource]:
    """Ranks below `holders` of each EP group hold the module."""
    device = torch.device("cpu")
    options = ShardOptions(
        stage=stage, compute_dtype=torch.float64, grad_dtype=torch.float32, device=device, state_device=device,
        keep_gathered=keep_gathered,
    )  # fmt: skip
    units = [None] if groups.expert.rank_in_group < holders else []
    tensors = {
        name: ExpertTensor(f"layer.shared.{name}", units, shape, groups.expert_data, options)
        for name, shape in MODULE.items()
    }
    for name, tensor in tensors.items():
        if units:
            tensor.write_expert(None, drawn(name, shape=MODULE[name]))
    factory = optimizer_factory(SECTION, device)
    store = ExpertStore(list(tensors.values()), factory, decays(SECTION), groups.world, groups.world.world_size)
    store.publish()
    return store, SharedExpertSource(tensors)


def curved(weight: torch.Tensor, *key: Any) -> torch.Tensor:
    """A loss whose gradient depends on the weight."""
    shape = tuple(weight.shape)
    slope, curvature = drawn(0, *key, shape=shape), drawn(1, *key, shape=shape).abs()
    return (slope * weight + 0.5 * curvature * weight.square()).sum()


def train_shared(rank: int, world: int, expert: int, stage: int):
    groups = build_groups(Topology(world=world, expert=expert))
    issued: list[str] = []
    holds = groups.expert.rank_in_group == 0
    group = groups.expert_data
    methods = {name: getattr(group, name) for name in ("all_reduce_", "all_gather_", "reduce_scatter")}
    for name, method in methods.items():
        setattr(group, name, lambda *args, name=name, method=method: issued.append(name) or method(*args))
    store, source = build_shared(groups, stage)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            with source.fetch() as weights:
                assert set(weights) == (set(MODULE) if holds else set())
                assert all(tuple(weights[name].shape) == MODULE[name] for name in weights)
                loss = sum(curved(weight, name, step, micro, rank) for name, weight in weights.items())
            if holds:
                loss.backward()  # type: ignore[union-attr]
        store.finish_gradients()
        norms.append(float(store.squared_norm()) ** 0.5)
        store.step(0.5)
    fragments = [(f.name, f.expert, f.shape, f.start, f.stop) for f in store.fragments() if f.owner]
    wanted = {(tensor.name, unit) for tensor in store.tensors for unit in tensor.logical_units}
    with torch.no_grad(), source.fetch() as weights:
        return {name: weight.clone() for name, weight in weights.items()}, norms, fragments, wanted, issued


def shared_oracle(world: int, holders: list[int]) -> tuple[dict[str, torch.Tensor], list[float]]:
    params = {name: torch.nn.Parameter(drawn(name, shape=shape)) for name, shape in MODULE.items()}
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=SECTION.betas, eps=SECTION.eps)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for name, p in params.items():
            sum(curved(p, name, step, m, r) for m in range(MICRO_BATCHES) for r in holders).backward()  # type: ignore
            p.grad /= world
        norms.append(float(torch.cat([p.grad.flatten() for p in params.values()]).norm()))
        for p in params.values():
            p.grad *= 0.5
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_a_module_on_some_ranks_equals_one_process(world, expert, stage):
    results = run_distributed(train_shared, world, world, expert, stage)
    holders = list(range(0, world, expert))
    params, norms = shared_oracle(world, holders)
    covered = dict.fromkeys(MODULE, 0)
    for rank, (weights, found, fragments, wanted, issued) in enumerate(results):
        assert found == pytest.approx(norms, rel=1e-12), f"rank {rank}"
        assert wanted == {(f"layer.shared.{name}", None) for name in MODULE}, "every rank knows what there is"
        for name, weight in weights.items():
            assert_close(weight, params[name], f"{name} on rank {rank}", floor=1.0)
        if rank in holders:
            assert set(weights) == set(MODULE)
        else:
            assert not weights
            assert not fragments
            assert not issued
        for full_name, unit, shape, start, stop in fragments:
            name = full_name.removeprefix("layer.shared.")
            assert (unit, shape) == (None, MODULE[name])
            covered[name] += stop - start
    assert covered == {name: torch.Size(shape).numel() for name, shape in MODULE.items()}


# ---- parts of tensor parallelism

CUTS = {"gate_up_proj": [(0, 2), (2, 3)], "down_proj": [(0, 2), (2, 3)]}
"""Of the intermediate size 3, uneven."""


def part_of(name: str, tensor_rank: int) -> TensorSlice:
    make = TensorSlice.fused if name == "gate_up_proj" else TensorSlice.columns
    return make(SHAPES[name], *CUTS[name][tensor_rank])


def train_parts(rank: int, stage: int):
    """Every expert cut in two, each half on two ranks that see different tokens."""
    groups = build_groups(Topology(world=4, expert=1, expert_tensor=2))
    tensor_rank, copy = groups.expert_tensor.rank_in_group, groups.expert_data.rank_in_group
    device = torch.device("cpu")
    options = ShardOptions(
        stage=stage, compute_dtype=torch.float64, grad_dtype=torch.float32, device=device, state_device=device
    )
    plan = SlotPlan(EXPERTS, 1)
    tensors = [
        ExpertTensor.routed(
            f"layer.experts.{name}", plan, shape, groups.expert, groups.expert_data, options, part_of(name, tensor_rank)
        )
        for name, shape in SHAPES.items()
    ]
    for tensor, name in zip(tensors, SHAPES, strict=True):
        for expert in tensor.units:
            tensor.write_expert(expert, initial(name)[expert])
    store = ExpertStore(tensors, optimizer_factory(SECTION, device), decays(SECTION), groups.world, 3)
    store.publish()
    layer, norms = LayerExperts(*tensors), []
    for step in range(STEPS):
        with layer.fetch() as weights:
            loss = torch.zeros((), dtype=torch.float64)
            for name, stacked in zip(SHAPES, (weights.gate_up_LIH, weights.down_LHI), strict=True):
                terms = coefficient(name, step, 0, copy)
                loss = loss + sum(
                    (value * part_of(name, tensor_rank).take(term)).sum()
                    for value, term in zip(stacked, terms, strict=True)
                )
        loss.backward()
        store.finish_gradients()
        norms.append(float(store.squared_norm()) ** 0.5)
        store.step(0.5)
    return [f for f in store.fragments() if f.owner], norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_of_experts_equal_whole_ones(stage):
    results = run_distributed(train_parts, 4, stage)
    with patch(f"{__name__}.MICRO_BATCHES", 1):
        params, norms = oracle(2, average_over=3)
    for name, shape in SHAPES.items():
        for expert in range(EXPERTS):
            whole = torch.full(shape, float("nan"), dtype=torch.float64)
            for tensor_rank in range(2):
                part = part_of(name, tensor_rank)
                local = torch.full((part.numel,), float("nan"), dtype=torch.float64)
                for fragments, _ in results:
                    for f in fragments:
                        if f.name.endswith(name) and f.expert == expert and f.part == part:
                            assert f.shape == shape
                            assert local[f.start : f.stop].isnan().all(), "held twice"
                            local[f.start : f.stop] = f.views["master"]
                part.put(whole, local)
            assert_close(whole, params[name][expert], f"{name}, expert {expert}", floor=1.0)
    for _, found in results:
        assert found == pytest.approx(norms, rel=1e-12), "each part counts, and each once"
