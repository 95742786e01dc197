"""The version of expert weights: another one whenever forward's weights may be others, the same in between."""

from itertools import pairwise

import pytest
import torch
from test_expert_shard import EXPERTS, SHAPES, build

from moe_train.moe import SlotPlan, plan_slots
from moe_train.optim import ExpertTensor, ShardOptions
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed


def versions(rank: int, world: int, stage: int) -> list[tuple[object, float]]:
    """After building, after each of two micro-batches, and after each of two steps; beside the sum of the weights."""
    store, layer = build(build_groups(Topology(world=world, expert=1)), stage, torch.bfloat16)
    found = []

    def note() -> None:
        with layer.fetch() as weights:
            total = float(weights.gate_up_LIH.double().sum() + weights.down_LHI.double().sum())
            found.append((weights.version, total))

    note()
    for _ in range(2):
        for _ in range(2):
            with layer.fetch() as weights:
                (weights.gate_up_LIH.float().sum() + weights.down_LHI.float().sum()).backward()
            note()
        store.finish_gradients()
        store.step(1.0)
        note()
    return found


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1), (2, 2), (1, 3)])
def test_changes_with_the_weights_and_with_nothing_else(world, stage):
    for found in run_distributed(versions, world, world, stage):
        assert len(found) == 7
        for (one, before), (other, after) in pairwise(found):
            assert (one == other) == (before == after)
        assert len({version for version, _ in found}) == 3


def test_weights_gathered_at_stage_3_have_none():
    for found in run_distributed(versions, 2, 2, 3):
        assert {version for version, _ in found} == {None}


def written_in_place(rank: int) -> bool:
    store, layer = build(build_groups(Topology(world=1, expert=1)), 1, torch.bfloat16)
    with layer.fetch() as weights:
        before = weights.version
    assert store.tensors[0].buffer is not None
    store.tensors[0].buffer.zero_()
    with layer.fetch() as weights:
        return before != weights.version


def test_whoever_writes_them_without_a_word_is_seen():
    assert run_distributed(written_in_place, 1) == [True]


def moved(rank: int) -> tuple[bool, bool]:
    """Other copies: the plan is new, the weights of home slots are not."""
    groups = build_groups(Topology(world=2, expert=2))
    cpu, shape = torch.device("cpu"), SHAPES["down_proj"]
    options = ShardOptions(
        stage=1, compute_dtype=torch.bfloat16, grad_dtype=torch.float32, device=cpu, state_device=cpu
    )
    plan = plan_slots(EXPERTS, 2, 0, 1)
    tensor = ExpertTensor.routed("layer.experts.down_proj", plan, shape, groups.expert, groups.expert_data, options)
    tensor.publish()
    before = tensor.version
    tensor.set_plan(other_copies(plan))
    return before is not None, before != tensor.version


def other_copies(plan: SlotPlan) -> SlotPlan:
    loads = [1.0] * EXPERTS
    loads[-1 if plan.replicas[0] else 0] = 9.0
    return plan_slots(EXPERTS, 2, 0, 1, loads)


def test_moved_copies_are_other_weights():
    assert run_distributed(moved, 2) == [(True, True)] * 2
