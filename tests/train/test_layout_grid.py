"""Saved at one layout, loaded at another: the same weights and optimizer states by hash, and the same next steps."""

from pathlib import Path

import pytest
from tiny_run import DEEPSEEK, start, tiny_recipe, train_until, write_corpus

from moe_train.checkpoint import read_manifest
from moe_train.checkpoint.compare import compare
from moe_train.model import count_parameters
from moe_train.testing import run_distributed
from moe_train.train.check import ResolvedRun
from moe_train.verify.bounds import CONSTANT

LAYOUTS = {
    "one rank": (1, 0, {}),
    "data, ZeRO-0": (2, 0, {"expert": 1}),
    "EP 2, redundant, ZeRO-1": (2, 1, {"expert": 2, "redundant_experts": 1}),
    "TP 2, ZeRO-2": (2, 2, {"expert": 1, "tensor": 2}),
    "EP 3, uneven, ZeRO-1": (3, 1, {"expert": 3}),
    "data, uneven, ZeRO-3": (3, 3, {"expert": 1}),
    "shared rank, redundant, ZeRO-2": (4, 2, {"expert": 4, "shared_expert_ranks": 1, "redundant_experts": 1}),
    "TP 2, expert TP 2, ZeRO-3": (4, 3, {"expert": 2, "tensor": 2, "expert_tensor": 2}),
    "copies of EP 2, ZeRO-0": (4, 0, {"expert": 2, "redundant_experts": 3}),
}
"""Ranks, ZeRO stage, parallel."""
MICRO_SIZES = {1: 6, 2: 3, 3: 2, 4: 3}
"""By ranks that read different samples."""
CONFIG = {**DEEPSEEK["config"], "n_routed_experts": 5, "n_group": 1, "topk_group": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def recipe_of(name: str, corpus: Path) -> tuple[int, dict]:
    world, stage, parallel = LAYOUTS[name]
    micro_size = MICRO_SIZES[world // parallel.get("tensor", 1)]
    recipe = tiny_recipe(
        corpus, {**DEEPSEEK, "config": CONFIG}, zero={"stage": stage}, parallel=parallel,
        batch={"global_size": 12, "micro_size": micro_size}, moe={"bias_update_rate": 1e-2}, train={"steps": 99},
    )  # fmt: skip
    return world, recipe


def visit(rank: int, recipe: dict, source: str | None, folder: str) -> dict[int, float]:
    """Resume from `source` and save it again as it is; three steps, a save, three more. The losses by step."""
    run = start(recipe, source or folder)
    trainer = run.trainer
    first = trainer.step
    for name, step in (("again", first), ("next", first + 3)):
        train_until(run, step, save=False)
        if step:
            trainer.saver.saved_step, trainer.saver.root = None, Path(folder) / name / "checkpoints"
            trainer.save()
            assert trainer.saved_step == step
    train_until(run, first + 6, save=False)
    return run.recorder.losses()


def check_loaded(source: Path, folder: Path, before: dict[int, float], after: dict[int, float]) -> None:
    """Random states are those of data ranks: peers of a tensor group draw their own."""
    found = compare(source, folder / "again")
    one, other = (read_manifest(directory) for directory in found.directories)
    of_other_ranks = one.layout["tensor_parallel"] != other.layout["tensor_parallel"]
    randoms = ("rng of ", "state python_random: ") if of_other_ranks else ()
    assert [line for line in found.differences if not line.startswith(randoms)] == []
    assert {"master", "exp_avg", "exp_avg_sq", "buffer"} <= found.kinds.keys()
    expected = {step: before[step] for step in range(one.step + 1, one.step + 4)}
    assert {step: after[step] for step in expected} == pytest.approx(expected, rel=CONSTANT["fp32"]["loss"])


def test_each_layout_loads_the_one_before(tmp_path, corpus):
    """In a ring: each is saved from once and loaded into once."""
    source, losses = None, {}
    for place, name in enumerate([*LAYOUTS, next(iter(LAYOUTS))]):
        world, recipe = recipe_of(name, corpus)
        folder = tmp_path / str(place)
        after = run_distributed(visit, world, recipe, source and str(source), str(folder))[0]
        if source is not None:
            check_loaded(source, folder, losses, after)
        source, losses = folder / "next", after


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request, corpus, tmp_path_factory) -> tuple[Path, dict[int, float]]:
    world, recipe = recipe_of(request.param, corpus)
    folder = tmp_path_factory.mktemp("saved")
    return folder / "next", run_distributed(visit, world, recipe, None, str(folder))[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_loads_every_other(tmp_path, corpus, saved, target):
    source, losses = saved
    world, recipe = recipe_of(target, corpus)
    after = run_distributed(visit, world, recipe, str(source), str(tmp_path))[0]
    check_loaded(source, tmp_path, losses, after)


# ---- nothing is stored twice


def save_after_one_step(rank: int, recipe: dict, folder: str) -> int:
    """Parameters of the model, counted without looking at a checkpoint."""
    run = start(recipe, folder)
    train_until(run, 1)
    resolved: ResolvedRun = run.assembly.run
    return count_parameters(resolved.recipe, resolved.model_config, resolved.plan, resolved.topology).total


@pytest.mark.parametrize(
    ("world", "stage", "parallel"),
    [
        (3, 3, {"expert": 3, "redundant_experts": 3}),
        (4, 0, {"expert": 2, "redundant_experts": 3}),
    ],
)
def test_a_checkpoint_takes_what_its_tensors_take(tmp_path, corpus, world, stage, parallel):
    """Within 1 % of 12 bytes a parameter, headers and manifest included, however often the ranks hold it."""
    config = {**CONFIG, "hidden_size": 384, "moe_intermediate_size": 512, "intermediate_size": 1024}
    recipe = tiny_recipe(
        corpus, {**DEEPSEEK, "config": config}, zero={"stage": stage}, parallel=parallel,
        batch={"global_size": 12, "micro_size": 12 // world},
    )  # fmt: skip
    parameters = run_distributed(save_after_one_step, world, recipe, str(tmp_path))[0]
    directory = tmp_path / "checkpoints" / "step_00000001"
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    assert 1.0 < nbytes / (12 * parameters) < 1.01
