"""What can be wrong with a checkpoint to export, a place to export to, and a folder to start from."""

import errno
import json
import os
import pickle
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_runs import exported, recipe_of, save_as_started, save_drawn, tensors_of
from safetensors.torch import save_file
from typer.testing import CliRunner

from moe_train.checkpoint import read_manifest
from moe_train.cli import app
from moe_train.config import parse_recipe
from moe_train.config.load import dump_recipe
from moe_train.errors import CheckpointError, ConfigError, MoeTrainError
from moe_train.hub.export import export, plan_export
from moe_train.hub.fingerprint import inspect_folder
from moe_train.testing import run_distributed
from moe_train.train import resolve_run

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory) -> tuple[Path, Path]:
    """A run with two checkpoints, and its export in several files."""
    place = tmp_path_factory.mktemp("made")
    recipe = recipe_of(corpus)
    run_distributed(save_drawn, 1, recipe, str(place / "run"))
    run_distributed(save_as_started, 1, recipe, str(place / "run"), 1)
    exported(place / "run", place / "folder", shard_bytes=60_000)
    return place / "run", place / "folder"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made[0], tmp_path / "run")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made[1], tmp_path / "folder")


def step_of(run: Path, step: int = 1) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def refusal(call, *args, **options) -> str:
    with pytest.raises(MoeTrainError) as caught:
        call(*args, **options)
    return str(caught.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


# ---- export


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_no_checkpoint(tmp_path, make):
    make(tmp_path / "x")
    assert f"{tmp_path / 'x'}" in refusal(plan_export, tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip, "its content differs from the manifest's SHA-256"),
        (lambda path: os.truncate(path, 100), "has 100 bytes; the manifest says"),
        (Path.unlink, "is missing or no plain file"),
    ],
)
def test_a_damaged_checkpoint(run, tmp_path, damage, problem):
    path = step_of(run) / "rank_00000_000.safetensors"
    damage(path)
    message = refusal(plan_export, step_of(run), tmp_path / "out")
    assert problem in message
    assert str(path) in message
    plan = plan_export(run, tmp_path / "out")  # of a run the newest that is whole
    assert plan.source.directory == step_of(run, 0)
    assert problem in plan.passed_over[0]
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "warning: passed over a checkpoint" in result.output


def test_a_manifest_edited_by_hand(run, tmp_path):
    path = step_of(run) / "manifest.json"
    path.write_text(path.read_text().replace('"step":1', '"step":2'))
    assert "the file is damaged" in refusal(plan_export, step_of(run), tmp_path / "out")


def test_a_place_that_is_taken(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        assert "exists: an export never overwrites" in refusal(plan_export, run, tmp_path / name)
    (tmp_path / "new.tmp").mkdir()
    assert "another export is writing it, or one was killed" in refusal(plan_export, run, tmp_path / "new")
    assert "lies inside of" in refusal(plan_export, run, step_of(run) / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "new.tmp", "run"]


def test_no_space(run, tmp_path, monkeypatch):
    needed = plan_export(run, tmp_path / "out").folder.nbytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    message = refusal(plan_export, run, tmp_path / "out")
    found = re.search(r"(\d+) bytes are needed and (\d+) are free: nothing was written", message)
    assert found
    assert int(found[2]) == needed - 1 < needed <= int(found[1])
    assert not (tmp_path / "out.tmp").exists()


def test_a_disk_that_fills_up_leaves_nothing(run, tmp_path, monkeypatch):
    plan = plan_export(run, tmp_path / "out")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(export, plan)
    assert "No space left on device" in message
    assert f"{plan.folder.nbytes} bytes needed" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_forgets_is_found(run, tmp_path, monkeypatch):
    plan, fsync = plan_export(run, tmp_path / "out"), os.fsync

    def forget(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "model.safetensors":
            flip(path)

    monkeypatch.setattr(os, "fsync", forget)
    assert "differs from what was written" in refusal(export, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def edited(run: Path, **state) -> Path:
    step = step_of(run)
    manifest = read_manifest(step)
    (step / "manifest.json").write_text(replace(manifest, state=manifest.state | state).to_json())
    return step


def test_another_model_than_the_recipe_says(run, tmp_path):
    config = read_manifest(step_of(run)).state["model_config"]
    wider = refusal(plan_export, edited(run, model_config=config | {"moe_intermediate_size": 16}), tmp_path / "out")
    assert "does not hold the qwen3_moe that its recipe describes" in wider
    assert "gate_up_proj, expert 0: [48, 32] in the checkpoint, [32, 32] in the model" in wider
    assert "and 14 more" in wider
    deeper = refusal(plan_export, edited(run, model_config=config | {"num_hidden_layers": 3}), tmp_path / "out")
    assert "master of model.layers.2.self_attn.q_proj.weight is not in the checkpoint" in deeper
    flatter = refusal(plan_export, edited(run, model_config=config | {"num_hidden_layers": 1}), tmp_path / "out")
    assert "master of model.layers.1.input_layernorm.weight is not in the model" in flatter


def test_what_no_stock_model_computes(tmp_path, corpus):
    run_distributed(save_as_started, 1, recipe_of(corpus, moe={"hash_layers": 1}), str(tmp_path / "run"))
    message = refusal(plan_export, tmp_path / "run", tmp_path / "out")
    assert "first 1 MoE layers route by token id (moe.hash_layers)" in message


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--dtype", "fp8"], 2, "--dtype (fp8) must be bf16 or fp32"),
        (["--tokenizer", "gone/tokenizer.json"], 2, "or give --tokenizer a path on this machine, or none"),
        (["--shard-size", "0"], 2, "--shard-size"),
    ],
)
def test_wrong_options(run, tmp_path, options, code, problem):
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), *options])
    assert result.exit_code == code
    assert problem in result.output
    assert not (tmp_path / "out").exists()


# ---- a folder to start from


def index_of(folder: Path, change) -> None:
    tree = json.loads((folder / INDEX).read_text())
    change(tree["weight_map"])
    (folder / INDEX).write_text(json.dumps(tree))


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def only_pickle(folder: Path) -> None:
    for path in (*folder.glob("model*"),):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def pickle_in_the_index(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    index_of(folder, lambda index: index.update({"lm_head.weight": "pytorch_model.bin"}))


def pickle_under_another_name(folder: Path) -> None:
    first_file(folder).write_bytes(pickle.dumps(Bomb()))


def rewritten(folder: Path, change) -> None:
    """All tensors in one file, changed."""
    tensors = tensors_of(folder)
    for path in (*folder.glob("model*"),):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def add_to_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


GATE = "model.layers.0.mlp.experts.0.gate_proj.weight"
FOLDERS = {
    "gone": (shutil.rmtree, "there is no config.json there"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json there"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")], "holds no model.safetensors"),
    "pickle alone": (only_pickle, "pytorch_model.bin is pickle, which can run any program when it is read: not opened"),
    "pickle in the index": (pickle_in_the_index, "pytorch_model.bin is pickle"),
    "pickle inside": (pickle_under_another_name, "model-00001-of-"),
    "outside": (
        lambda f: index_of(f, lambda index: index.update({GATE: "../other.safetensors"})),
        "names '../other.safetensors', which is no safetensors file of this folder: not opened",
    ),
    "absolute": (
        lambda f: index_of(f, lambda index: index.update({GATE: "/etc/x.safetensors"})),
        "names '/etc/x.safetensors'",
    ),
    "missing file": (lambda f: first_file(f).unlink(), "model-00001-of-00004.safetensors is missing"),
    "cut off": (lambda f: os.truncate(first_file(f), 3000), "model-00001-of-00004.safetensors: "),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} cannot be read"),
    "index without map": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX} has no weight_map"),
    "index lies": (
        lambda f: index_of(f, lambda index: index.update({"model.extra": index[GATE]})),
        "has no model.extra, which model.safetensors.index.json says is in it",
    ),
    "tensor twice": (
        lambda f: (
            save_file({GATE: torch.ones(24, 32)}, f / "model-x.safetensors"),
            index_of(f, lambda index: index.update({GATE: "model-x.safetensors"})),
        ),
        f"{GATE} is both in",
    ),
    "missing tensors": (
        lambda f: rewritten(f, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts.3." in name]),
        "  model.layers.0.mlp.experts.3.gate_proj.weight is missing\n"
        "  model.layers.0.mlp.experts.3.up_proj.weight is missing\n"
        "  model.layers.0.mlp.experts.3.down_proj.weight is missing\n",
    ),
    "more tensors": (
        lambda f: rewritten(f, lambda tensors: tensors.update({"model.bonus": torch.ones(2)})),
        "  model.bonus is in the folder, not in the qwen3_moe",
    ),
    "integers": (
        lambda f: rewritten(f, lambda tensors: tensors.update({GATE: torch.ones(24, 32, dtype=torch.int8)})),
        f"{GATE} is stored as I8: weights are read from F64, F32, F16, BF16",
    ),
    "another shape": (
        lambda f: add_to_config(f, moe_intermediate_size=16),
        f"  {GATE}: [24, 32] in the folder, [16, 32] in the qwen3_moe",
    ),
    "another family": (
        lambda f: add_to_config(f, model_type="olmoe"),
        "does not hold the weights of this olmoe:\n"
        "  model.layers.0.self_attn.q_norm.weight: [8] in the folder, [32] in the olmoe\n",
    ),
    "unknown family": (lambda f: add_to_config(f, model_type="llama"), "model.model_type (llama) has no profile"),
    "quantised": (lambda f: add_to_config(f, quantization_config={"quant_method": "fp8"}), "the weights are quantised"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_refused(name, folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    break_it, problem = FOLDERS[name]
    break_it(folder)
    recipe = recipe_of(corpus)
    recipe["model"] = {"weights": str(folder)}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(parse_recipe(recipe)))
    with pytest.raises(MoeTrainError) as caught:
        resolve_run(tmp_path / "recipe.yaml", (), 1, 1)
    message = str(caught.value).replace(f"{tmp_path / 'recipe.yaml'}: ", "")
    assert problem in message
    assert str(folder) in message or name == "unknown family"
    alone = refusal(inspect_folder, folder)
    assert problem in alone
    result = CliRunner().invoke(app, ["import", str(folder)])
    assert result.exit_code == caught.value.exit_code != 0
    assert "Traceback" not in result.output
    assert not (tmp_path / "exploded").exists()


def test_a_run_whose_folder_is_damaged_after_the_check_stops_on_every_rank(folder, corpus, tmp_path):
    recipe = recipe_of(corpus, parallel={"expert": 2})
    recipe["model"] = {"weights": str(folder)}
    os.truncate(first_file(folder), 3000)
    for kind, message in run_distributed(start_refused, 2, recipe, str(tmp_path / "run")):
        assert kind == "CheckpointError"
        assert str(first_file(folder)) in message


def start_refused(rank: int, recipe: dict, run_dir: str) -> tuple[str, str]:
    try:
        save_as_started(rank, recipe, run_dir)
    except (CheckpointError, ConfigError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    """Its snapshots are folders of links to files that are named by their hashes."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    assert inspect_folder(folder).fingerprint.tensors == 57


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"force_load": {"balanced": True}, "aux_loss_coef": 0}, ["moe.force_load"]),
        ({"router": "sinkhorn", "capacity_factor": 1.5}, ["moe.router (sinkhorn)", "moe.capacity_factor (1.5)"]),
        ({"aux_loss_coef": 0.01}, []),
    ],
)
def test_training_that_chose_otherwise_is_said(moe, words, corpus, tmp_path):
    run_distributed(save_drawn, 1, recipe_of(corpus, moe=moe), str(tmp_path / "run"))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if line.startswith("warning:")]
    assert len(said) == len(words)
    for line, word in zip(said, words, strict=True):
        assert word in line
        assert "chooses the top k" in line
