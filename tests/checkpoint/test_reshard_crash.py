"""A reshard that is killed at any moment goes on where it was, and ends with the very files of one that was not."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import few_cuts, logical_tensors, read, same_bits, save

from moe_train.checkpoint import read_manifest
from moe_train.checkpoint import reshard as resharding
from moe_train.checkpoint import save as saving
from moe_train.checkpoint import stream as streaming
from moe_train.checkpoint.compare import compare
from moe_train.checkpoint.journal import JOURNAL
from moe_train.checkpoint.reshard import reshard
from moe_train.checkpoint.source import Key
from moe_train.errors import CheckpointError

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from moe_train.checkpoint import save
from moe_train.checkpoint.reshard import reshard

source, destination, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
save.FILE_BYTES = 1 << 20

def start(destination):
    child = os.fork()
    if child == 0:
        try:
            reshard(source, destination, {"world": 4, "expert": 2, "zero": 1}, jobs=2)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child

begun = time.monotonic()
assert os.waitpid(start(destination.with_name("whole")), 0)[1] == 0
seconds = time.monotonic() - begun
draw = random.Random(int(sys.argv[4]))
seen = []
for _ in range(kills):
    child = start(destination)
    time.sleep(draw.uniform(0.02, 1) * seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    done = destination.exists()
    journal = destination.with_name(destination.name + ".tmp") / "reshard.jsonl"
    lines = journal.read_bytes().count(b"\\n") - 1 if journal.exists() else 0
    seen.append([os.WIFSIGNALED(status), done, lines])
    if done:
        destination.rename(destination.with_name(f"done{len(seen)}"))
print(json.dumps({"seen": seen, "seconds": seconds}), flush=True)
sys.exit(0 if destination.exists() else os.waitstatus_to_exitcode(os.waitpid(start(destination), 0)[1]))
"""


def test_killed_at_random_moments_it_still_ends_the_same(tmp_path):
    """Each kill is SIGKILL; the process then runs again over what the last one left."""
    block = "model.layers.0.mlp.experts"
    generator = torch.Generator().manual_seed(1)
    tensors = {
        Key(kind, f"{block}.{name}", expert): torch.randn(shape, generator=generator)
        for expert in range(5)
        for name, shape in {"gate_up_proj": (768, 1024), "down_proj": (1024, 384)}.items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }
    source = save(tmp_path, tensors)
    seed = 20_261_123
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(source), str(tmp_path / "made"), "20", str(seed)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)["seen"]
    assert len(seen) == 20
    assert sum(signaled for signaled, _, _ in seen) >= 10, seen
    assert any(lines > 0 for _, _, lines in seen), f"never killed between two files: {seen}"
    ends = [tmp_path / "made", *tmp_path.glob("done*")]
    assert len(ends) == 1 + sum(done for _, done, _ in seen)
    expected = read_manifest(tmp_path / "whole")
    for end in ends:
        assert read_manifest(end) == expected
        assert compare(source, end).equal
    assert same_bits(read(tmp_path / "made"), tensors)
    assert not list(tmp_path.glob("*.tmp"))


# ---- each point of death, one by one


class Killed(BaseException):
    """Nothing in the product may catch it and go on."""


TENSORS = logical_tensors()
CHANGES = {"world": 3, "expert": 3, "zero": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(saving, "FILE_BYTES", 1500)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source"), TENSORS)


def run(source: Path, root: Path) -> Path:
    return reshard(source, root / "made", CHANGES, few_cuts, jobs=1).destination


def stop_before(patch: pytest.MonkeyPatch, owner, name: str, after: int, applies=lambda *args: True) -> None:
    """As by a kill before the call number `after` of those that apply."""
    original, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        if applies(*args):
            calls.append(args)
            if len(calls) > after:
                raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, stop)


POINTS = {
    "make": (Path, "mkdir", 0, lambda path, *rest: path.name == "made.tmp"),
    "first write": (os, "write", 0, lambda *args: True),
    "later write": (os, "write", 30, lambda *args: True),
    "sync": (os, "fsync", 5, lambda *args: True),
    "rename of a file": (Path, "rename", 4, lambda *args: True),
    "manifest": (resharding, "slices_of", 0, lambda *args: True),
    "sync of the folder": (resharding, "sync_folder", 0, lambda *args: True),
    "rename": (Path, "rename", 0, lambda path, target: path.name == "made.tmp"),
    "sync of the root": (resharding, "sync_folder", 1, lambda *args: True),
    "end": (Path, "unlink", 0, lambda path, **rest: path.name == JOURNAL),
}


@pytest.mark.parametrize("point", POINTS)
def test_no_point_of_death_is_fatal(tmp_path, monkeypatch, source, point):
    owner, name, after, applies = POINTS[point]
    with monkeypatch.context() as patch:
        stop_before(patch, owner, name, after, applies)
        with pytest.raises(Killed):
            run(source, tmp_path)
    exists = list(POINTS).index(point) > list(POINTS).index("rename")
    assert (tmp_path / "made").exists() == exists
    if not exists:
        run(source, tmp_path)
    assert same_bits(read(tmp_path / "made"), TENSORS)
    assert compare(source, tmp_path / "made").equal
    left = {path.name for path in (tmp_path / "made").iterdir()} - {JOURNAL if exists else ""}
    assert left == {*read_manifest(tmp_path / "made").files, "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.fixture
def unfinished(tmp_path, monkeypatch, source) -> Path:
    """A reshard that died after seven files."""
    with monkeypatch.context() as patch:
        stop_before(patch, resharding, "write_file", 7)
        with pytest.raises(Killed):
            run(source, tmp_path)
    folder = tmp_path / "made.tmp"
    assert len(list(folder.glob("*.safetensors"))) == 7
    return folder


def written(monkeypatch, source: Path, root: Path) -> set[str]:
    """Go on; the files that had to be written."""
    names = set()
    original = streaming.write_file

    def note(folder, file, *rest):
        names.add(file.name)
        return original(folder, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resharding, "write_file", note)
        made = run(source, root)
    assert same_bits(read(made), TENSORS)
    return names


def test_finished_files_are_kept(tmp_path, monkeypatch, source, unfinished):
    kept = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    names = written(monkeypatch, source, tmp_path)
    made = tmp_path / "made"
    assert names == set(read_manifest(made).files) - set(kept)
    assert {name: (made / name).stat().st_mtime_ns for name in kept} == kept


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("damage", [flip, link, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_finished_file_that_is_not_whole_is_written_again(tmp_path, monkeypatch, source, unfinished, damage):
    victim = sorted(unfinished.glob("*.safetensors"))[3]
    kept = {path.name for path in unfinished.glob("*.safetensors")} - {victim.name}
    damage(victim)
    names = written(monkeypatch, source, tmp_path)
    assert victim.name in names
    assert not names & kept
    assert not (tmp_path / "made" / victim.name).is_symlink()


def test_files_that_nobody_vouches_for_are_written_again(tmp_path, monkeypatch, source, unfinished):
    """The journal's last lines are torn off, and a file lies there that is of no plan."""
    journal = unfinished / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    known = {json.loads(line)["file"] for line in lines[1:4]}
    (unfinished / "rank_00099_000.safetensors").write_bytes(b"stray")
    (unfinished / "rank_00000_099.safetensors.part").write_bytes(b"half")
    names = written(monkeypatch, source, tmp_path)
    assert names == set(read_manifest(tmp_path / "made").files) - known
    assert not list((tmp_path / "made").glob("*99*"))


@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b"[]\n[]\n", b'{"reshard": 1}\n', b"\xff\n"])
def test_a_journal_that_is_none(tmp_path, source, unfinished, content):
    """Nothing is kept on its word: begun anew, or refused if it is of something else."""
    (unfinished / JOURNAL).write_bytes(content)
    if b"reshard" in content:
        with pytest.raises(CheckpointError, match="is an unfinished reshard of something else"):
            run(source, tmp_path)
    else:
        assert same_bits(read(run(source, tmp_path)), TENSORS)


def test_another_layout_does_not_mix_with_what_is_there(tmp_path, source, unfinished):
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    words = re.escape("layout: world 3, EP 3, ZeRO-1, now world 3, EP 3, ZeRO-3")
    with pytest.raises(CheckpointError, match=f"unfinished reshard of something else .*{words}"):
        reshard(source, tmp_path / "made", {**CHANGES, "zero": 3}, few_cuts)
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before


def test_another_source_does_not_mix_with_what_is_there(tmp_path, unfinished):
    with pytest.raises(CheckpointError, match=r"unfinished reshard of something else .*source: "):
        run(save(tmp_path / "other", logical_tensors(1)), tmp_path)


def test_two_at_once_are_one_too_many(tmp_path, source, unfinished):
    with (unfinished / JOURNAL).open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"made\.tmp is being written by another reshard"):
            run(source, tmp_path)
    run(source, tmp_path)


def test_space_is_counted_without_what_is_finished(tmp_path, monkeypatch, source, unfinished):
    import shutil
    from types import SimpleNamespace

    kept = sum(path.stat().st_size for path in unfinished.glob("*.safetensors"))
    plan_bytes = resharding.plan_reshard(source, tmp_path / "made", CHANGES, few_cuts).nbytes
    free = SimpleNamespace(free=plan_bytes - kept - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=f"{plan_bytes - kept} bytes .* are needed"):
        run(source, tmp_path)
    free.free += 1
    run(source, tmp_path)


def test_a_destination_that_comes_to_exist_is_not_replaced(tmp_path, monkeypatch, source):
    original = resharding._commit

    def late(plan, files):
        plan.destination.mkdir()
        original(plan, files)

    with monkeypatch.context() as patch:
        patch.setattr(resharding, "_commit", late)
        with pytest.raises(CheckpointError, match=r"made has come to exist: the new checkpoint stays in .*made\.tmp"):
            run(source, tmp_path)
    assert not list((tmp_path / "made").iterdir())
    (tmp_path / "made").rmdir()
    assert same_bits(read(run(source, tmp_path)), TENSORS)


def test_a_disk_that_fails_names_the_file_and_what_was_finished_is_kept(tmp_path, monkeypatch, source):
    original, calls = os.write, []

    def full(descriptor, content):
        calls.append(len(content))
        if len(calls) > 60:
            raise OSError(28, "No space left on device")
        return original(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(
            CheckpointError, match=r"made\.tmp/rank_.*: No space left on device; \d+ bytes needed, \d+ f"
        ):
            run(source, tmp_path)
    finished = len(list((tmp_path / "made.tmp").glob("*.safetensors")))
    assert finished
    names = written(monkeypatch, source, tmp_path)
    assert len(names) == len(read_manifest(tmp_path / "made").files) - finished


def test_a_disk_that_keeps_less_is_found(tmp_path, monkeypatch, source):
    original = os.fsync

    def shorten(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 1000:
            os.ftruncate(descriptor, 100)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", shorten)
    with pytest.raises(CheckpointError, match=r"\.part: 100 bytes were kept of \d+"):
        run(source, tmp_path)


def test_an_interrupt_stops_all_threads_at_once(tmp_path, monkeypatch, source):
    """And nothing that was begun is taken for finished."""
    original = streaming.write_file

    def interrupt(folder, file, *rest):
        if file.name == "rank_00001_000.safetensors":
            raise KeyboardInterrupt
        return original(folder, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resharding, "write_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reshard(source, tmp_path / "made", CHANGES, few_cuts, jobs=3)
    assert not (tmp_path / "made").exists()
    assert same_bits(read(run(source, tmp_path)), TENSORS)
