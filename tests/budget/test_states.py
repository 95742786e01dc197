"""Bytes of weights, gradients and states, against the tensors that a real engine holds just before its step."""

from collections.abc import Iterable

import pytest
import torch
from small_configs import FAMILIES, small_recipe

from moe_train.budget.states import StateBytes, held_bytes
from moe_train.model.build import meta_model
from moe_train.model.held import held_by
from moe_train.optim import Engine, optimizer_factory
from moe_train.parallel import build_groups, resolve_topology
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun

CPU = torch.device("cpu")
LAYOUTS = {
    "one rank": (1, "qwen3_moe", {"expert": 1}),
    "uneven": (3, "qwen3_moe", {"expert": 3, "redundant_experts": 1}),
    "holders": (3, "mixtral", {"expert": 1}),
    "shared ranks": (4, "deepseek_v3", {"expert": 2, "shared_expert_ranks": 1}),
    "TP 2, cut shared experts": (4, "deepseek_v3", {"tensor": 2, "expert": 2, "shared_expert_tensor": True}),
    "TP 2, expert TP 2": (4, "olmoe", {"tensor": 2, "expert_tensor": 2, "expert": 2}),
}
PRECISIONS = [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")]


def run_of(world: int, family: str, parallel: dict, stage: int, compute: str, gradients: str) -> ResolvedRun:
    recipe = small_recipe(
        family,
        # 62 ids: on three ranks DeepSpeed's padding to 2 W is then another one than to W
        model={"config": FAMILIES[family] | {"vocab_size": 62}},
        parallel=parallel,
        zero={"stage": stage},
        precision={"compute": compute, "gradients": gradients},
        batch={"global_size": 24},
    )
    sizes = {"tensor": 1, "expert_tensor": 1} | {k: v for k, v in parallel.items() if k in ("tensor", "expert_tensor")}
    return ResolvedRun.at(recipe, resolve_topology(parallel["expert"], world, 60, world, **sizes))


def storages(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in flat(item)]


def really_held(rank: int, layout: str, cases: list[tuple[int, str, str]]) -> list[tuple[StateBytes, StateBytes]]:
    found = []
    for case in cases:
        run = run_of(*LAYOUTS[layout], *case)
        groups = build_groups(run.topology)
        built, store = build_sharded_model(run, groups, CPU)
        factory = optimizer_factory(run.recipe.optimizer, CPU)
        engine = Engine(built.model, store, factory, run.recipe, groups, run.accumulation)
        for step in range(2):
            for number in range(run.accumulation):
                with built.context.micro_batch():
                    logits = engine(input_ids=torch.randint(0, 61, (2, 16))).logits
                    engine.backward(logits.float().square().mean(), last=number == run.accumulation - 1)
            if step == 0:
                engine.step(1e-3)  # the states exist from now on
        found.append((StateBytes(**store.bytes_held()), dense_held(engine, list(built.model.parameters()))))
        engine.deepspeed.zero_grad()
    return found


def dense_held(engine: Engine, parameters: list) -> StateBytes:
    wrapper = engine.wrapper
    weights = storages(p.data for p in parameters)
    if hasattr(wrapper, "fp16_partitioned_groups_flat"):  # stage 3: shards, and what is gathered
        weights += storages(flat(wrapper.fp16_partitioned_groups_flat))
    if hasattr(wrapper, "fp32_groups_gradients_flat"):
        gradients = storages([*flat(wrapper.fp32_groups_gradients_flat), *(p.grad for p in parameters)])
    elif hasattr(wrapper, "averaged_gradients"):  # the shares alone: on their borders DeepSpeed keeps whole parameters
        gradients = sum(share.nbytes for share in flat(wrapper.averaged_gradients))
    else:
        gradients = storages(p.grad for p in parameters)
    moments = [v for state in engine.inner.state.values() for v in state.values() if v.dim()]
    masters = [] if engine.plain else engine._flats()
    return StateBytes(weights=weights, gradients=gradients, states=storages([*masters, *moments]))


def cases_of(layout: str) -> list[tuple[int, str, str]]:
    """(stage, compute, gradients): every stage at each layout, and all of them at one."""
    if layout == "holders":
        return [(stage, *precision) for stage in range(4) for precision in PRECISIONS]
    return [(stage, *PRECISIONS[(stage + list(LAYOUTS).index(layout)) % 3]) for stage in (0, 1, 3)]


IN_EVERY_RUN = ("uneven", "TP 2, cut shared experts")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in LAYOUTS]
)
def test_bytes_are_those_of_the_engine(layout):
    world, *_ = LAYOUTS[layout]
    cases = cases_of(layout)
    measured = run_distributed(really_held, world, layout, cases)
    for number, case in enumerate(cases):
        run = run_of(*LAYOUTS[layout], *case)
        model = meta_model(run.recipe, run.model_config)
        for rank in range(world):
            held = held_by(rank, model, run.recipe, run.plan, run.topology)
            expected = held_bytes(held, run.recipe, run.topology)
            assert measured[rank][number] == expected, (case, rank)
