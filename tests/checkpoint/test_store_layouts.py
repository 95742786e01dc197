"""An expert store saved under one layout goes on under any other: redundant copies, shared ranks, tensor parallelism.

Routed experts and a shared one, two steps before the checkpoint and one after it, against one process.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_train.checkpoint import CheckpointReader, Manifest, save_checkpoint
from moe_train.config.schema import OptimizerSection
from moe_train.errors import CheckpointError
from moe_train.moe import SlotPlan
from moe_train.optim import ExpertStore, ExpertTensor, ShardOptions, TensorSlice, decays, optimizer_factory
from moe_train.optim.expert_sources import fetched
from moe_train.parallel import Groups, ParallelGroup, Topology, build_groups, subgroup
from moe_train.testing import assert_close, run_distributed
from moe_train.train.state import _pieces

EXPERTS, CPU = 5, torch.device("cpu")
ROUTED = {"experts.gate_up_proj": (6, 4), "experts.down_proj": (4, 3)}
SHARED = {"shared.up_proj.weight": (3, 4), "shared.down_proj.weight": (4, 3), "shared.norm.weight": (7,)}
CUT = {
    "experts.gate_up_proj": TensorSlice.fused,
    "experts.down_proj": TensorSlice.columns,
    "shared.up_proj.weight": TensorSlice.rows,
    "shared.down_proj.weight": TensorSlice.columns,
}
"""Of intermediate size 3."""
SECTION = OptimizerSection(lr=0.05, weight_decay=0.3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """copies: ranks with the same routed experts. tensor: ranks that share each expert's width.

    The shared expert is on the plan's shared ranks, or everywhere if there are none.
    """

    plan: SlotPlan
    stage: int
    copies: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.plan.world_size * self.copies * self.tensor


LAYOUTS = {
    "one process": Layout(plan=SlotPlan(EXPERTS, 1), stage=0),
    "shared rank": Layout(plan=SlotPlan(EXPERTS, 3, shared_ranks=1, replicas=((), (), (2,))), stage=1),
    "copies": Layout(plan=SlotPlan(EXPERTS, 2, replicas=((4,), (1, 0))), stage=3, copies=2),
    "tensor parallel": Layout(plan=SlotPlan(EXPERTS, 2, replicas=((), (2,))), stage=2, tensor=2),
}


def build(layout: Layout, groups: Groups) -> ExpertStore:
    options = ShardOptions(
        stage=layout.stage,
        compute_dtype=torch.float64,
        grad_dtype=torch.float64,
        device=CPU,
        state_device=CPU,
    )
    ends = [(0, 2), (2, 3)][groups.tensor.rank_in_group] if layout.tensor > 1 else None

    def part_of(name: str, shape: tuple[int, ...]) -> TensorSlice | None:
        return CUT[name](shape, *ends) if ends and name in CUT else None

    tensors = [
        ExpertTensor.routed(
            name, layout.plan, shape, groups.expert, groups.expert_data, options, part=part_of(name, shape)
        )
        for name, shape in ROUTED.items()
    ]
    for name, shape in SHARED.items():
        holds = not layout.plan.shared_ranks or groups.expert.rank_in_group < layout.plan.shared_ranks
        part = part_of(name, shape)
        group = groups.data if part else shared_group(layout)
        tensors.append(ExpertTensor(name, [None] if holds else [], shape, group, options, part=part))
    for tensor in tensors:
        for unit in tensor.units:
            tensor.write_expert(unit, drawn(tensor.name, unit, 0))
    store = ExpertStore(tensors, optimizer_factory(SECTION, CPU), decays(SECTION), groups.world, 1)
    store.publish()
    return store


def shared_group(layout: Layout) -> ParallelGroup:
    size, held = layout.plan.world_size, layout.plan.shared_ranks or layout.plan.world_size
    ranks = [rank for rank in range(layout.world) if rank // layout.tensor % size < held]
    return subgroup([ranks]) or ParallelGroup.single()


def drawn(name: str, unit: int | None, number: int) -> torch.Tensor:
    key = (sum(name.encode()), -1 if unit is None else unit, number)
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn((ROUTED | SHARED)[name], generator=generator, dtype=torch.float64)


def loss_of(weight: torch.Tensor, name: str, unit: int | None, step: int, part: TensorSlice | None = None):
    slope, curvature = drawn(name, unit, 2 * step + 1), drawn(name, unit, 2 * step + 2).abs()
    if part:
        slope, curvature = part.take(slope), part.take(curvature)
    return (slope * weight + 0.5 * curvature * weight.square()).sum()


def one_step(layout: Layout, store: ExpertStore, step: int) -> float:
    """All holders of an element share its loss equally."""
    with fetched(store.tensors, torch.zeros((), requires_grad=True)) as values:
        loss = torch.zeros((), dtype=torch.float64)
        for tensor, stacked in zip(store.tensors, values, strict=True):
            for unit, weight in zip(tensor.slots, stacked, strict=True):
                holders = tensor.group.world_size
                if unit is not None:
                    holders *= len(layout.plan.replica_ranks(unit))
                loss = loss + loss_of(weight, tensor.name, unit, step, tensor.part) / holders
            loss = loss + 0.0 * stacked.sum()
    loss.backward()
    store.finish_gradients()
    norm = float(store.squared_norm()) ** 0.5
    store.step(1.0)
    return norm


def train_and_save(rank: int, layout: Layout, root: str) -> list[float]:
    groups = build_groups(Topology(**topology_of(layout)))
    store = build(layout, groups)
    norms = [one_step(layout, store, step) for step in range(2)]
    found = [scalars for scalars in groups.world.gather_objects(store.scalars()) if scalars]
    manifest = Manifest(step=2, model_type="tiny", layout={}, recipe={}, scalars={"experts": found[0]}, state={})
    save_checkpoint(Path(root), manifest, _pieces(f for f in store.fragments() if f.owner), groups.world, 1)
    return norms


def topology_of(layout: Layout) -> dict[str, int]:
    return {
        "world": layout.world,
        "expert": layout.plan.world_size,
        "tensor": layout.tensor,
        "expert_tensor": layout.tensor,
    }


def load_and_go_on(rank: int, layout: Layout, root: str):
    groups = build_groups(Topology(**topology_of(layout)))
    store = build(layout, groups)
    for tensor in store.tensors:
        tensor.master.data.fill_(float("nan"))
    reader = CheckpointReader(Path(root) / "step_00000002")
    wanted = {(tensor.name, unit) for tensor in store.tensors for unit in tensor.logical_units}
    reader.check(list(_pieces(store.fragments(), kinds={"master"})), wanted)
    assert reader.kinds() == {"master", "exp_avg", "exp_avg_sq"}
    store.allocate_state(reader.kinds(), reader.manifest.scalars["experts"])
    reader.fill(_pieces(store.fragments()))
    store.publish()
    norm = one_step(layout, store, 2)
    weights = [(t.name, t.part, list(zip(t.slots, t.gather().clone(), strict=True))) for t in store.tensors]
    return norm, weights


def oracle() -> tuple[list[float], dict[tuple[str, int | None], torch.Tensor]]:
    keys = [(name, expert) for name in ROUTED for expert in range(EXPERTS)] + [(name, None) for name in SHARED]
    params = {key: torch.nn.Parameter(drawn(*key, 0)) for key in keys}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": 0.3},
            {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=0.05,
        betas=SECTION.betas,
        eps=SECTION.eps,
    )
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        for key, p in params.items():
            loss_of(p, *key, step).backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in params.values()]).norm()))
        optimizer.step()
    return norms, {key: p.detach() for key, p in params.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, tmp_path_factory) -> tuple[Path, list[float]]:
    root, layout = tmp_path_factory.mktemp("saved"), LAYOUTS[request.param]
    norms = run_distributed(train_and_save, layout.world, layout, str(root))
    return root, norms[0]


@pytest.mark.parametrize("target", LAYOUTS)
def test_another_layout_goes_on(saved, target):
    root, before = saved
    norms, expected = oracle()
    assert before == pytest.approx(norms[:2], rel=1e-12)
    layout = LAYOUTS[target]
    seen = set()
    for rank, (norm, weights) in enumerate(run_distributed(load_and_go_on, layout.world, layout, str(root))):
        assert norm == pytest.approx(norms[2], rel=1e-12), f"rank {rank}"
        for name, part, slots in weights:
            for unit, weight in slots:
                whole = expected[name, unit]
                assert_close(weight, part.take(whole) if part else whole, f"{name} [{unit}], rank {rank}", floor=1.0)
                seen.add((name, unit))
    assert seen == set(expected)


def test_each_logical_element_is_stored_once(saved):
    manifest = CheckpointReader(saved[0] / "step_00000002").manifest
    stored: dict[tuple, int] = {}
    for item in manifest.slices:
        stored[item.tensor] = stored.get(item.tensor, 0) + item.stop - item.start
    _, expected = oracle()
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert stored == {(kind, *key): value.numel() for kind in kinds for key, value in expected.items()}


def test_a_store_without_its_shared_expert_is_refused(saved):
    reader = CheckpointReader(saved[0] / "step_00000002")
    with pytest.raises(CheckpointError, match=r"shared\.norm\.weight is in the checkpoint, not in the model"):
        reader.check([], {(name, e) for name in ROUTED for e in range(EXPERTS)})
