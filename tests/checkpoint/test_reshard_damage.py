"""A source that is damaged or made to do harm is refused by the file's name, and nothing is written for it."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import EXPERTS, few_cuts, logical_tensors, save

from moe_train.checkpoint import save as saving
from moe_train.checkpoint.compare import compare
from moe_train.checkpoint.reshard import reshard, verify_source
from moe_train.checkpoint.source import Source
from moe_train.checkpoint.threads import Crew
from moe_train.errors import CheckpointError

VICTIM = "rank_00000_001.safetensors"


@pytest.fixture(autouse=True)
def _several_files(monkeypatch):
    monkeypatch.setattr(saving, "FILE_BYTES", 20_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FILE_BYTES", 20_000)
        return save(tmp_path_factory.mktemp("whole"), logical_tensors())


@pytest.fixture
def source(tmp_path, whole) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "source"))


def refused(source: Path, *words: str) -> None:
    """By a reshard, which leaves nothing behind, and by a comparison."""
    with pytest.raises(CheckpointError) as caught:
        reshard(source, source.parent / "made", {"world": 2}, few_cuts, jobs=2)
    assert [path.name for path in source.parent.glob("made*")] == []
    for word in words:
        assert word in str(caught.value)
    for pair in ((source, source), (source.parent / "other", source)):
        if pair[0].exists():
            with pytest.raises(CheckpointError) as caught:
                compare(*pair, jobs=2)
            for word in words:
                assert word in str(caught.value)


def test_the_undamaged_source_is_accepted(source):
    reshard(source, source.parent / "made", {"world": 2}, few_cuts)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_one_changed_byte_is_found_wherever_it_is(tmp_path_factory, whole, data):
    root = tmp_path_factory.mktemp("flip", numbered=True)
    source = Path(shutil.copytree(whole, root / "source"))
    path = data.draw(st.sampled_from(sorted(source.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    refused(source, str(path))
    shutil.rmtree(root)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replaced_by_a_link(path: Path) -> None:
    """To a file with the very content that is expected."""
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def replaced_by_a_pipe(path: Path) -> None:
    """Opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def joined_by_a_stray(path: Path) -> None:
    shutil.copy(path, path.with_name("rank_00007_000.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, VICTIM),
    "emptied": (lambda path: path.write_bytes(b""), VICTIM),  # type: ignore[dict-item]
    "lengthened": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), VICTIM),  # type: ignore[dict-item]
    "missing": (Path.unlink, VICTIM),
    "link": (replaced_by_a_link, VICTIM),
    "pipe": (replaced_by_a_pipe, VICTIM),
    "stray": (joined_by_a_stray, "rank_00007_000.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_files_are_named(source, name):
    damage, named = DAMAGE[name]
    damage(source / VICTIM)
    refused(source, str(source / named))


@pytest.mark.parametrize("damage", [truncated, replaced_by_a_link, lambda path: path.write_bytes(b"[" * 100_000)])
def test_a_damaged_manifest_is_named(source, damage):
    damage(source / "manifest.json")
    refused(source, str(source / "manifest.json"))


# ---- by hand


def rewrite_manifest(directory: Path, change: Callable[[dict], None]) -> None:
    """With a digest that fits: what somebody who wants to harm would write."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    change(tree)
    body = json.dumps(tree, separators=(",", ":"))[:-1]
    digest = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(f'{body},"sha256":"{digest}"}}')


def slice_of(tree: dict, kind: str = "exp_avg", expert: int | None = 2) -> dict:
    return next(item for item in tree["slices"] if item["kind"] == kind and item["expert"] == expert)


def renamed(name: str) -> Callable[[dict], None]:
    def change(tree: dict) -> None:
        tree["files"][name] = tree["files"].pop(VICTIM)

    return change


def pointed_at(name: str) -> Callable[[dict], None]:
    return lambda tree: slice_of(tree).update(file=name)


@pytest.mark.parametrize("change", [renamed, pointed_at])
@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/rank_00000_000.safetensors", "rank_00000_000.pt"])
def test_names_that_lead_elsewhere_are_not_opened(source, name, change):
    shutil.copy(source / VICTIM, source.parent / "outside")
    rewrite_manifest(source, change(name))
    refused(source, "manifest.json", repr(name), "not opened")


def without_an_expert(tree: dict) -> None:
    tree["slices"] = [item for item in tree["slices"] if item["expert"] != 1]


def without_states_of_the_last_expert(tree: dict) -> None:
    last = EXPERTS - 1
    tree["slices"] = [item for item in tree["slices"] if (item["expert"], item["kind"]) != (last, "exp_avg")]


HAND = {
    "other key": (lambda tree: slice_of(tree).update(key="none"), "has no none of"),
    "other type": (lambda tree: slice_of(tree).update(dtype="float64"), "elements of float64, as the manifest says"),
    "unknown type": (lambda tree: slice_of(tree).update(dtype="complex64"), "is stored as complex64"),
    "half of it": (lambda tree: slice_of(tree).update(stop=5), "expert 2: its parts are missing"),
    "more than it has": (lambda tree: slice_of(tree).update(stop=5_000), "lie outside its 144"),
    "text for a number": (lambda tree: slice_of(tree).update(start="0"), "no number"),
    "a fraction": (lambda tree: slice_of(tree).update(start=0.0), "no number"),
    "negative": (lambda tree: slice_of(tree).update(start=-1), "no number"),
    "true for 1": (lambda tree: slice_of(tree).update(start=True), "no number"),
    "text for an expert": (lambda tree: slice_of(tree).update(expert="2"), "no number"),
    "number for a name": (lambda tree: slice_of(tree).update(name=7), "no text"),
    "larger shape": (lambda tree: slice_of(tree).update(shape=[24, 7]), "its parts are missing"),
    "without an expert": (without_an_expert, "gate_up_proj, expert 1 is missing, and 5 experts are stored"),
    "without a state": (without_states_of_the_last_expert, "expert 4 is missing, and 5 experts are stored"),
    "no list": (lambda tree: tree.update(slices=7), "is not a manifest of this program"),
    "no layout": (lambda tree: tree.update(layout=[]), r"manifest\.json: layout, scalars, state or recipe is not"),
    "no state": (lambda tree: tree.update(state=None), r"manifest\.json: layout, scalars, state or recipe is not"),
    "a layout of text": (lambda tree: tree["layout"].update(zero_stage="1"), "zero_stage '1', which is no number"),
}


@pytest.mark.parametrize("name", HAND)
def test_a_manifest_edited_by_hand_is_refused(source, name):
    change, words = HAND[name]
    rewrite_manifest(source, change)
    with pytest.raises(CheckpointError, match=words):
        reshard(source, source.parent / "made", {"world": 2}, few_cuts, jobs=2)
    assert not list(source.parent.glob("made*"))


def rewrite_file(source: Path, content: bytes) -> None:
    """With a size and a digest in the manifest that fit."""
    (source / VICTIM).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(source, lambda tree: tree["files"].update({VICTIM: entry}))


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_planted_pickle_is_never_opened(source):
    marker = source.parent / "executed"
    bomb = pickle.dumps(Marker(marker))
    for name in ("evil.pt", "manifest.pkl", "rank_00000_000.pt"):
        (source / name).write_bytes(bomb)
    reshard(source, source.parent / "made", {"world": 2}, few_cuts)
    assert not list((source.parent / "made").glob("*.p*")), "what is in no manifest is not taken along"
    shutil.rmtree(source.parent / "made")
    rewrite_file(source, bomb)
    refused(source, str(source / VICTIM), "no safetensors file")
    assert not marker.exists()
    pickle.loads(bomb).close()
    assert marker.exists(), "the bomb itself does not work"


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FILES = {
    "nothing": b"",
    "few bytes": b"\1\0\0",
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": with_header(b"{" * 20_000),
    "no dictionary": with_header([1, 2]),
    "no tensors": with_header({"a": 1}),
    "no place": with_header({"a": {"dtype": "F32", "shape": [1]}}),
    "a place of text": with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, b"1234"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_safetensors_is_named(source, name):
    rewrite_file(source, FILES[name])
    refused(source, str(source / VICTIM), "no safetensors file")


@pytest.mark.parametrize("offsets", [[0, 1 << 30], [-400, 176], [600, 24], [0, 4]])
def test_a_tensor_that_lies_outside_of_its_file_is_named(source, offsets):
    content = (source / VICTIM).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = next(key for key, entry in header.items() if entry["shape"] == [144] and entry["dtype"] == "F32")
    header[key]["data_offsets"] = offsets
    rewrite_file(source, with_header(header, content[8 + length :]))
    refused(source, str(source / VICTIM), "lies outside of the file")


def test_a_file_that_changes_after_it_was_hashed_is_not_read(source):
    found = Source(source)
    verify_source(found, Crew(1))
    shutil.copy(source / VICTIM, source / "copy")
    (source / "copy").rename(source / VICTIM)
    with pytest.raises(CheckpointError, match=f"{VICTIM} has changed while it was read"):
        found._file(VICTIM)


def test_a_file_that_cannot_be_read_is_named(source, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"source/rank_0.*: cannot be read \(Input/output error\)"):
            reshard(source, source.parent / "made", {"world": 2}, few_cuts)
    assert not (source.parent / "made").exists()
    reshard(source, source.parent / "made", {"world": 2}, few_cuts)
