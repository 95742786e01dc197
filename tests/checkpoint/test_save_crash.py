"""A save that is killed at any moment, or before any call that changes the disk, costs that checkpoint and no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEATHS = Path(__file__).with_name("dying_saves.py")
SEED = 20_261_123


def deaths(*words: object) -> dict:
    result = subprocess.run(
        [sys.executable, DEATHS, *map(str, words)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("how", ["waited", "background"])
def test_death_before_each_call_that_changes_the_disk(tmp_path, how):
    """The checkpoint exists from the one rename on, and not before; a torn write is as none."""
    found = deaths("every", tmp_path, how)
    steps = [step for _, _, step in found["seen"]]
    committed = steps.index(3)
    assert steps == [2] * committed + [3] * (len(steps) - committed)
    assert found["seen"][committed - 1][0] == "rename"
    before = [call for call, _, step in found["seen"] if step == 2]
    after = [call for call, _, step in found["seen"] if step == 3]
    assert {*before} == {"mkdir", "open", "write", "fsync", "rename"}
    assert {*after} == {"open", "fsync", "replace", "rename", "unlink", "rmdir"}  # pointers, and the removal of step 1
    assert sum(torn for _, torn, _ in found["seen"]) >= 9  # header and data of four files, and the manifest
    assert before.count("fsync") == 6  # four files, the manifest, the folder
    assert found["left"] == ["best", "latest", "step_00000002", "step_00000003"]


def check_kills(found: dict, kills: int) -> None:
    seen = found["seen"]
    assert len(seen) == kills
    for before, done, after, _, _ in seen:
        assert before <= done <= after <= done + 1, found  # what was said to be done is there
    assert sum(unfinished for _, _, _, unfinished, _ in seen) >= kills // 4, f"hardly ever killed in a save: {found}"
    assert seen[-1][2] > 2, f"never got on: {found}"


@pytest.mark.parametrize("how", ["waited", "background"])
def test_killed_at_random_moments(tmp_path, how):
    check_kills(deaths("random", tmp_path, how, 6, SEED), 6)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["waited", "background"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_twenty_random_moments(tmp_path, how, seed):
    check_kills(deaths("random", tmp_path, how, 20, seed), 20)
