"""A real run's checkpoint, written anew for another layout, lies as a run there saves it; and that run goes on."""

from pathlib import Path

import pytest
import torch
from test_resume import train_and_save
from tiny_run import DEEPSEEK, start, tiny_recipe, write_corpus

from moe_train.checkpoint import read_manifest
from moe_train.checkpoint.compare import compare
from moe_train.checkpoint.reshard import reshard
from moe_train.cli import _cuts
from moe_train.testing import run_distributed

STEP = "step_00000003"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> tuple[dict, Path, dict[int, float]]:
    """Step 3 of 2 ranks, EP 2 with a redundant copy, ZeRO 1; and the losses of the next 3 steps."""
    config = {**DEEPSEEK["config"], "n_routed_experts": 5, "n_group": 1, "topk_group": 1}
    model = {**DEEPSEEK, "config": config}
    recipe = tiny_recipe(corpus, model, moe={"bias_update_rate": 1e-2}, parallel={"expert": 2, "redundant_experts": 1})
    folder = tmp_path_factory.mktemp("saved")
    losses = run_distributed(train_and_save, 2, recipe, str(folder), 3, 6)[0]
    return recipe, folder / "checkpoints" / STEP, losses


TARGETS = {
    "EP 1, ZeRO-3": (2, {"expert": 1}, 3),
    "EP 2, ZeRO-0": (2, {"expert": 2, "redundant_experts": 3}, 0),
    "TP 2, expert TP 2, ZeRO-3": (4, {"expert": 2, "tensor": 2, "expert_tensor": 2}, 3),
    "TP 2, shared experts cut": (4, {"expert": 4, "tensor": 2, "shared_expert_tensor": True}, 1),
    "shared ranks": (4, {"expert": 4, "shared_expert_ranks": 1, "redundant_experts": 1}, 2),
}
FIELDS = {
    **{"expert": "expert", "tensor": "tensor", "expert_tensor": "expert_tensor"},
    **{
        "redundant_experts": "redundant",
        "shared_expert_ranks": "shared_ranks",
        "shared_expert_tensor": "shared_tensor",
    },
}


def lies(checkpoint: Path, names: set[str] | None = None) -> set[tuple]:
    """(rank, kind, name, expert, part, start, stop) of everything but random states."""
    return {
        (int(i.file[5:10]), i.kind, i.name, i.expert, i.part, i.start, i.stop)
        for i in read_manifest(checkpoint).slices
        if i.kind != "rng" and (names is None or i.name in names)
    }


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_saves_what_was_written_for_it(tmp_path, saved, name):
    recipe, source, expected = saved
    world, parallel, stage = TARGETS[name]
    changes = {
        **dict.fromkeys(FIELDS.values(), 0), "expert": 1, "tensor": 1, "expert_tensor": 1,
        **{FIELDS[key]: value for key, value in parallel.items()}, "world": world, "zero": stage,
    }  # fmt: skip
    made = reshard(source, tmp_path / "checkpoints" / STEP, changes, _cuts).destination
    assert compare(source, made).equal
    there = {**recipe, "zero": {"stage": stage}, "parallel": parallel}
    losses = run_distributed(train_and_save, world, there, str(tmp_path), 3, 6)[0]
    again = tmp_path / "again" / "checkpoints" / STEP
    found = compare(made, again)
    assert found.equal, found
    assert losses == pytest.approx(expected, rel=1e-6)
    assert read_manifest(again).layout == read_manifest(made).layout
    # ZeRO 1 and 2 cut the dense part at other places, and ZeRO-0 deals it out in another order
    stored = {i.name for i in read_manifest(again).slices if i.expert is not None or ".shared_experts." in i.name}
    whole = stage == 3
    names = None if whole else stored if "shared" in name else {n for n in stored if ".shared_experts." not in n}
    assert lies(made, names) == lies(again, names)
    parts = {(i.kind, i.name, i.part) for i in read_manifest(made).slices if i.kind != "rng"}
    assert parts == {(i.kind, i.name, i.part) for i in read_manifest(again).slices if i.kind != "rng"}


def test_random_states_are_those_of_the_ranks_that_trained(tmp_path, saved):
    """A run with more ranks than have saved some must not look for its own, whatever the new layout says."""
    recipe, source, expected = saved
    reshard(source, tmp_path / "checkpoints" / STEP, {"world": 4, "redundant": 0}, _cuts)
    there = {**recipe, "parallel": {"expert": 2}}
    losses = run_distributed(train_and_save, 4, there, str(tmp_path), 3, 6)[0]
    assert losses == pytest.approx(expected, rel=1e-6)


def random_state(rank: int, recipe: dict, folder: str) -> bytes:
    return start(recipe, folder) and torch.get_rng_state().numpy().tobytes()


def test_tensor_peers_never_take_the_random_states_of_two_data_ranks(tmp_path, saved):
    """As many ranks as trained, of another kind: peers that share a layer must drop out the same elements."""
    recipe, source, _ = saved
    reshard(source, tmp_path / "checkpoints" / STEP, {"expert": 2, "tensor": 2, "redundant": 0}, _cuts)
    one, other = run_distributed(random_state, 2, {**recipe, "parallel": {"expert": 2, "tensor": 2}}, str(tmp_path))
    assert one == other
