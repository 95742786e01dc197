"""metrics.jsonl: complete after a kill, never twice the same step, always valid JSON."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.metrics_file import MetricsFile, Rewound, read_curve, read_lines
from moe_train.diagnostics.tracker import NullTracker, Tracker

ROOT = Path(__file__).resolve().parents[2]
OFF = TrackingSection(mode="disabled")


@pytest.fixture(autouse=True)
def _no_mode_from_outside(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def objects(path):
    """Strictly: every line must be JSON without NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines_are_what_was_logged_and_the_last_is_the_end(tmp_path):
    with Tracker(tmp_path / "run", OFF, {}) as tracker:
        tracker.log(1, {"train/loss": 2.5, "moe/dead_experts": np.int64(3)})
        tracker.event("checkpoint", step=1, path="checkpoints/step_1")
        tracker.image(tmp_path / "run" / "load.png", "load")
        tracker.log(2, {"train/loss": np.float32(0.5)})
        tracker.log(1, {"ckpt/write_s": 3.0})  # known a step later; the run does not go back by it
        tracker.finish({"val/loss": 1.25})
        tracker.finish({"val/loss": 9.0})
    lines = objects(tmp_path / "run" / "metrics.jsonl")
    assert all(line.pop("time") > 1.7e9 for line in lines)
    assert lines == [
        {"step": 1, "train/loss": 2.5, "moe/dead_experts": 3},
        {"event": "checkpoint", "step": 1, "path": "checkpoints/step_1"},
        {"event": "image", "step": 1, "image": "load", "path": "load.png"},
        {"step": 2, "train/loss": 0.5},
        {"step": 1, "ckpt/write_s": 3.0},
        {"event": "end", "step": 2, "val/loss": 1.25},
    ]


def test_numbers_that_json_lacks_come_back_as_floats(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "a": float("nan"), "b": [np.float32("inf")], "c": -np.inf, "d": True, "e": None})
    assert objects(file.path) == [{"step": 1, "a": "NaN", "b": ["Infinity"], "c": "-Infinity", "d": True, "e": None}]
    file.write({"step": 2, "c": 4})
    assert read_curve(file.path, "c") == [(1, -np.inf), (2, 4.0)]


def test_what_json_cannot_hold_is_refused_and_leaves_no_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        file.write({"step": 1, "x": {1, 2}})
    assert file.path.read_bytes() == b""


def test_every_logged_line_survives_a_kill(tmp_path):
    """The process reports each line as logged and never gets to flush or close anything."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.tracker import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), TrackingSection(mode="disabled"), {{}})
for step in range(1, 51):
    tracker.log(step, {{"train/loss": 1 / step}})
print("logged", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    lines = objects(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert [line["train/loss"] for line in lines] == [1 / step for step in range(1, 51)]


def write(path, *lines, tail=b""):
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)


def steps(count):
    return [{"step": step, "train/loss": step / 10} for step in range(1, count + 1)]


def test_rewind_drops_later_steps_and_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    start, evaluation, end = {"event": "start"}, {"step": 4, "val/loss": 1.0}, {"event": "end", "step": 2}
    write(path, start, *steps(5), evaluation, end)
    with Tracker(tmp_path, OFF, {}) as tracker:
        assert tracker.rewind(3) == Rewound(num_kept=4, num_dropped=4, num_damaged=0)
        for step in (4, 5):
            tracker.log(step, {"train/loss": 9.0})
        tracker.finish({})
    assert [line.get("step") for line in objects(path)] == [None, 1, 2, 3, 4, 5, 5]
    assert [loss for _, loss in read_curve(path, "train/loss")] == [0.1, 0.2, 0.3, 9.0, 9.0]
    assert sum(line.get("event") == "end" for line in objects(path)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 6, "trai', b"\x00\x00\x00", b'{"step": 6, "name": "\xe2\x82', b"17"])
def test_a_damaged_last_line_is_counted_and_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, *steps(5), tail=tail + b"\n")
    file = MetricsFile(path)
    assert list(read_lines(path))[-1] is None
    assert file.rewind(5) == Rewound(num_kept=5, num_dropped=0, num_damaged=1)
    file.write({"step": 6})
    assert objects(path) == [*steps(5), {"step": 6}]


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *steps(2), tail=b'{"step": 3, "tra')
    MetricsFile(path).write({"step": 3})
    assert objects(path) == [*steps(2), {"step": 3}]


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *steps(2), tail=b'{"step": 3}')
    MetricsFile(path).write({"step": 4})
    assert [line["step"] for line in objects(path)] == [1, 2, 3, 4]


def test_rewind_of_nothing_and_to_the_start(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rewind(0) == Rewound(num_kept=0, num_dropped=0, num_damaged=0)
    file.write({"step": 1})
    assert file.rewind(0).num_dropped == 1
    assert file.path.read_bytes() == b""


def test_a_failed_rewind_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, *steps(5))
    file = MetricsFile(path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.rewind(2)
    assert objects(path) == steps(5)


def test_an_exception_leaves_no_end_event(tmp_path):
    def fail_inside():
        with Tracker(tmp_path, OFF, {}) as tracker:
            tracker.log(1, {"train/loss": 1.0})
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [line["step"] for line in objects(tmp_path / "metrics.jsonl")] == [1]


def test_null_tracker_has_every_call_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = {name for name in dir(Tracker) if not name.startswith("_")}
    assert public <= {name for name in dir(NullTracker) if not name.startswith("_")}
    with NullTracker("abc") as tracker:
        tracker.log(1, {"a": 1})
        tracker.event("x")
        tracker.image(tmp_path / "a.png", "a")
        tracker.rewind(0)
        tracker.finish({})
    assert tracker.run_id == "abc"
    assert list(tmp_path.iterdir()) == []
