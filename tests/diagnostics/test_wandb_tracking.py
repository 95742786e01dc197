"""wandb offline writes a real run without secrets; whatever breaks in it, metrics.jsonl goes on."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from matplotlib.image import imread, imsave
from wandb.sdk.mailbox.mailbox import MailboxClosedError
from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError

from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.tracker import Tracker


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "plantedhome"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "PLANTED-env")


def records(run_dir, kind):
    """Of the one .wandb file, once its last record is there: wandb's own process may write after `finish` returns."""
    deadline = time.monotonic() + 60
    while not read_records(run_dir, "exit") and time.monotonic() < deadline:
        time.sleep(0.1)
    return read_records(run_dir, kind)


def read_records(run_dir, kind):
    """LevelDB log format, 7 bytes of file header, 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data, position, partial, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, part = struct.unpack_from("<HB", data, position + 4)
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(partial)
            partial = b""
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def items(message):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message}


def wandb_helpers():
    """Process ids of the wandb-core children of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and "wandb-core" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it ended while we looked
            continue
    return found


def jsonl_steps(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "event" not in line]


def test_offline_run_holds_config_and_metrics_but_no_secret(tmp_path, monkeypatch):
    run_dir = tmp_path / "plantedhome" / "run"
    monkeypatch.setattr(sys, "argv", ["train", "--wandb-key", "PLANTED-argv"])
    config = {
        "optimizer": {"lr": 0.00031},
        "cls_token": "[CLS]",
        "api_key": "PLANTED-key",
        "data": {"corpora": [{"text": "https://ann:PLANTED-url@host/x"}, {"text": f"{Path.home()}/corpus"}]},
    }
    section = TrackingSection(project="proj", name="named", group="grouped", tags=("one",))
    with Tracker(run_dir, section, config, tags=["two"]) as tracker:
        for step in (1, 2, 2):
            tracker.log(step, {"train/loss": 4.5 / step})
        imsave(run_dir / "load.png", np.zeros((4, 4, 3)))
        tracker.image(run_dir / "load.png", "load")
        tracker.event("note", api_key="PLANTED-event", path=f"{Path.home()}/x")
        tracker.finish({"best/val": 0.75, "token": "PLANTED-summary"})

    (run,) = records(run_dir, "run")
    stored = items(run.config.update)
    assert stored["optimizer"] == {"lr": 0.00031}
    assert stored["cls_token"] == "[CLS]"
    assert stored["data"] == {"corpora": [{"text": "https://host/x"}, {"text": "~/corpus"}]}
    assert (run.run_id, run.project, run.display_name, run.run_group) == (tracker.run_id, "proj", "named", "grouped")
    assert sorted(run.tags) == ["one", "two"]
    history = [items(record.item) for record in records(run_dir, "history")]
    logged = [(row["train/step"], row.get("train/loss")) for row in history]
    assert logged == [(1, 4.5), (2, 2.25), (2, 2.25), (2, None)]
    assert history[-1]["load._type"] == "image-file"
    assert [metric.step_metric for metric in records(run_dir, "metric") if metric.glob_name == "*"] == ["train/step"]
    summary = {key: value for record in records(run_dir, "summary") for key, value in items(record.update).items()}
    assert summary["best/val"] == 0.75

    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for path in files:
        text = path.read_bytes() + str(os.readlink(path) if path.is_symlink() else "").encode()
        assert b"PLANTED" not in text, path
        assert b"plantedhome" not in text, path


def test_resume_keeps_the_run_id_and_makes_a_second_folder(tmp_path):
    section = TrackingSection()
    with Tracker(tmp_path / "run", section, {}) as first:
        first.log(1, {"train/loss": 1.0})
        first.finish({})
    time.sleep(1.1)  # wandb names its folders by the second
    with Tracker(tmp_path / "run", section, {}, resume_id=first.run_id) as second:
        second.finish({})
    assert second.run_id == first.run_id
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first.run_id}"))) == 2


def test_a_bad_run_id_is_replaced(tmp_path):
    warnings = []
    tracker = Tracker(tmp_path, TrackingSection(mode="disabled"), {}, resume_id="a/b", warn=warnings.append)
    assert tracker.run_id.isalnum()
    assert len(warnings) == 1
    assert "'a/b'" in warnings[0]


def test_run_ids_do_not_touch_seeded_generators(tmp_path):
    import random

    random.seed(3)
    state = random.getstate()
    ids = {Tracker(tmp_path / str(i), TrackingSection(mode="disabled"), {}).run_id for i in range(2)}
    assert len(ids) == 2
    assert random.getstate() == state


@pytest.mark.parametrize(("mode", "environment"), [("disabled", None), ("offline", "disabled"), ("online", "disabled")])
def test_disabled_makes_no_wandb_folder(tmp_path, monkeypatch, mode, environment):
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    warnings = []
    with Tracker(tmp_path / "run", TrackingSection(mode=mode), {}, warn=warnings.append) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.finish({})
    assert not (tmp_path / "run" / "wandb").exists()
    assert warnings == []
    assert jsonl_steps(tmp_path / "run") == [1]


def test_environment_offline_wins_over_online(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings = []
    with Tracker(tmp_path / "run", TrackingSection(mode="online"), {}, warn=warnings.append) as tracker:
        tracker.finish({})
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert warnings == []


def check_goes_on_after(tmp_path, section, expected, capsys):
    """One warning on stderr that says why, and every line in metrics.jsonl."""
    with Tracker(tmp_path / "run", section, {"a": 1}) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.log(2, {"train/loss": 1.0})
        tracker.finish({})
    assert jsonl_steps(tmp_path / "run") == [1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("warning: wandb is off (")
    assert expected in err


def test_wandb_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_goes_on_after(tmp_path, TrackingSection(), "import of wandb halted", capsys)


def test_online_without_a_key_never_asks(tmp_path, capsys):
    check_goes_on_after(tmp_path, TrackingSection(mode="online"), "set WANDB_API_KEY", capsys)


def test_a_mode_that_wandb_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    check_goes_on_after(tmp_path, TrackingSection(), "ValidationError", capsys)


def test_folder_that_wandb_cannot_use(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device: 'https://ann:PLANTED@host'")

    monkeypatch.setattr(wandb, "init", full)
    check_goes_on_after(tmp_path, TrackingSection(), "No space left on device: 'https://host'", capsys)


@pytest.mark.parametrize(
    "lost",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        HandleAbandonedError(),
        MailboxClosedError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_to_notice_a_lost_helper(tmp_path, monkeypatch, lost):
    def fail(*_):
        raise lost

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=fail)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    torn_down = []
    monkeypatch.setattr(wandb, "teardown", lambda: torn_down.append(1))
    warnings = []
    with Tracker(tmp_path / "run", TrackingSection(), {}, warn=warnings.append) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.log(2, {"train/loss": 1.0})
        tracker.finish({})
    assert jsonl_steps(tmp_path / "run") == [1, 2]
    assert len(warnings) == 1
    assert f"wandb is off ({type(lost).__name__}: its helper process is gone" in warnings[0]
    assert torn_down == [1]


def test_wandb_failing_in_the_middle_is_reported_once(tmp_path):
    warnings = []
    with Tracker(tmp_path / "run", TrackingSection(), {}, warn=warnings.append) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        (helper,) = wandb_helpers()
        os.kill(helper, 9)
        logged, deadline = 1, time.monotonic() + 30
        while not warnings and time.monotonic() < deadline:  # a busy machine takes its time to notice
            logged += 1
            tracker.log(logged, {"train/loss": 1.0})
            time.sleep(0.1)
        for step in (logged + 1, logged + 2):
            tracker.log(step, {"train/loss": 1.0})
        tracker.finish({})
    assert jsonl_steps(tmp_path / "run") == list(range(1, logged + 3))
    assert len(warnings) == 1
    assert "helper process is gone" in warnings[0]
    # and the next run of this process has wandb again
    with Tracker(tmp_path / "next", TrackingSection(), {}, warn=warnings.append) as tracker:
        tracker.log(7, {"train/loss": 0.125})
        tracker.finish({})
    assert len(warnings) == 1
    assert [items(record.item)["train/loss"] for record in records(tmp_path / "next", "history")] == [0.125]


def history(run_dir):
    return [items(record.item) for record in records(run_dir, "history")]


def layer_keys(run_dir):
    return sorted({key for row in history(run_dir) for key in row if key.startswith("moe/layer_")})


def test_a_key_for_every_layer_where_there_are_few(tmp_path):
    with Tracker(tmp_path, TrackingSection(max_layer_keys=6), {}) as tracker:
        tracker.layers(3, {"entropy": [0.5, 0.25, 1.0], "max_vio": np.array([1.0, 2.0, 3.0])})
        tracker.finish({})
    assert [row.get("train/step") for row in history(tmp_path)] == [3]
    assert {key: value for key, value in history(tmp_path)[0].items() if key.startswith("moe/")} == {
        "moe/layer_00/entropy": 0.5, "moe/layer_01/entropy": 0.25, "moe/layer_02/entropy": 1.0,
        "moe/layer_00/max_vio": 1.0, "moe/layer_01/max_vio": 2.0, "moe/layer_02/max_vio": 3.0,
    }  # fmt: skip
    assert jsonl_steps(tmp_path) == [], "the load events have them all"


@pytest.mark.parametrize(("most", "shown"), [(8, [0, 20, 40, 60]), (7, [0, 30, 60]), (3, [0]), (1, [0]), (0, [])])
def test_keys_of_layers_are_capped(tmp_path, most, shown):
    with Tracker(tmp_path, TrackingSection(max_layer_keys=most), {}) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.layers(1, {"entropy": [0.5] * 61, "max_vio": [1.0] * 61})
        tracker.finish({})
    names = ["entropy", "max_vio"][:most]
    assert layer_keys(tmp_path) == [f"moe/layer_{layer:02}/{name}" for layer in shown for name in names]
    assert len(layer_keys(tmp_path)) <= most


def test_heat_map_is_an_image_and_a_histogram(tmp_path):
    with Tracker(tmp_path, TrackingSection(), {}) as tracker:
        tracker.heat_map(50, np.array([[4, 0, 2], [0, 0, 0]]))
        tracker.finish({})
    (row,) = history(tmp_path)
    assert row["train/step"] == 50
    assert (row["moe/heat_map._type"], row["moe/expert_shares._type"]) == ("image-file", "histogram")
    assert sum(row["moe/expert_shares.values"]) == 6
    (image,) = tmp_path.glob("wandb/offline-run-*/files/media/images/moe/*.png")
    pixels = imread(image)
    red, blue, even = (pixels[8, 16 * expert + 8] for expert in range(3))
    assert red[0] > red[2], "twice the mean"
    assert blue[2] > blue[0], "none"
    assert min(even[:3]) > 0.9


ARTIFACT = """
from pathlib import Path
from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.tracker import Tracker
with Tracker(Path("run"), TrackingSection(), {}) as tracker:
    Path("run/report.html").write_text("<h1>a run</h1>")
    tracker.artifact(Path("run/report.html"), "report")
    tracker.finish({})
"""


def test_the_report_is_an_artifact_under_a_relative_path(tmp_path):
    """In a process of its own, because wandb's helper keeps the folder that it was started in."""
    home = tmp_path / "plantedhome"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ARTIFACT], cwd=home, env=environment, check=True, timeout=120)
    (artifact,) = records(home / "run", "artifact")
    assert artifact.type == "report"
    assert [(entry.path, entry.local_path) for entry in artifact.manifest.contents] == [
        ("report.html", "run/report.html")
    ]
    for path in (home / "run").rglob("*"):
        assert not path.is_file() or b"plantedhome" not in path.read_bytes(), path


def test_a_report_below_a_home_folder_elsewhere_is_no_artifact(tmp_path):
    run_dir, warnings = tmp_path / "plantedhome" / "run", []
    with Tracker(run_dir, TrackingSection(), {}, warn=warnings.append) as tracker:
        (run_dir / "report.html").write_text("<h1>a run</h1>")
        tracker.artifact(run_dir / "report.html", "report")
        tracker.finish({})
    assert warnings == ["report.html is no artifact in wandb: its path names a home folder; start above it"]
    assert records(run_dir, "artifact") == []


def test_an_alert_reaches_wandb_redacted(tmp_path):
    with Tracker(tmp_path, TrackingSection(), {}) as tracker:
        tracker.alert("guard: dead_experts", "2 experts without a token, https://me:PLANTED@host/")
        tracker.finish({})
    (alert,) = records(tmp_path, "alert")
    assert alert.title == "guard: dead_experts"
    assert alert.text.startswith("2 experts without a token")
    assert "PLANTED" not in alert.text
