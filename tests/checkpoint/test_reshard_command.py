"""`moe-train reshard` and `launch/reshard.py`: options, exit codes, memory that does not grow with the checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import logical_tensors, read, same_bits, save
from typer.testing import CliRunner

from moe_train.checkpoint import Piece, read_manifest, save_checkpoint
from moe_train.checkpoint.source import Key
from moe_train.cli import app
from moe_train.parallel import ParallelGroup

ROOT = Path(__file__).parents[2]
TENSORS = logical_tensors()
EVERY = [
    *("--world", "6", "--expert-parallel", "3", "--redundant", "2", "--shared-ranks", "0"),
    *("--tensor", "1", "--expert-tensor", "1", "--zero", "3", "--jobs", "2"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source"), TENSORS)


def run(*arguments: object):
    return CliRunner().invoke(app, ["reshard", *map(str, arguments)])


def test_the_script_without_an_installation(tmp_path, source):
    """From another folder; and no process group, and none of what only training needs."""
    code = (
        "import runpy, sys; sys.argv[0] = 'reshard.py'\n"
        f"try: runpy.run_path({str(ROOT / 'launch' / 'reshard.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "import torch.distributed as dist; assert not dist.is_initialized()\n"
        "print([name for name in ('deepspeed', 'transformers', 'wandb') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "made"), *EVERY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "world 6, EP 3, ZeRO-3, 2 redundant experts" in result.stdout
    assert re.search(r"6 files, \d+ bytes in \d+\.\d s", result.stdout)
    assert result.stdout.splitlines()[-1] == "[]"
    assert same_bits(read(tmp_path / "made"), TENSORS)
    layout = read_manifest(tmp_path / "made").layout
    assert (layout["world"], layout["expert_parallel"], layout["redundant_experts"]) == (6, 3, 2)


def test_check_says_equal_or_names_the_first_difference(tmp_path, source):
    assert run(source, tmp_path / "made", "--world", 4, "--expert-parallel", 2).exit_code == 0
    result = run(source, tmp_path / "made", "--check")
    assert result.exit_code == 0
    assert "are equal" in result.stdout
    key = Key("exp_avg", "model.layers.10.mlp.experts.down_proj", 4)
    other = save(tmp_path / "other", {**TENSORS, key: TENSORS[key] + 1})
    result = run(other, tmp_path / "made", "--check")
    assert result.exit_code == 1
    assert "exp_avg of model.layers.10.mlp.experts.down_proj, expert 4: other values" in result.stdout


def test_plan_writes_nothing(tmp_path, source):
    result = run(source, tmp_path / "made", "--plan", *EVERY)
    assert result.exit_code == 0
    assert "new layout   world 6, EP 3, ZeRO-3, 2 redundant experts" in result.stdout
    assert not list(tmp_path.iterdir())


def test_errors_are_a_sentence_and_a_code(tmp_path, source, capfd):
    cases = {
        (source, tmp_path, "--world", 2): (5, "exists: a checkpoint is never overwritten"),
        (tmp_path, tmp_path / "made"): (5, "holds no checkpoint"),
        (source, tmp_path / "made", "--expert-parallel", 2): (2, "must divide the number of ranks (3)"),
        (source, source, "--check", "--zero", 1): (2, "--check compares two checkpoints as they are"),
        (source, tmp_path / "made", "--zero", 4): (2, "Invalid value for '--zero'"),
        # a family that is in no profile cannot be cut
        (source, tmp_path / "made", "--tensor", 3): (3, "model.model_type (made_up) has no profile"),
    }
    for arguments, (code, words) in cases.items():
        result = run(*arguments)
        shown = result.output + capfd.readouterr().err
        assert (result.exit_code, words in " ".join(shown.split())) == (code, True), shown
        assert "Traceback" not in shown


MEASURE = """
import sys
from moe_train.cli import app

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
try:
    app(["reshard", *sys.argv[1:]])
except SystemExit as end:
    assert not end.code, end.code
print(before, peak())
"""


def peak_memory(*arguments: object) -> tuple[int, int]:
    """(before, in all) of one reshard in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, after = result.stdout.splitlines()[-1].split()
    return int(before), int(after)


def large(root: Path, experts: int, rows: int, step: int) -> Path:
    """Two states of `experts` matrices [rows, 1024] and one of another layout's cut, written a few at a time."""
    from synthetic import manifest_of

    generator = torch.Generator().manual_seed(0)

    def pieces():
        for expert in range(experts):
            for kind in ("master", "exp_avg"):
                data = torch.randint(0, 1 << 30, (rows * 1024,), generator=generator, dtype=torch.int32)
                yield Piece(
                    name="model.layers.0.mlp.experts.down_proj", expert=expert, kind=kind, shape=(rows, 1024), start=0,
                    data=data.view(torch.float32),
                )  # fmt: skip

    return save_checkpoint(root, manifest_of(step), pieces(), ParallelGroup.single(), 100)


def test_memory_depends_neither_on_the_size_nor_on_the_number_of_experts(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_train.checkpoint.save.FILE_BYTES", 16 << 20)
    changes = ("--world", 4, "--expert-parallel", 2, "--expert-tensor", 2, "--zero", 1, "--jobs", 2)
    grown = []
    for step, (experts, rows) in enumerate([(8, 256), (8, 2048), (64, 256)]):
        source = large(tmp_path, experts, rows, step + 1)
        before, after = peak_memory(source, tmp_path / f"made{step}", *changes)
        grown.append(after - before)
    assert max(grown) < 48 << 20, grown
    assert max(grown[1:]) - grown[0] < 16 << 20, f"of 16, 128 and 128 MiB: {grown}"


@pytest.mark.slow
def test_a_gibibyte_in_little_memory(tmp_path):
    """And equal. One tensor of 64 MiB after another; a process with torch in it takes some 250 MiB by itself."""
    source = large(tmp_path, 8, 16384, 1)
    assert sum(path.stat().st_size for path in source.iterdir()) >= 1 << 30
    before, after = peak_memory(source, tmp_path / "made", "--world", 6, "--expert-parallel", 3, "--expert-tensor", 2)
    assert after < 1 << 29
    assert after - before < 96 << 20
    checked = peak_memory(source, tmp_path / "made", "--check")
    assert checked[1] - checked[0] < 96 << 20
    assert os.path.getsize(tmp_path / "made" / "manifest.json") < 1 << 20
