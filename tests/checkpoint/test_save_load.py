"""What is saved comes back to the bit however it was cut, and a save that fails leaves the previous one as it was."""

import errno
import math
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, newest_complete, save_checkpoint, steps_in
from moe_train.checkpoint import commit as committing
from moe_train.checkpoint import save as saving
from moe_train.checkpoint.commit import Retention
from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup, Topology, build_groups
from moe_train.testing import run_distributed

SHAPES = {("embed", None): (7, 5), ("norm", None): (11,), ("experts", 0): (4, 6), ("experts", 1): (4, 6)}
KINDS = {"master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.bfloat16}


def manifest_of(step: int) -> Manifest:
    scalars = {"dense": {"step": 3.0}, "experts": {}}
    return Manifest(step=step, model_type="tiny", layout={}, recipe={}, scalars=scalars, state={"position": 1 / 3})


def logical_tensors(seed: int) -> dict[tuple[str, str, int | None], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name, expert): torch.randn(torch.Size(shape).numel(), generator=generator).to(dtype)
        for (name, expert), shape in SHAPES.items()
        for kind, dtype in KINDS.items()
    }


def cut(tensors: dict, borders: dict) -> list[Piece]:
    """One piece between each two borders."""
    pieces = []
    for (kind, name, expert), data in tensors.items():
        places = [0, *sorted(borders[(kind, name, expert)]), len(data)]
        for start, stop in pairwise(places):
            if start < stop:
                shape = SHAPES[(name, expert)]
                pieces.append(
                    Piece(name=name, expert=expert, kind=kind, shape=shape, start=start, data=data[start:stop])
                )
    return pieces


@st.composite
def cuts(draw) -> dict:
    """For each tensor, any places to cut it at."""
    return {
        (kind, name, expert): draw(st.sets(st.integers(1, torch.Size(shape).numel() - 1), max_size=6))
        for (name, expert), shape in SHAPES.items()
        for kind in KINDS
    }


def save(root: Path, step: int, keep: int = 2, seed: int | None = None, borders: dict | None = None) -> Path:
    tensors = logical_tensors(step if seed is None else seed)
    pieces = cut(tensors, borders or {key: set() for key in tensors})
    return save_checkpoint(root, manifest_of(step), pieces, ParallelGroup.single(), keep)


def load(directory: Path, borders: dict | None = None) -> dict:
    tensors = {key: torch.full_like(value, float("nan")) for key, value in logical_tensors(0).items()}
    CheckpointReader(directory).fill(cut(tensors, borders or {key: set() for key in tensors}))
    return tensors


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@settings(max_examples=60, deadline=None)
@given(written=cuts(), read=cuts(), file_bytes=st.sampled_from([1, 100, 1 << 30]))
def test_any_cuts_come_back_to_the_bit(tmp_path_factory, written, read, file_bytes):
    root = tmp_path_factory.mktemp("cuts", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FILE_BYTES", file_bytes)
        directory = save(root, 5, borders=written)
    assert same(load(directory, read), logical_tensors(5))
    manifest = CheckpointReader(directory).manifest
    assert (manifest.step, manifest.state, manifest.scalars["dense"]) == (5, {"position": 1 / 3}, {"step": 3.0})
    assert not list(root.glob("*.tmp"))
    shutil.rmtree(root)


@settings(max_examples=40, deadline=None)
@given(borders=cuts(), data=st.data())
def test_a_missing_part_is_named(tmp_path_factory, borders, data):
    root = tmp_path_factory.mktemp("missing", numbered=True)
    pieces = cut(logical_tensors(1), borders)
    lost = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
    directory = save_checkpoint(root, manifest_of(1), pieces, ParallelGroup.single(), 2)
    name = lost.name if lost.expert is None else f"{lost.name}, expert {lost.expert}"
    with pytest.raises(CheckpointError, match=re.escape(f"{lost.kind} of {name}")):
        load(directory)
    shutil.rmtree(root)


def test_check_lists_ten_mismatches_with_both_shapes_and_copies_nothing(tmp_path):
    reader = CheckpointReader(save(tmp_path, 1))
    data = torch.zeros(12)
    pieces = [Piece(name="embed", expert=None, kind="master", shape=(3, 4), start=0, data=data)]
    pieces += [Piece(name=f"new.{i}", expert=i, kind="master", shape=(1,), start=0, data=data) for i in range(12)]
    with pytest.raises(CheckpointError) as caught:
        reader.check(pieces, {("embed", None)})
    lines = str(caught.value).splitlines()
    assert lines[1] == "  embed: [7, 5] in the checkpoint, [3, 4] in the model"
    assert lines[2] == "  master of new.0, expert 0 is not in the checkpoint"
    assert lines[-1] == "  and 6 more"  # 1 shape, 12 new ones, 3 left over; 10 are shown
    assert len(lines) == 12
    assert not data.any()


def test_check_accepts_what_fits_and_names_what_is_left_over(tmp_path):
    reader = CheckpointReader(save(tmp_path, 1))
    pieces = cut(logical_tensors(0), {key: {3} for key in logical_tensors(0)})
    reader.check(pieces, set(SHAPES))
    with pytest.raises(CheckpointError, match=r"experts, expert 1 is in the checkpoint, not in the model"):
        reader.check(pieces, set(SHAPES) - {("experts", 1)})


def test_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in steps_in(tmp_path)] == [10, 11]
    assert (tmp_path / "latest").read_text() == "step_00000011\n"


@settings(max_examples=300, deadline=None)
@given(steps=st.sets(st.integers(1, 60), min_size=1), keep=st.integers(2, 5), every=st.integers(0, 12))
def test_what_may_be_removed(steps, keep, every):
    newest = sorted(steps, reverse=True)[:keep]
    milestones = {step for step in steps if every and step % every == 0}
    found = Retention(keep=keep, keep_every=every).removable(dict.fromkeys(steps))
    assert found == steps - {*newest} - milestones


@settings(max_examples=300, deadline=None)
@given(
    losses=st.dictionaries(st.integers(1, 60), st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, None]), min_size=1),
    keep=st.integers(2, 4),
    best=st.integers(0, 4),
)
def test_the_best_are_kept(losses, keep, best):
    """None of the removed is better than one of those kept for being good, or as good and earlier."""
    retention = Retention(keep=keep, keep_best=best)
    removed = retention.removable(losses)
    good = retention.best(losses)
    assert len(good) == min(best, sum(loss is not None and math.isfinite(loss) for loss in losses.values()))
    assert not removed & ({*good} | {*sorted(losses)[-keep:]})
    assert len(removed) == len(losses) - len({*good} | {*sorted(losses)[-keep:]})
    for step in losses.keys() - {*good}:
        assert losses[step] not in (1.0, 2.0, 3.0) or all((losses[kept], kept) < (losses[step], step) for kept in good)


def test_milestones_are_kept(tmp_path):
    for step in range(1, 9):
        pieces = cut(logical_tensors(step), {key: set() for key in logical_tensors(step)})
        save_checkpoint(tmp_path, manifest_of(step), pieces, ParallelGroup.single(), 2, keep_every=3)
    assert [step for step, _ in steps_in(tmp_path)] == [3, 6, 7, 8]


def test_damaged_later_steps_do_not_push_out_the_one_just_written(tmp_path):
    """A run that fell back to step 10, past damaged ones, and saves again before it reaches them."""
    for step in (10, 20, 30):
        (save(tmp_path, step, keep=5) / "manifest.json").write_text("{")
    save(tmp_path, 10, keep=2, seed=1)
    save(tmp_path, 11, keep=2)
    assert [step for step, _ in steps_in(tmp_path)] == [10, 11, 20, 30]
    assert newest_complete(tmp_path)[0] == tmp_path / "step_00000011"


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 7, seed=1)
    assert same(load(save(tmp_path, 7, seed=2)), logical_tensors(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000007"]


def test_what_killed_runs_left_is_removed(tmp_path):
    for name in ("step_00000003.tmp", "step_00000005.tmp", "step_00000005.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000_000.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000005"]


# ---- a process that dies


class Killed(BaseException):
    """Nothing in the product may catch it."""


POINTS = ["make", "write", "sync", "read back", "manifest", "sync folder", "rename", "sync root", "latest", "prune"]


@contextmanager
def killed_at(point: str, patch: pytest.MonkeyPatch):
    """The next save ends there, as by SIGKILL: before the named action, and with half a file at `sync`."""

    def before(module, name: str, applies=lambda *args: True):
        original = getattr(module, name)

        def stop(*args, **kwargs):
            if applies(*args):
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(module, name, stop)

    if point == "make":
        before(Path, "mkdir", lambda path, *rest: path.name.endswith(".tmp"))
    elif point == "write":
        before(saving, "_write_verified")
    elif point == "sync":
        before(os, "fsync")
    elif point == "read back":
        before(saving, "digest_file")
    elif point == "manifest":
        before(saving, "_write_verified", lambda path, *rest: path.name == "manifest.json")
    elif point == "sync folder":
        before(committing, "sync_folder", lambda folder: folder.name.endswith(".tmp"))
    elif point == "rename":
        before(Path, "rename")
    elif point == "sync root":
        before(committing, "sync_folder", lambda folder: not folder.name.endswith(".tmp"))
    elif point == "latest":
        before(Path, "replace")
    else:

        def half(path, *args, **kwargs):
            for victim in sorted(Path(path).glob("*.safetensors")):
                victim.unlink()
                raise Killed

        patch.setattr(committing.shutil, "rmtree", half)
    with pytest.raises(Killed):
        yield
    patch.undo()


@pytest.mark.parametrize("point", POINTS)
def test_no_point_of_death_leaves_a_folder_that_cannot_be_resumed(tmp_path, monkeypatch, point):
    for step in (1, 2):
        save(tmp_path, step)
    with killed_at(point, monkeypatch):
        save(tmp_path, 3)
    committed = POINTS.index(point) > POINTS.index("rename")
    expected = 3 if committed else 2
    if point == "prune":  # what is half removed looks like no checkpoint
        assert [step for step, _ in steps_in(tmp_path)] == [2, 3]
    found, reasons = newest_complete(tmp_path)
    assert found is not None
    assert (found.name, reasons) == (f"step_{expected:08d}", [])
    assert same(load(found), logical_tensors(expected))
    save(tmp_path, 3)
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003", "step_00000004"]


# ---- a disk that fails


def save_with_a_fault(rank: int, root: str, fault: str) -> str:
    """Step 2 on two ranks, rank 1 with a fault: its message."""
    tensors = {key: value for number, (key, value) in enumerate(logical_tensors(2).items()) if number % 2 == rank}
    pieces = cut(tensors, {key: set() for key in tensors})
    world = ParallelGroup([0, 1], rank, torch.distributed.group.WORLD)

    def failing(path: Path, content, nbytes: int):
        path.write_bytes(next(iter(content))[:10])
        raise OSError(errno.EIO, "Input/output error", str(path))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and fault == "error":
            patch.setattr(saving, "_write_verified", failing)
        if rank == 1 and fault == "short":
            patch.setattr(saving.os, "fsync", lambda descriptor: os.ftruncate(descriptor, 100))
        try:
            save_checkpoint(Path(root), manifest_of(2), pieces, world, 2)
        except CheckpointError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("fault", "text"), [("error", "Input/output error"), ("short", "differs from what was written")]
)
def test_one_rank_that_cannot_write_fails_the_save_everywhere(tmp_path, fault, text):
    save(tmp_path, 1)
    messages = run_distributed(save_with_a_fault, 2, str(tmp_path), fault)
    assert len(set(messages)) == 1
    assert messages[0].startswith("checkpoint not written (rank 1): ")
    assert text in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert same(load(tmp_path / "step_00000001"), logical_tensors(1))
    assert set(run_distributed(save_with_a_fault, 2, str(tmp_path), "none")) == {"no error"}
    assert same(load(tmp_path / "step_00000002"), logical_tensors(2))


@pytest.fixture
def one_mebibyte(tmp_path):
    """A file system that is soon full."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_says_what_is_needed_and_what_is_free(one_mebibyte):
    save(one_mebibyte, 1)
    big = [Piece(name="big", expert=None, kind="master", shape=(1 << 19,), start=0, data=torch.zeros(1 << 19))]
    with pytest.raises(CheckpointError, match=r"step_00000002\.tmp.*No space left.*; 2097\d+ bytes needed, \d+ free"):
        save_checkpoint(one_mebibyte, manifest_of(2), big, ParallelGroup.single(), 2)
    assert sorted(path.name for path in one_mebibyte.iterdir()) == ["latest", "step_00000001"]
    assert same(load(one_mebibyte / "step_00000001"), logical_tensors(1))
    save(one_mebibyte, 3)
    assert newest_complete(one_mebibyte)[0] == one_mebibyte / "step_00000003"


def save_more_than_fits(rank: int, root: str, free: int) -> str:
    """Two ranks that want 600 and 601 bytes, where rank 1 sees `free`: the message."""
    world = ParallelGroup([0, 1], rank, torch.distributed.group.WORLD)
    usage = SimpleNamespace(free=free if rank else 10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda path: usage)
        try:
            save_checkpoint(Path(root), manifest_of(2), cut_for(rank), world, 2, nbytes=600 + rank)
        except CheckpointError as error:
            return str(error)
    return "no error"


def cut_for(rank: int) -> list[Piece]:
    tensors = {key: value for number, (key, value) in enumerate(logical_tensors(2).items()) if number % 2 == rank}
    return cut(tensors, {key: set() for key in tensors})


def test_what_does_not_fit_is_not_begun(tmp_path):
    """All ranks' bytes count, and each host looks at its own disk."""
    save(tmp_path, 1)
    messages = run_distributed(save_more_than_fits, 2, str(tmp_path), 1200)
    assert set(messages) == {
        f"checkpoint not written (rank 1): {tmp_path}: 1201 bytes needed, 1200 free; nothing was written"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert same(load(tmp_path / "step_00000001"), logical_tensors(1))
    assert run_distributed(save_more_than_fits, 2, str(tmp_path), 1201) == ["no error"] * 2
    assert same(load(tmp_path / "step_00000002"), logical_tensors(2))


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_a_folder_that_cannot_be_made(tmp_path, what):
    (tmp_path / "file").touch()
    root = tmp_path / "file" if what == "a file" else tmp_path / "file" / "checkpoints"
    with pytest.raises(CheckpointError, match="checkpoint not written"):
        save(root, 1)


def save_and_find(rank: int, root: str, damaged: int | None) -> tuple[str, int]:
    """Two checkpoints of one file a rank; rank `damaged`'s file of the newer one loses a bit. What each rank finds."""
    world = build_groups(Topology(world=2, expert=1)).world
    folder = Path(root)
    for step in (1, 2):
        tensors = logical_tensors(10 * step + rank)
        mine = {key: value for key, value in tensors.items() if (key[2] or 0) == rank}
        save_checkpoint(folder, manifest_of(step), cut(mine, {key: set() for key in mine}), world, keep=2)
    if rank == 0 and damaged is not None:
        path = folder / "step_00000002" / f"rank_{damaged:05d}_000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    world.barrier()
    found, reasons = newest_complete(folder, world)
    assert found is not None
    return found.name, len(reasons)


@pytest.mark.parametrize("damaged", [None, 0, 1])
def test_ranks_share_the_hashing_and_agree(tmp_path, damaged):
    expected = ("step_00000002", 0) if damaged is None else ("step_00000001", 1)
    assert run_distributed(save_and_find, 2, str(tmp_path), damaged) == [expected] * 2
