"""Every damage to a checkpoint's files is found before anything is read from them, and named."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, newest_complete, save_checkpoint, steps_in
from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup


def write_checkpoint(root: Path, step: int, keep: int = 100) -> Path:
    """Three data files of the same size."""
    generator = torch.Generator().manual_seed(step)
    pieces = [
        Piece(
            name=f"layer.{index}",
            expert=index or None,
            kind="master",
            shape=(8, 8),
            start=0,
            data=torch.randn(64, generator=generator),
        )
        for index in range(3)
    ]
    manifest = Manifest(step=step, model_type="tiny", layout={}, recipe={}, scalars={}, state={"position": step * 1.5})
    return save_checkpoint(root, manifest, pieces, ParallelGroup.single(), keep)


@pytest.fixture(autouse=True)
def _one_piece_per_file(monkeypatch):
    monkeypatch.setattr("moe_train.checkpoint.save.FILE_BYTES", 1)


@pytest.fixture
def root(tmp_path) -> Path:
    """Two checkpoints, steps 9 and 10."""
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def refused(directory: Path, *words: str) -> None:
    """Opening it by name fails with these words; the search passes it over for the same reason and finds step 9."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory)
    found, reasons = newest_complete(directory.parent)
    assert found == directory.parent / "step_00000009"
    assert reasons == [str(caught.value)]
    assert str(directory) in reasons[0]
    for word in words:
        assert word in reasons[0]


def data_file(directory: Path, number: int = 1) -> Path:
    return directory / f"rank_00000_{number:03d}.safetensors"


def test_whole_checkpoints_are_accepted(root):
    assert newest_complete(root) == (root / "step_00000010", [])
    assert len(list((root / "step_00000010").glob("*.safetensors"))) == 3
    assert CheckpointReader(root / "step_00000010").manifest.state == {"position": 15.0}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_changed_byte_is_found_wherever_it_is(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("flip", numbered=True)
    try:
        for step in (9, 10):
            write_checkpoint(root, step)
        directory = root / "step_00000010"
        path = data.draw(st.sampled_from(sorted(directory.iterdir())))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        refused(directory, path.name)
    finally:
        shutil.rmtree(root)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swapped(path: Path) -> None:
    other = path.with_name("rank_00000_002.safetensors")
    mine, theirs = path.read_bytes(), other.read_bytes()
    assert len(mine) == len(theirs)
    path.write_bytes(theirs)
    other.write_bytes(mine)


def replaced_by_a_link(path: Path) -> None:
    """To a file with the very content that is expected."""
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def joined_by_a_stray(path: Path) -> None:
    shutil.copy(path.with_name("rank_00000_000.safetensors"), path.with_name("rank_00007_000.safetensors"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncated, "rank_00000_001"),
        (emptied, "rank_00000_001"),
        (lengthened, "rank_00000_001"),
        (Path.unlink, "rank_00000_001"),
        (swapped, "rank_00000_001"),
        (replaced_by_a_link, "rank_00000_001"),
        (replaced_by_a_folder, "rank_00000_001"),
        (joined_by_a_stray, "rank_00007_000"),
    ],
)
def test_damaged_data_files_are_named(root, damage: Callable[[Path], None], named):
    directory = root / "step_00000010"
    damage(data_file(directory))
    refused(directory, named)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["cannot be read"]),
        (b"{", ["cannot be read"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (b"[" * 100_000, ["cannot be read"]),
        (b"[]", ["format None", "reads formats 1 and 2"]),
        (b"null", ["format None"]),
        (b"17", ["format None"]),
        (b'{"format":3,"new_key":1}', ["format 3", "reads formats 1 and 2"]),
        (b'{"format":1}', ["damaged"]),
        (b'{"format":1,"sha256":"0"}', ["damaged"]),
        (b'{"format":2,"sha256":"0"}', ["damaged"]),
    ],
)
def test_a_manifest_that_is_none_is_named(root, content, words):
    directory = root / "step_00000010"
    (directory / "manifest.json").write_bytes(content)
    refused(directory, "manifest.json", *words)


@pytest.mark.parametrize("length", [1, 10, -1, -2, -40])
def test_a_truncated_manifest_is_named(root, length):
    directory = root / "step_00000010"
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes()[:length])
    refused(directory, "manifest.json")


def rewrite_manifest(directory: Path, change: Callable[[dict], None]) -> None:
    """With a digest that fits: what somebody who wants to harm would write."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    change(tree)
    body = json.dumps(tree, separators=(",", ":"))[:-1]
    digest = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(f'{body},"sha256":"{digest}"}}')


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/hostname", "rank_00000_000.pt", "sub/rank_00000_000.safetensors", ""]
)
@pytest.mark.parametrize("place", ["files", "slices"])
def test_file_names_that_lead_elsewhere_are_not_opened(root, name, place):
    directory = root / "step_00000010"
    outside = root.parent / "x"

    def change(tree: dict) -> None:
        if place == "files":
            tree["files"][name] = tree["files"].pop("rank_00000_000.safetensors")
        else:
            tree["slices"][0]["file"] = name

    shutil.copy(data_file(directory, 0), outside)
    rewrite_manifest(directory, change)
    refused(directory, "manifest.json", repr(name), "not opened")


def drop_a_key(tree: dict) -> None:
    del tree["slices"][0]["start"]


def add_a_key(tree: dict) -> None:
    tree["extra"] = 1


def make_files_a_list(tree: dict) -> None:
    tree["files"] = [1]


def forget_a_file(tree: dict) -> None:
    del tree["files"]["rank_00000_002.safetensors"]


@pytest.mark.parametrize("change", [drop_a_key, add_a_key, make_files_a_list, forget_a_file])
def test_a_manifest_of_another_shape_is_refused(root, change):
    directory = root / "step_00000010"
    rewrite_manifest(directory, change)
    with pytest.raises(CheckpointError, match=r"manifest\.json|rank_00000_002"):
        CheckpointReader(directory)
    assert newest_complete(root)[0] == root / "step_00000009"


def test_parts_that_are_missing_from_the_manifest_are_named(root):
    directory = root / "step_00000010"
    rewrite_manifest(directory, lambda tree: tree["slices"][1].update(stop=63))
    with pytest.raises(CheckpointError, match=r"parts of master of layer\.1, expert 1 are missing"):
        CheckpointReader(directory)


def test_a_manifest_of_the_first_format_is_read(root):
    """It knew no parts of tensor parallelism."""
    directory = root / "step_00000010"

    def to_first(tree: dict) -> None:
        tree["format"] = 1
        for item in tree["slices"]:
            assert item.pop("part") is None

    rewrite_manifest(directory, to_first)
    data = torch.full((64,), float("nan"))
    piece = Piece(name="layer.1", expert=1, kind="master", shape=(8, 8), start=0, data=data)
    CheckpointReader(directory).fill([piece])
    generator = torch.Generator().manual_seed(10)
    assert torch.equal(data, [torch.randn(64, generator=generator) for _ in range(2)][1])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"view_shape": [8, 8], "box": [[0, 9], [0, 8]]}, ["lies outside its view (8, 8)"]),
        ({"view_shape": [8, 8], "box": [[-1, 8], [0, 8]]}, ["lies outside its view (8, 8)"]),
        ({"view_shape": [8, 8], "box": [[5, 4], [0, 8]]}, ["lies outside its view (8, 8)"]),
        ({"view_shape": [8, 8], "box": [[0, 8]]}, ["has not one (start, stop) for each dimension"]),
        ({"view_shape": [8, 8], "box": [[0, 8], [0, 8, 9]]}, ["has not one (start, stop) for each dimension"]),
        ({"view_shape": [8, 9], "box": [[0, 8], [0, 8]]}, ["shape [8, 8] cannot be seen as [8, 9]"]),
        ({"view_shape": [4, 16], "box": [[0, 4], [0, 16]]}, ["shape [8, 8] cannot be seen as [4, 16]"]),
        ({"view_shape": [64], "box": [[0, 64]]}, ["shape [8, 8] cannot be seen as [64]"]),
        ({"view_shape": [8, 8.0], "box": [[0, 8], [0, 8]]}, ["must be made of integers"]),
        ({"view_shape": [8, 8], "box": [["0", 8], [0, 8]]}, ["must be made of integers"]),
        ({"view_shape": [8, 8], "box": [[0, 4], [0, 8]]}, ["elements 0 to 64 lie outside its 32"]),
        ({"view_shape": [8, 8], "box": 3}, ["layer.1, expert 1"]),
        ({"view_shape": [8, 8]}, ["'box'"]),
        ("all of it", ["layer.1, expert 1"]),
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_its_tensor_is_refused(root, part, words):
    directory = root / "step_00000010"
    rewrite_manifest(directory, lambda tree: tree["slices"][1].update(part=part))
    refused(directory, "manifest.json: the part of master of layer.1, expert 1 does not fit the tensor: ", *words)


@pytest.mark.parametrize("content", [None, "", "step_00000099\n", "../../etc\r\n", "step_00000009", "\0" * 5000])
def test_latest_is_a_hint_that_decides_nothing(root, content):
    (root / "latest").unlink()
    if content is not None:
        (root / "latest").write_text(content)
    assert newest_complete(root) == (root / "step_00000010", [])
    write_checkpoint(root, 11)
    assert (root / "latest").read_text() == "step_00000011\n"


def test_steps_are_ordered_by_number_whatever_their_spelling_and_times(tmp_path):
    write_checkpoint(tmp_path, 9).rename(tmp_path / "step_9")
    write_checkpoint(tmp_path, 10).rename(tmp_path / "step_10")
    write_checkpoint(tmp_path, 100)
    for number, path in enumerate(sorted(tmp_path.glob("step_*"))):
        os.utime(path, (number, number))
    assert [step for step, _ in steps_in(tmp_path)] == [9, 10, 100]
    shutil.rmtree(tmp_path / "step_00000100")
    assert newest_complete(tmp_path)[0] == tmp_path / "step_10"


def test_unfinished_and_foreign_entries_are_ignored(root):
    shutil.copytree(root / "step_00000010", root / "step_00000011.tmp")
    shutil.copytree(root / "step_00000010", root / "old_step_00000012")
    (root / "step_00000013").write_text("a file")
    for number in range(2000):
        (root / f"stray_{number}").touch()
    assert newest_complete(root) == (root / "step_00000010", [])


def test_no_checkpoint_at_all(tmp_path):
    assert newest_complete(tmp_path) == (None, [])
    assert newest_complete(tmp_path / "missing") == (None, [])


def test_every_reason_is_told_when_none_is_whole(root):
    for step in (9, 10):
        truncated(data_file(root / f"step_{step:08d}"))
    found, reasons = newest_complete(root)
    assert found is None
    assert ["step_00000010" in reason for reason in reasons] == [True, False]


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_planted_pickle_is_never_opened(root):
    directory, marker = root / "step_00000010", root / "executed"
    bomb = pickle.dumps(Marker(marker))
    for name in ("evil.pt", "manifest.pkl", "rank_00000_000.pt"):
        (directory / name).write_bytes(bomb)
    reader = CheckpointReader(directory)
    reader.fill([Piece(name="layer.0", expert=None, kind="master", shape=(8, 8), start=0, data=torch.zeros(64))])
    assert not marker.exists()
    data_file(directory).write_bytes(bomb)
    refused(directory, "rank_00000_001")
    with pytest.raises(CheckpointError, match="rank_00000_001"):
        CheckpointReader(directory, verify=False).fill(
            [Piece(name="layer.1", expert=1, kind="master", shape=(8, 8), start=0, data=torch.zeros(64))]
        )
    assert not marker.exists()
    pickle.loads(bomb).close()
    assert marker.exists(), "the bomb itself does not work"
