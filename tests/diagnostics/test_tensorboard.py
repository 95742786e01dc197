"""TensorBoard gets what wandb gets; without its package, or when it fails, the run goes on with one sentence."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.tracker import Tracker

SECTION = TrackingSection(mode="disabled", tensorboard=True)


class Writer:
    """Stands in for torch's SummaryWriter, whose package is optional."""

    def __init__(self, folder):
        self.folder, self.calls, self.broken = folder, [], False
        Writer.last = self

    def add_scalar(self, key, value, step):
        if self.broken:
            raise OSError(28, "No space left on device: /home/ann/x")
        self.calls.append((step, key, value))

    def add_image(self, key, pixels, step, dataformats):
        self.calls.append((step, key, (pixels.shape[2], dataformats, pixels.dtype.name)))

    def add_histogram(self, key, values, step):
        self.calls.append((step, key, values.tolist()))

    def close(self):
        self.calls.append("closed")


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))


def steps_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "event" not in line]


def test_scalars_layers_image_and_histogram(tmp_path, writer):
    with Tracker(tmp_path, SECTION, {}) as tracker:
        tracker.log(5, {"train/loss": 2.5, "train/grad_norm": float("nan"), "moe/dead_experts": 3})
        tracker.layers(5, {"entropy": [0.25, 0.5]})
        tracker.heat_map(5, np.array([[1, 3], [2, 2]]))
        tracker.finish({})
    assert Writer.last.folder == str(tmp_path / "tensorboard")
    assert Writer.last.calls == [
        (5, "train/loss", 2.5),
        (5, "moe/dead_experts", 3.0),
        (5, "moe/layer_00/entropy", 0.25),
        (5, "moe/layer_01/entropy", 0.5),
        (5, "moe/heat_map", (3, "HWC", "uint8")),
        (5, "moe/expert_shares", [0.5, 1.5, 1.0, 1.0]),
        "closed",
    ]


def test_a_run_that_fails_closes_its_file(tmp_path, writer):
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, SECTION, {}):
        1 / 0  # noqa: B018
    assert Writer.last.calls == ["closed"]


def test_without_the_package_one_sentence_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    warnings = []
    with Tracker(tmp_path, SECTION, {}, warn=warnings.append) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.heat_map(1, np.ones((1, 2), int))
        tracker.finish({})
    (warning,) = warnings
    assert "pip install 'moe_train[tensorboard]'" in warning
    assert steps_of(tmp_path) == [1]


def test_a_failure_in_the_middle_is_reported_once(tmp_path, writer):
    warnings = []
    with Tracker(tmp_path, SECTION, {}, warn=warnings.append) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        Writer.last.broken = True
        for step in (2, 3):
            tracker.log(step, {"train/loss": 1.0})
        tracker.finish({})
    assert warnings == ["tensorboard is off (OSError: [Errno 28] No space left on device: ~/x); metrics.jsonl goes on"]
    assert steps_of(tmp_path) == [1, 2, 3]


def test_off_by_default(tmp_path, writer):
    Writer.last = None
    with Tracker(tmp_path, TrackingSection(mode="disabled"), {}) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.finish({})
    assert Writer.last is None
