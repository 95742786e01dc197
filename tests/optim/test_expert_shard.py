"""The expert store against one unsharded AdamW: weights, norm and bytes, at every stage and layout."""

import pytest
import torch

from moe_train.config.schema import OptimizerSection
from moe_train.moe import Placement, assign_experts
from moe_train.optim import ExpertStore, ExpertTensor, LayerExperts, ShardOptions, decays, optimizer_factory
from moe_train.parallel import ParallelGroup, Topology, build_groups
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
    first, count = assign_experts(EXPERTS, groups.expert.world_size, groups.expert.rank_in_group)
    tensors = {
        name: ExpertTensor(f"layer.experts.{name}", first, count, shape, groups.expert_data, options)
        for name, shape in SHAPES.items()
    }
    for name, tensor in tensors.items():
        for expert in range(first, first + count):
            tensor.write_expert(expert, initial(name)[expert])
    store = ExpertStore(list(tensors.values()), optimizer_factory(SECTION, device), decays(SECTION), groups.world)
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


def oracle(world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    params = {name: torch.nn.Parameter(initial(name)) for name in SHAPES}
    optimizer = torch.optim.AdamW(params.values(), lr=0.05, betas=SECTION.betas, eps=SECTION.eps, weight_decay=0.3)
    norms = []
    for step in range(STEPS):
        for name, p in params.items():
            terms = [coefficient(name, step, m, r) for m in range(MICRO_BATCHES) for r in range(world)]
            p.grad = torch.stack(terms).sum(0) / world
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


def saved_weights(rank: int) -> tuple[int, int]:
    """Bytes that autograd holds on to between forward and backward at stage 3, gathered again or kept."""
    groups = build_groups(Topology(world=2, expert=1))
    sizes = []
    for keep in (False, True):
        _, layer = build(groups, 3, keep_gathered=keep)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        held: list[torch.Tensor] = []
        original = layer.tensors[0].gather
        layer.tensors[0].gather = lambda original=original, held=held: held.append(original()) or held[-1]  # type: ignore
        with layer.fetch() as weights:
            out = torch.einsum("th,eih->tei", x, weights.gate_up_LIH)
        import gc
        import weakref

        alive = weakref.ref(held[0].untyped_storage())
        del weights, held[:]
        gc.collect()
        sizes.append(alive() is not None)
        out.sum().backward()
    return tuple(sizes)  # type: ignore[return-value]


def test_stage_3_holds_no_gathered_weights_between_forward_and_backward():
    assert run_distributed(saved_weights, 2) == [(False, True)] * 2


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


def test_placement_without_experts_needs_no_optimizer():
    group = ParallelGroup.single()
    device = torch.device("cpu")
    options = ShardOptions(
        stage=1, compute_dtype=torch.float32, grad_dtype=torch.float32, device=device, state_device=device
    )
    assert Placement(num_experts=3, world_size=4).experts_per_rank[3] == 0
    store = ExpertStore(
        [ExpertTensor("e", 3, 0, (2, 2), group, options)], optimizer_factory(SECTION, device), decays(SECTION), group
    )
    store.finish_gradients()
    assert float(store.squared_norm()) == 0.0
    store.step(1.0)
