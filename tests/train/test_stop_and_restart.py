"""Being told to stop, saves that fail, and what a second start does to the folder of the first."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import resolve, start, tiny_recipe, write_corpus

from moe_train.checkpoint import newest_complete, read_manifest, steps_in
from moe_train.diagnostics.metrics_file import read_lines
from moe_train.errors import CheckpointError
from moe_train.parallel import build_groups
from moe_train.testing import run_distributed
from moe_train.train import loop, saver
from moe_train.train.run import run_one
from moe_train.train.stop import StopRequest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


# ---- signals


def test_repeated_signals_do_not_end_a_save_but_a_second_interrupt_does(monkeypatch):
    """A scheduler's SIGTERM to all processes, the launcher's on top of it, and the one of the launcher's death."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop = StopRequest()
    for _ in range(3):
        stop._handle(signal.SIGTERM, None)
    stop._handle(signal.SIGINT, None)
    assert (stop.requested, stop.reason, exits) == (True, "SIGTERM", [])
    stop._handle(signal.SIGINT, None)
    assert exits == [128 + signal.SIGINT]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_is_noticed_by_a_real_process(number):
    code = (
        "import os; from stop import StopRequest\n"
        f"stop = StopRequest(); stop.install(); os.kill(os.getpid(), {int(number)}); print(stop.requested, stop.reason)"
    )
    folder = Path(loop.__file__).parent  # the module alone: its package would import torch
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.split() == ["True", number.name]


def stop_on_one_rank(rank: int, recipe: dict, folder: str, when: str) -> tuple[bool, int, int | None]:
    """Rank 1 is told to stop: whether the run finished, the trainer's step, the last saved one."""
    run = start(recipe, folder)
    trainer = run.trainer

    def tell() -> None:
        if rank == 1:
            trainer.stop.requested = True

    if when == "before the first step":
        tell()
    else:
        hooked = {"in a forward": "forward_loss", "in the evaluation": "evaluate"}[when]
        original, calls = getattr(trainer, hooked), []

        def spy(*args):
            calls.append(0)
            if len(calls) == 2:
                tell()
            return original(*args)

        setattr(trainer, hooked, spy)
    return trainer.train(), trainer.step, trainer.saved_step


@pytest.mark.parametrize(
    ("when", "step"), [("before the first step", 1), ("in a forward", 1), ("in the evaluation", 3)]
)
def test_a_signal_to_one_rank_saves_all_at_the_same_step(tmp_path, corpus, when, step):
    """Four micro-batches a step on two ranks; an evaluation after each step, the second one is after step 2."""
    recipe = tiny_recipe(corpus, train={"steps": 6, "eval_interval": 1}, batch={"global_size": 16})
    answers = run_distributed(stop_on_one_rank, 2, recipe, str(tmp_path), when)
    assert answers == [(False, step, step)] * 2
    found, _ = newest_complete(tmp_path / "checkpoints")
    assert found is not None
    assert read_manifest(found).step == step


# ---- saves that fail


def train_with_failing_saves(rank: int, recipe: dict, folder: str, failures: int) -> tuple[str, int, list[int]]:
    """Every save up to number `failures` fails: the outcome, the step reached, the steps of the warnings."""
    run = start(recipe, folder)
    original, calls = saver.begin_save, []

    def failing(*args):
        calls.append(0)
        if len(calls) <= failures:
            raise CheckpointError("the disk is full")
        return original(*args)

    saver.begin_save = failing
    try:
        outcome = str(run.trainer.train())
    except CheckpointError as error:
        outcome = str(error)
    finally:
        saver.begin_save = original
    warned = [fields["step"] for name, fields in run.recorder.events if name == "checkpoint_failed"]
    return outcome, run.trainer.step, warned


@pytest.mark.parametrize(
    ("failures", "outcome", "step", "warned"), [(2, "True", 6, [1, 2]), (9, "the disk is full", 3, [1, 2, 3])]
)
def test_two_failed_saves_warn_and_three_end_the_run(tmp_path, corpus, failures, outcome, step, warned):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 1})
    answers = run_distributed(train_with_failing_saves, 1, recipe, str(tmp_path), failures)
    assert answers == [(outcome, step, warned)]
    assert [number for number, _ in steps_in(tmp_path / "checkpoints")] == ([5, 6] if failures == 2 else [])


def test_a_recipe_keeps_its_milestones(tmp_path, corpus):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 1, "keep_every": 2})
    assert run_distributed(train_with_failing_saves, 1, recipe, str(tmp_path), 0) == [("True", 6, [])]
    assert [number for number, _ in steps_in(tmp_path / "checkpoints")] == [2, 4, 5, 6]


# ---- the same folder again


def run_whole(rank: int, recipe: dict, folder: str) -> bool:
    run = resolve(recipe)
    return run_one(run, build_groups(run.topology), torch.device("cpu"), Path(folder), StopRequest())


def lines_of(folder: Path) -> list[dict]:
    return [line for line in read_lines(folder / "metrics.jsonl") if line]


def test_a_run_killed_before_its_first_checkpoint_starts_its_curve_again(tmp_path, corpus):
    recipe = tiny_recipe(corpus)
    killed = [{"step": step, "train/loss": random.random()} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in killed))
    assert run_distributed(run_whole, 1, recipe, str(tmp_path)) == [True]
    steps = [line["step"] for line in lines_of(tmp_path) if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert sum(line.get("step") == 0 and "event" not in line for line in lines_of(tmp_path)) == 1
    assert not {line.get("train/loss") for line in lines_of(tmp_path)} & {line["train/loss"] for line in killed}


def test_a_run_killed_before_its_report_writes_it_when_started_again(tmp_path, corpus):
    recipe = tiny_recipe(corpus, diagnostics={"load_picture": True})
    assert run_distributed(run_whole, 1, recipe, str(tmp_path)) == [True]
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    end = lines_of(tmp_path)[-1]
    assert end["event"] == "end"
    picture = (tmp_path / "load.png").read_bytes()

    assert run_distributed(run_whole, 1, recipe, str(tmp_path)) == [True]
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole, "a finished run was touched"

    kept = whole.splitlines(keepends=True)[:-1]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(kept))
    (tmp_path / "load.png").unlink()
    assert run_distributed(run_whole, 1, recipe, str(tmp_path)) == [True]
    again = lines_of(tmp_path)[-1]
    assert {key: again[key] for key in again if key != "time"} == {key: end[key] for key in end if key != "time"}
    assert (tmp_path / "load.png").read_bytes() == picture
