"""A run's folder belongs to one job at a time; the death of that job, however it dies, gives it free."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import resolve, tiny_recipe, write_corpus

from moe_train.errors import ConfigError
from moe_train.parallel import build_groups
from moe_train.testing import run_distributed
from moe_train.train import lock
from moe_train.train.lock import LOCK, RunLock
from moe_train.train.run import run_one
from moe_train.train.stop import StopRequest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def other_job(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that has locked the folder."""
    code = f"import sys; from pathlib import Path; from lock import RunLock; held = RunLock(Path({str(tmp_path)!r})); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print('locked', flush=True); sys.stdin.read()"],
        cwd=Path(lock.__file__).parent,  # the module alone: its package would import torch
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def run_whole(rank: int, recipe: dict, folder: str) -> str:
    run = resolve(recipe)
    try:
        return str(run_one(run, build_groups(run.topology), torch.device("cpu"), Path(folder), StopRequest()))
    except ConfigError as error:
        return str(error)


def test_a_second_job_is_refused_on_all_ranks_until_the_first_is_dead(tmp_path, other_job):
    recipe = tiny_recipe(write_corpus(tmp_path / "tiny"), train={"steps": 1})
    before = sorted(path.name for path in tmp_path.iterdir())
    answers = run_distributed(run_whole, 2, recipe, str(tmp_path))
    words = rf"--run-dir {tmp_path} is in use by process {other_job.pid} on {socket.gethostname()}, since 20.*; wait"
    assert all(re.search(words, answer) for answer in answers), answers
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "checkpoints"])
    assert not list((tmp_path / "checkpoints").iterdir())
    other_job.kill()
    other_job.wait()
    assert run_distributed(run_whole, 2, recipe, str(tmp_path)) == ["True", "True"]
    assert json.loads((tmp_path / LOCK).read_text()) == {}


def test_the_lock_is_given_back_by_an_error(tmp_path):
    def fail() -> None:
        with RunLock(tmp_path):
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
                RunLock(tmp_path)
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()


@pytest.fixture
def _no_locks(monkeypatch):
    """A file system that has none."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


def content(**changes: object) -> str:
    return json.dumps({**lock._me(), "since": "2026-01-01 00:00:00", **changes})


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("", False),
        ("{}\n", False),
        ('{"host": "cut sho', False),
        (content(), True),
        (content(ticks=1), False),  # the number belongs to another process now
        (content(pid=2**22 + 1), False),  # no such process
        (content(host="elsewhere", pid=7), True),  # nobody here knows
    ],
    ids=["empty", "given back", "cut short", "alive", "number given again", "dead", "another host"],
)
def test_without_locks_what_the_file_says_decides(tmp_path, text, refused):
    (tmp_path / LOCK).write_text(text)
    if refused:
        with pytest.raises(ConfigError, match=rf"in use by .* since 2026-01-01 .*; if it has ended, remove .*{LOCK}"):
            RunLock(tmp_path)
        assert (tmp_path / LOCK).read_text() == text
    else:
        with RunLock(tmp_path), pytest.raises(ConfigError, match="is in use"):
            RunLock(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text()) == {}
