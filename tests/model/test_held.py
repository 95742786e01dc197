"""What a rank holds, worked out from shapes, against models that were really built and swapped at the same layout."""

import pytest
import torch
from small_configs import small_recipe

from moe_train.model import count_parameters
from moe_train.model.build import meta_model
from moe_train.model.held import held_by
from moe_train.parallel import build_groups, resolve_topology
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun

LAYOUTS = {
    "uneven": (3, "qwen3_moe", {"expert": 3, "redundant_experts": 1}),
    "TP 2, EP 2, redundant": (4, "mixtral", {"tensor": 2, "expert": 2, "redundant_experts": 2}),
    "TP 2, cut shared experts": (2, "deepseek_v3", {"tensor": 2, "expert": 1, "shared_expert_tensor": True}),
    "TP 2, expert TP 2": (4, "olmoe", {"tensor": 2, "expert_tensor": 2, "expert": 2}),
    "shared ranks": (4, "qwen2_moe", {"expert": 4, "shared_expert_ranks": 1, "redundant_experts": 3}),
    "shared ranks of two EP groups": (4, "deepseek_v3", {"expert": 2, "shared_expert_ranks": 1}),
}


def run_of(world: int, family: str, parallel: dict) -> ResolvedRun:
    recipe = small_recipe(family, parallel=parallel, batch={"global_size": 24})
    sizes = {"tensor": 1, "expert_tensor": 1} | {k: v for k, v in parallel.items() if k in ("tensor", "expert_tensor")}
    return ResolvedRun.at(recipe, resolve_topology(parallel["expert"], world, 60, world, **sizes))


def really_held(rank: int, world: int, family: str, parallel: dict):
    """Shapes of the model's parameters; name, unit shape, home, copies and holders of what lies beside them."""
    run = run_of(world, family, parallel)
    built, store = build_sharded_model(run, build_groups(run.topology), torch.device("cpu"))
    dense = {name: tuple(p.shape) for name, p in built.model.named_parameters()}
    stored = [
        (t.name, tuple(t.unit_shape), len(t.units), len(t.redundant), t.group.world_size if t.units else None)
        for t in store.tensors
    ]
    return (
        dense,
        stored,
        sum(p.numel() for p in built.model.parameters()) + sum(t.numel + t.copied_numel for t in store.tensors),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_what_its_shapes_say(layout):
    world, family, parallel = LAYOUTS[layout]
    run = run_of(world, family, parallel)
    model = meta_model(run.recipe, run.model_config)
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    for rank, (dense, stored, total) in enumerate(run_distributed(really_held, world, *LAYOUTS[layout])):
        held = held_by(rank, model, run.recipe, run.plan, run.topology)
        assert held.dense == dense
        assert [(p.name, p.unit_shape, p.home, p.copies, p.holders if p.home else None) for p in held.stored] == stored
        place = next(group.index(rank) for group in run.topology.expert_groups() if rank in group)
        assert count.per_rank[place] == total
