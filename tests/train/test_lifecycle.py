"""Real runs of two ranks under DeepSpeed's launcher: killed, told to stop, orphaned, and started again."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from ruamel.yaml import YAML
from tiny_run import tiny_recipe, write_corpus

from moe_train.checkpoint import newest_complete, read_manifest
from moe_train.diagnostics.metrics_file import read_curve, read_lines
from moe_train.parallel import build_groups
from moe_train.testing import free_port, run_distributed
from moe_train.train.check import resolve_run
from moe_train.train.run import run_one
from moe_train.train.stop import STOPPED_EXIT_CODE, StopRequest

REPOSITORY = Path(__file__).parents[2]
STEPS = 100
DEADLINE_S = 90


class Run:
    """`deepspeed.launcher.launch` with two ranks, which is what `deepspeed --num_gpus 2` starts on one host."""

    def __init__(self, recipe: Path, run_dir: Path):
        self.metrics = run_dir / "metrics.jsonl"
        self.checkpoints = run_dir / "checkpoints"
        self.log = run_dir.with_suffix(".log")
        world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
        options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "deepspeed.launcher.launch",
                    *options,
                    "launch",
                    str(recipe),
                    "--run-dir",
                    run_dir,
                ],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many as the workers that ran undisturbed
                stdout=log,
                stderr=log,
            )
        self.ranks: list[psutil.Process] = []

    def losses(self) -> list[tuple[int, float]]:
        return read_curve(self.metrics, "train/loss") if self.metrics.exists() else []

    def wait_for_step(self, step: int) -> None:
        """Until `step` is in the metrics; afterwards `ranks` is known."""
        self.until(lambda: any(done >= step for done, _ in self.losses()), f"step {step}")
        found = {self.rank_of(child): child for child in psutil.Process(self.process.pid).children()}
        self.ranks = [found[rank] for rank in (0, 1)]

    @staticmethod
    def rank_of(process: psutil.Process) -> int:
        return int(next(part for part in process.cmdline() if part.startswith("--local_rank"))[-1])

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {what} in {DEADLINE_S} s:\n{self.tail()}"
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for the launcher and the ranks; the launcher's exit code."""
        code = self.process.wait(DEADLINE_S)
        _, alive = psutil.wait_procs(self.ranks, timeout=30)
        assert not alive, f"left behind: {alive}"
        return code

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def kill(self) -> None:
        for process in [*self.ranks, self.process]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()

    def stopped(self) -> dict:
        """The last `stopped` event."""
        events = [line for line in read_lines(self.metrics) if line and line.get("event") == "stopped"]
        assert events, self.tail()
        return events[-1]

    def saved_step(self) -> int:
        directory, reasons = newest_complete(self.checkpoints)
        assert directory is not None
        assert not reasons
        return read_manifest(directory).step


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """fp32, a save every seventh step, so that a kill loses some."""
    folder = tmp_path_factory.mktemp("recipe")
    tree = tiny_recipe(
        write_corpus(folder / "tiny"),
        train={"steps": STEPS},
        checkpoint={"interval": 7},
        parallel={"timeout_s": 60},
    )
    path = folder / "tiny.yaml"
    YAML().dump(tree, path)
    return path


@pytest.fixture
def launch(recipe) -> Iterator[Callable[[Path], Run]]:
    """Starts runs; whatever a failed test leaves running is ended."""
    runs: list[Run] = []

    def start(run_dir: Path) -> Run:
        runs.append(Run(recipe, run_dir))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def run_undisturbed(rank: int, recipe: str, run_dir: str) -> bool:
    run = resolve_run(Path(recipe), (), world=2, per_node=2)
    return run_one(run, build_groups(run.topology), torch.device("cpu"), Path(run_dir), StopRequest())


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> list[tuple[int, float]]:
    """(step, loss) of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_distributed(run_undisturbed, 2, str(recipe), str(run_dir)) == [True, True]
    curve = read_curve(run_dir / "metrics.jsonl", "train/loss")
    assert [step for step, _ in curve] == list(range(1, STEPS + 1))
    assert curve[-1][1] < 0.8 * curve[0][1]
    return curve


def test_killed_then_stopped_then_finished_is_the_uninterrupted_run(tmp_path, launch, uninterrupted):
    """SIGKILL to every process, the same command, SIGTERM to one rank, the same command: the same losses to the bit."""
    first = launch(tmp_path / "run")
    first.wait_for_step(12)
    for process in [psutil.Process(first.process.pid), *first.ranks]:
        process.kill()
    first.end()
    killed_at = first.losses()[-1][0]
    assert 12 <= killed_at < STEPS

    second = launch(tmp_path / "run")
    second.wait_for_step(killed_at + 3)
    second.ranks[1].send_signal(signal.SIGTERM)
    assert second.end() == STOPPED_EXIT_CODE, second.tail()
    stopped = second.stopped()
    assert stopped["saved"]
    assert stopped["step"] == second.saved_step() == second.losses()[-1][0] < STEPS
    assert "resuming from" in second.tail()

    third = launch(tmp_path / "run")
    assert third.end() == 0, third.tail()
    assert third.losses() == uninterrupted
    assert list(read_lines(third.metrics))[-1]["event"] == "end"  # type: ignore[index]
    assert third.saved_step() == STEPS


@pytest.mark.slow  # the launcher passes the signal on to ranks, which the first test signals themselves
def test_sigterm_to_the_launcher_saves_and_leaves_nothing_running(tmp_path, launch, uninterrupted):
    run = launch(tmp_path / "run")
    run.wait_for_step(5)
    run.process.terminate()
    assert run.end() != 0
    check_stopped_early(run, uninterrupted)


def test_ranks_stop_by_themselves_when_the_launcher_is_killed(tmp_path, launch, uninterrupted):
    run = launch(tmp_path / "run")
    run.wait_for_step(5)
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    check_stopped_early(run, uninterrupted)


def check_stopped_early(run: Run, uninterrupted: list[tuple[int, float]]) -> None:
    step = run.stopped()["step"]
    assert 5 <= step < STEPS
    assert run.saved_step() == step
    assert run.losses() == uninterrupted[:step]
