"""Parts of tensor parallelism: however a tensor was cut when it was written, any other cut reads the same bits."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, save_checkpoint
from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import TensorSlice

SHAPES = {"rows": (7, 5), "columns": (5, 7), "fused": (14, 5)}
"""7 is what is cut: rows, columns, or rows of both halves of a fused gate_up."""
MAKERS = {"rows": TensorSlice.rows, "columns": TensorSlice.columns, "fused": TensorSlice.fused}
KINDS = {"master": torch.float32, "exp_avg": torch.bfloat16}


def parts_of(name: str, borders: list[int]) -> list[TensorSlice | None]:
    """One part between each two borders; no borders: the whole tensor, without a part."""
    if not borders:
        return [None]
    return [MAKERS[name](SHAPES[name], start, stop) for start, stop in pairwise([0, *borders, 7])]


def tensors() -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        (kind, name): torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
        for kind, dtype in KINDS.items()
    }


def pieces_of(source: dict, layout: dict[str, list[int]], shards: int = 1) -> list[Piece]:
    """Each part as one rank has it, flat, cut once more in equal shards as ZeRO does."""
    found = []
    for (kind, name), whole in source.items():
        for part in parts_of(name, layout[name]):
            local = (whole.clone() if part is None else part.take(whole)).view(-1)
            size = -(-local.numel() // shards)
            for start in range(0, local.numel(), max(size, 1)):
                data = local[start : start + size]
                found.append(
                    Piece(name=name, expert=4, kind=kind, shape=SHAPES[name], start=start, data=data, part=part)
                )
    return found


def write(root: Path, pieces: list[Piece]) -> Path:
    manifest = Manifest(step=1, model_type="tiny", layout={}, recipe={}, scalars={}, state={})
    return save_checkpoint(root, manifest, pieces, ParallelGroup.single(), 2)


def blank(source: dict) -> dict:
    return {key: torch.full_like(value, float("nan")) for key, value in source.items()}


def assert_read(directory: Path, layout: dict[str, list[int]], shards: int) -> None:
    expected, found = pieces_of(tensors(), layout, shards), pieces_of(blank(tensors()), layout, shards)
    reader = CheckpointReader(directory)
    reader.check(found, {(name, 4) for name in SHAPES})
    reader.fill(found)
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine.data, right.data), f"{right.kind} of {right.name}, {right.part} from {right.start}"


WHOLE: dict[str, list[int]] = {name: [] for name in SHAPES}
HALVES = {name: [3] for name in SHAPES}
THIRDS = {name: [2, 5] for name in SHAPES}
LAYOUTS = {"whole": WHOLE, "two": HALVES, "three": THIRDS, "one that is all": {name: [7] for name in SHAPES}}


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("read", LAYOUTS)
@pytest.mark.parametrize("written", LAYOUTS)
def test_any_cut_reads_what_any_other_has_written(tmp_path, written, read, shards):
    directory = write(tmp_path, pieces_of(tensors(), LAYOUTS[written], 2))
    assert_read(directory, LAYOUTS[read], shards)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_borders(tmp_path_factory, data):
    """Empty parts too: more ranks than rows."""
    layout = st.fixed_dictionaries({name: st.lists(st.integers(0, 7), max_size=4).map(sorted) for name in SHAPES})
    root = tmp_path_factory.mktemp("parts", numbered=True)
    directory = write(root, pieces_of(tensors(), data.draw(layout), data.draw(st.integers(1, 3))))
    assert_read(directory, data.draw(layout), data.draw(st.integers(1, 3)))


def test_parts_that_are_read_as_written_are_never_put_together(tmp_path, monkeypatch):
    directory = write(tmp_path, pieces_of(tensors(), HALVES, 2))

    def fail(*args):
        raise AssertionError("put together")

    monkeypatch.setattr(CheckpointReader, "_assemble", fail)
    assert_read(directory, HALVES, 3)
    with pytest.raises(AssertionError, match="put together"):
        assert_read(directory, THIRDS, 1)


def test_a_tensor_is_put_together_once_for_consecutive_pieces_and_then_let_go(tmp_path, monkeypatch):
    directory = write(tmp_path, pieces_of(tensors(), HALVES, 2))
    reader, reads = CheckpointReader(directory), []
    original = CheckpointReader._read
    monkeypatch.setattr(CheckpointReader, "_read", lambda self, *args: reads.append(args) or original(self, *args))
    reader.fill(pieces_of(blank(tensors()), THIRDS, 3))
    assert len(reads) == len(reader.manifest.slices), "each stored slice once"
    assert reader._last is None


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_missing_box_is_named(tmp_path, name, shards):
    pieces = [
        piece
        for piece in pieces_of(tensors(), THIRDS, shards)
        if not (piece.name == name and piece.kind == "exp_avg" and piece.part == parts_of(name, [2, 5])[1])
    ]
    with pytest.raises(CheckpointError, match=f"parts of exp_avg of {name}, expert 4 are missing"):
        CheckpointReader(write(tmp_path, pieces))


def test_a_missing_range_of_a_box_is_named(tmp_path):
    pieces = pieces_of(tensors(), HALVES, 2)
    lost = pieces.pop(3)
    with pytest.raises(CheckpointError, match=f"parts of {lost.kind} of {lost.name}, expert 4 are missing"):
        CheckpointReader(write(tmp_path, pieces))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda part: None, "are cut in more than one way"),
        (lambda part: TensorSlice((1, 7, 5), ((0, 1), (0, 3), (0, 5))), "are cut in more than one way"),
        (lambda part: TensorSlice((7, 5), ((1, 4), (0, 5))), "overlap"),
        (lambda part: TensorSlice((7, 5), ((4, 7), (0, 5))), "overlap"),
    ],
)
def test_parts_that_do_not_lie_side_by_side_are_refused(tmp_path, change, problem):
    source = {key: value for key, value in tensors().items() if key == ("master", "rows")}
    first, second = pieces_of(source, HALVES)
    assert first.part is not None
    changed = Piece(**{**vars(first), "part": change(first.part)})
    with pytest.raises(CheckpointError, match=f"of rows, expert 4 .*{problem}"):
        CheckpointReader(write(tmp_path, [changed, second]))


def test_slices_that_disagree_about_the_shape_are_refused(tmp_path):
    source = {key: value for key, value in tensors().items() if key == ("master", "rows")}
    first, second = pieces_of(source, WHOLE, 2)
    changed = Piece(**{**vars(second), "shape": (5, 7)})
    with pytest.raises(CheckpointError, match="parts of master of rows, expert 4 disagree about its shape"):
        CheckpointReader(write(tmp_path, [first, changed]))


def test_a_file_that_holds_less_than_its_manifest_says(tmp_path):
    """One stored element must not be spread over the range that was asked for."""
    source = {key: value for key, value in tensors().items() if key == ("master", "rows")}
    (piece,) = pieces_of(source, WHOLE)
    directory = write(tmp_path, [Piece(**{**vars(piece), "data": piece.data[:1]})])
    tree = json.loads((directory / "manifest.json").read_text())
    del tree["sha256"]
    tree["slices"][0]["stop"] = 35
    body = json.dumps(tree, separators=(",", ":"))[:-1]
    digest = hashlib.sha256(body.encode()).hexdigest()
    (directory / "manifest.json").write_text(f'{body},"sha256":"{digest}"}}')
    with pytest.raises(CheckpointError, match="is shorter than the manifest says"):
        CheckpointReader(directory).fill(pieces_of(blank(source), WHOLE))
