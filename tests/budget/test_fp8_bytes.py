"""Weights in FP8 in a plan, against those that a layer keeps after a forward."""

from unittest.mock import patch

import pytest
import torch
from small_configs import FAMILIES, small_recipe

from moe_train.budget import Hardware, plan_run
from moe_train.budget.states import held_bytes
from moe_train.errors import ConfigError
from moe_train.kernels import choose
from moe_train.model.build import meta_model
from moe_train.model.held import held_by
from moe_train.moe import fp8, paying_gemms
from moe_train.parallel import build_groups, resolve_topology
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun

pytest.importorskip("triton", reason="the test extra installs it on Linux")
HARDWARE = Hardware(name="a machine", flops=1e12, efficiency=0.5, link=1e9, network=1e8)


def run_of(world: int, parallel: dict, stage: int, experts: str | None) -> ResolvedRun:
    recipe = small_recipe(
        "qwen3_moe",
        model={"config": FAMILIES["qwen3_moe"] | {"moe_intermediate_size": 48}},
        parallel=parallel,
        zero={"stage": stage},
        precision={"compute": "bf16", "experts": experts},
    )
    return ResolvedRun.at(recipe, resolve_topology(parallel["expert"], world, 60, world))


def kept(rank: int, *case) -> int:
    run = run_of(*case, "fp8")
    with patch.object(choose, "runs_triton", lambda device: False):
        built, _ = build_sharded_model(run, build_groups(run.topology), torch.device("cpu"))
        with built.context.micro_batch():
            built.model(input_ids=torch.randint(0, 61, (2, 16)))
    assert all(layer.fp8 is not None for layer in built.layers)
    return sum(part.nbytes for layer in built.layers for part in layer.fp8._quantised)  # type: ignore[union-attr]


def planned(rank: int, *case) -> int:
    totals = []
    for experts in ("fp8", None):
        run = run_of(*case, experts)
        model = meta_model(run.recipe, run.model_config)
        held = held_by(rank, model, run.recipe, run.plan, run.topology)
        totals.append(held_bytes(held, run.recipe, run.topology)[0].weights)
    return totals[0] - totals[1]


@pytest.mark.parametrize(
    ("world", "parallel", "stage"),
    [(1, {"expert": 1}, 1), (2, {"expert": 2, "redundant_experts": 2}, 1), (2, {"expert": 1}, 3)],
)
def test_bytes_are_those_that_are_kept(world, parallel, stage):
    measured = run_distributed(kept, world, world, parallel, stage)
    with patch.object(fp8, "_pays", lambda k, n: True):  # on a CPU all products run in FP8
        assert [planned(rank, world, parallel, stage) for rank in range(world)] == measured
    assert all(measured) == (stage < 3)


def test_a_product_in_bf16_keeps_nothing():
    hidden = FAMILIES["qwen3_moe"]["hidden_size"]
    assert not paying_gemms(hidden, 48).names
    assert planned(0, 1, {"expert": 1}, 1) == 0


def test_a_plan_is_refused_as_the_run_would_be_and_counts_a_gathered_layer():
    with pytest.raises(ConfigError, match="none of the experts' products faster"):
        plan_run(run_of(1, {"expert": 1}, 1, "fp8"), HARDWARE)
    with patch.object(fp8, "_pays", lambda k, n: True):
        plans = [plan_run(run_of(2, {"expert": 1}, 3, experts), HARDWARE) for experts in ("fp8", None)]
    experts, hidden = (FAMILIES["qwen3_moe"][key] for key in ("num_experts", "hidden_size"))
    largest = experts * (
        2 * 48 * hidden + 4 * (2 * 48 + hidden) / 2
    )  # gate_up: one byte each, scales one way on average
    assert plans[0].temporary - plans[1].temporary == largest
    assert plans[0].experts == plans[1].experts
