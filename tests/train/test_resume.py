"""A resumed run is the uninterrupted one to the bit; at another layout it starts from the same logical tensors."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import (
    DEEPSEEK,
    QWEN3,
    differences,
    resolve,
    start,
    state_of,
    tiny_recipe,
    train_until,
    weights_of,
    write_corpus,
)

from moe_train.checkpoint import CheckpointReader, Piece, read_manifest
from moe_train.errors import CheckpointError
from moe_train.parallel import build_groups
from moe_train.testing import run_distributed
from moe_train.train.assemble import assemble
from moe_train.train.state import load_state


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def uninterrupted_against_resumed(rank: int, recipe: dict, folder: str) -> tuple[dict, dict, list[str]]:
    """Losses by step of both runs, and the state that differs after step 6."""
    whole = start(recipe, f"{folder}/whole")
    train_until(whole, 6, save=False)
    expected = state_of(whole)  # at once: random streams are the process's, not the run's
    first = start(recipe, f"{folder}/parts")
    train_until(first, 3)
    saved = state_of(first)
    second = start(recipe, f"{folder}/parts")
    assert second.trainer.step == 3
    assert not (problems := differences(saved, state_of(second))), f"right after loading: {problems[:5]}"
    train_until(second, 6, save=False)
    assert second.trainer.history.state_dict() == whole.trainer.history.state_dict()
    parts = first.recorder.logged | second.recorder.logged
    return curve(whole.recorder.logged), curve(parts), differences(expected, state_of(second))


def curve(logged: dict) -> dict:
    """What was logged of the training, without the clock."""
    return {
        step: {key: value for key, value in metrics.items() if not key.startswith(("perf/", "ckpt/"))}
        for step, metrics in logged.items()
        if "train/loss" in metrics
    }


LAYOUTS = [(stage, world) for world in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(("stage", "world"), LAYOUTS, ids=[f"zero{s}-world{w}" for s, w in LAYOUTS])
def test_resumed_equals_uninterrupted(tmp_path, corpus, stage, world):
    """Two micro-batches a step on two ranks, four on one; router losses and the bias update take part."""
    recipe = tiny_recipe(corpus, DEEPSEEK, zero={"stage": stage}, moe={"bias_update_rate": 1e-2, "z_loss_coef": 1e-3})
    check_resume(recipe, tmp_path, world)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_equals_uninterrupted_in_bf16(tmp_path, corpus, stage):
    """Stage 1 is yet another class of DeepSpeed's (BF16_Optimizer); stage 0 exists there in float32 alone."""
    check_resume(tiny_recipe(corpus, zero={"stage": stage}, precision={"compute": "bf16"}), tmp_path, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_resumed_equals_uninterrupted_with_recomputation(tmp_path, corpus, stage):
    """Logging every fourth step: the tokens counted since the last line are part of the state."""
    model = {**QWEN3, "activation_checkpointing": True}
    recipe = tiny_recipe(corpus, model, zero={"stage": stage}, diagnostics={"log_interval": 4}, parallel={"expert": 1})
    check_resume(recipe, tmp_path, 2)


def check_resume(recipe: dict, folder: Path, world: int) -> None:
    for rank, (whole, parts, different) in enumerate(
        run_distributed(uninterrupted_against_resumed, world, recipe, str(folder))
    ):
        assert parts == whole, f"rank {rank}"
        assert len(whole) == 6 // recipe["diagnostics"].get("log_interval", 1)
        assert not different, f"rank {rank}: {different[:5]}"


# ---- another layout


def train_and_save(rank: int, recipe: dict, folder: str, save_at: int, last: int) -> dict[int, float]:
    """Resume if there is something, save at `save_at`, go on to `last`; the losses after the save."""
    run = start(recipe, folder)
    train_until(run, save_at)
    if run.trainer.saved_step == run.trainer.step:  # resumed here: write it again, from this layout
        run.trainer.saver.saved_step = None
        run.trainer.saver.root = Path(folder) / "again" / "checkpoints"
        run.trainer.save()
    before = set(run.recorder.logged)
    train_until(run, last, save=False)
    return {step: loss for step, loss in run.recorder.losses().items() if step not in before}


def logical_tensors(checkpoint: Path) -> dict[tuple, torch.Tensor]:
    """Every tensor of a checkpoint put together from its slices, RNG left out."""
    reader = CheckpointReader(checkpoint)
    found = {}
    for kind in {item.kind for item in reader.manifest.slices} - {"rng"}:
        for (name, expert), shape in reader.tensors(kind).items():
            data = torch.full((math.prod(shape),), float("nan"))
            reader.fill([Piece(name=name, expert=expert, kind=kind, shape=shape, start=0, data=data)])
            found[(kind, name, expert)] = data
    return found


TARGETS = [(1, 1, 0), (2, 1, 2), (2, 2, 3), (2, 1, 3), (2, 2, 0)]


@pytest.fixture(scope="module", params=[6, 5], ids=["even", "uneven"])
def saved_at_2_2_1(request, corpus, tmp_path_factory) -> tuple[dict, Path, dict[int, float]]:
    """Saved at step 3 by 2 ranks, EP 2, ZeRO 1 (5 experts: 3 and 2); and the losses of the next 3 steps."""
    experts = {"n_routed_experts": request.param, "n_group": 1, "topk_group": 1}
    model = {**DEEPSEEK, "config": {**DEEPSEEK["config"], **experts}}
    recipe = tiny_recipe(corpus, model, zero={"stage": 1}, moe={"bias_update_rate": 1e-2})
    folder = tmp_path_factory.mktemp("saved")
    (losses, _) = run_distributed(train_and_save, 2, recipe, str(folder), 3, 6)
    return recipe, folder, losses


@pytest.mark.parametrize(("world", "expert", "stage"), TARGETS, ids=[f"world{w}-ep{e}-zero{z}" for w, e, z in TARGETS])
def test_another_layout_loads_the_same_logical_tensors(tmp_path, saved_at_2_2_1, world, expert, stage):
    recipe, saved, expected = saved_at_2_2_1
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").symlink_to(saved / "checkpoints" / "step_00000003")
    recipe = {**recipe, "zero": {"stage": stage}, "parallel": {"expert": expert}}
    losses = run_distributed(train_and_save, world, recipe, str(tmp_path), 3, 6)[0]
    before = logical_tensors(saved / "checkpoints" / "step_00000003")
    after = logical_tensors(tmp_path / "again" / "checkpoints" / "step_00000003")
    assert {"master", "exp_avg", "exp_avg_sq", "buffer"} == {kind for kind, _, _ in before}
    assert not differences(before, after)
    assert not any(value.isnan().any() for value in before.values())
    assert losses.keys() == expected.keys() == {4, 5, 6}
    assert losses == pytest.approx(expected, rel=1e-6)


# ---- refused


def try_to_load(rank: int, recipe: dict, checkpoint: str) -> tuple[str, list[str]]:
    """The message, and the names of what changed in the assembly."""
    run = resolve(recipe)
    groups = build_groups(run.topology)
    assembly = assemble(run, groups, torch.device("cpu"))
    before = weights_of(assembly)
    try:
        load_state(Path(checkpoint), assembly.engine, assembly.built, groups, assembly.data.identity)
    except CheckpointError as error:
        return str(error), differences(before, weights_of(assembly))
    return "no error", []


def test_another_model_is_refused_before_anything_changes(saved_at_2_2_1):
    recipe, saved, _ = saved_at_2_2_1
    config = {**recipe["model"]["config"], "hidden_size": 48}
    wider = {**recipe, "model": {**recipe["model"], "config": config}}
    answers = run_distributed(try_to_load, 2, wider, str(saved / "checkpoints" / "step_00000003"))
    assert len({message for message, _ in answers}) <= 2  # the second rank's text may name the first
    for message, changed in answers:
        assert "is of another model" in message
        assert "[257, 32] in the checkpoint, [257, 48] in the model" in message
        assert len(message.splitlines()) == 12
        assert re.search(r"and \d+ more$", message)
        assert not changed


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq"])
def test_a_part_that_only_one_rank_misses_stops_all_ranks(tmp_path, saved_at_2_2_1, kind):
    """The last expert lives on rank 1 alone: rank 0 must not go on to a collective that rank 1 never joins."""
    recipe, saved, _ = saved_at_2_2_1
    last = recipe["model"]["config"]["n_routed_experts"] - 1
    damaged = tmp_path / "step_00000003"
    shutil.copytree(saved / "checkpoints" / "step_00000003", damaged)
    manifest = read_manifest(damaged)
    kept = tuple(item for item in manifest.slices if (item.kind, item.expert) != (kind, last))
    assert len(kept) < len(manifest.slices)
    (damaged / "manifest.json").write_text(replace(manifest, slices=kept).to_json())
    for message, changed in run_distributed(try_to_load, 2, recipe, str(damaged)):
        assert re.search(f"{kind} of .*experts.*, expert {last}", message)
        assert kind != "master" or not changed


def test_other_data_are_refused(tmp_path, saved_at_2_2_1):
    recipe, saved, _ = saved_at_2_2_1
    longer = {**recipe, "data": {**recipe["data"], "sequence_length": 8}}
    for message, changed in run_distributed(try_to_load, 2, longer, str(saved / "checkpoints" / "step_00000003")):
        assert "other data" in message
        assert "--run-dir" in message
        assert not changed


@pytest.mark.parametrize(("resume", "problem"), [("must", "holds no complete checkpoint"), ("never", "earlier run")])
def test_resume_must_and_never_are_kept(tmp_path, corpus, saved_at_2_2_1, resume, problem):
    recipe, saved, _ = saved_at_2_2_1
    recipe = {**recipe, "checkpoint": {"resume": resume}}
    folder = tmp_path if resume == "must" else saved
    assert all(problem in message for message in run_distributed(message_of_start, 2, recipe, str(folder)))


def message_of_start(rank: int, recipe: dict, folder: str) -> str:
    try:
        start(recipe, folder)
    except CheckpointError as error:
        return str(error)
    return "no error"
