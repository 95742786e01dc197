"""Write a checkpoint: every rank what it owns, then one rename that makes it exist.

1. rank 0 makes `step_<N>.tmp`. 2. Every rank writes its files, syncs them, and compares what lies on disk with the
bytes it meant to write. 3. All ranks learn whether all succeeded. 4. rank 0 writes the manifest, renames the folder,
moves `latest`, and only then removes old checkpoints, each renamed to a `.tmp` first. A crash before the rename, or in
the middle of a removal, leaves a `.tmp` that is never read, and that the next save removes.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save

from moe_train.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Slice, digest_file, steps_in
from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import TensorSlice

FILE_BYTES = 1 << 30
SLICE_BYTES = 1 << 10
"""About what one piece takes in its file's header and in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One slice to write or read: 1-D `data` are the elements from `start` on of the flattened logical tensor.

    part: where tensor parallelism has cut the tensor, the piece of it whose flattened elements are counted instead;
    `shape` is that of the whole tensor all the same.
    """

    name: str
    expert: int | None
    kind: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor
    part: TensorSlice | None = None

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    pieces: Iterable[Piece],
    world: ParallelGroup,
    keep: int,
    *,
    keep_every: int = 0,
    nbytes: int = 0,
) -> Path:
    """Collective. Returns the checkpoint's folder.

    Args:
        keep, keep_every: see `removable`.
        nbytes: what this rank will write, if known; all ranks' must fit on the disk before one of them writes.

    Raises `CheckpointError` on every rank if any rank failed to write; the previous checkpoint is untouched.
    """
    final = root / f"step_{manifest.step:08d}"
    temporary = root / f"{final.name}.tmp"
    lead = world.rank_in_group == 0
    try:
        _together(world, lambda: _make_folder(root, temporary) if lead else None)
        needed = sum(_together(world, lambda: nbytes))
        _together(world, lambda: _check_space(root, needed))
        written = _together(world, lambda: _write_files(temporary, world.rank_in_group, pieces))
        files: dict[str, FileEntry] = {}
        slices: list[Slice] = []
        for rank_files, rank_slices in written:
            files.update(rank_files)
            slices += rank_slices
        complete = replace(manifest, files=files, slices=tuple(slices))
        _together(world, lambda: _commit(root, temporary, final, complete, keep, keep_every) if lead else None)
    except CheckpointError:
        if lead:  # half a checkpoint would fill the disk that the next one needs
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _together(world: ParallelGroup, action) -> list:
    """Run `action` on each rank; every rank gets every result, or every rank raises the first failure.

    Only failures to write are caught: the death of a peer must end the run, not look like a full disk.
    """
    try:
        outcome = (action(), None)
    except (OSError, CheckpointError) as error:
        outcome = (None, str(error))
    outcomes = world.gather_objects(outcome)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise CheckpointError(f"checkpoint not written (rank {rank}): {failure}")
    return [result for result, _ in outcomes]


def _make_folder(root: Path, temporary: Path) -> None:
    """And remove what killed runs have left half-written."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("step_*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir()


def _check_space(root: Path, needed: int) -> None:
    """On each host. Raises `CheckpointError` with the numbers."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(f"{root}: {needed} bytes needed, {free} free; nothing was written")


def size_of(pieces: Iterable[Piece]) -> int:
    """About the bytes that they take on the disk."""
    return sum(piece.data.nbytes + SLICE_BYTES for piece in pieces)


def _write_files(folder: Path, rank: int, pieces: Iterable[Piece]) -> tuple[dict[str, FileEntry], list[Slice]]:
    files: dict[str, FileEntry] = {}
    slices: list[Slice] = []
    for number, batch in enumerate(_batches(pieces)):
        name = f"rank_{rank:05d}_{number:03d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for piece in batch:
            expert = "" if piece.expert is None else f"[{piece.expert}]"
            box = "" if piece.part is None else "@" + ",".join(f"{start}-{stop}" for start, stop in piece.part.box)
            key = f"{piece.kind}/{piece.name}{expert}{box}:{piece.start}-{piece.stop}"
            tensors[key] = piece.data.detach().to("cpu").contiguous()
            slices.append(
                Slice(
                    name=piece.name,
                    expert=piece.expert,
                    kind=piece.kind,
                    shape=piece.shape,
                    dtype=str(piece.data.dtype).removeprefix("torch."),
                    start=piece.start,
                    stop=piece.stop,
                    file=name,
                    key=key,
                    part=piece.part,
                )
            )
        files[name] = _write_verified(folder / name, save(tensors))
    return files, slices


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Files of about FILE_BYTES, so that a save needs little memory beyond the training state."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.data.nbytes > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.data.nbytes
    if batch:
        yield batch


def _write_verified(path: Path, content: bytes) -> FileEntry:
    """Write, sync, read back. The digest is of the bytes meant: hashing the file would certify a short write."""
    wanted = hashlib.sha256(content).hexdigest()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(f"{path}: {error.strerror}; {len(content)} bytes needed, {free} free") from None
    if digest_file(path) != wanted:
        raise CheckpointError(f"{path}: what lies on disk differs from what was written")
    return FileEntry(bytes=len(content), sha256=wanted)


def _commit(root: Path, temporary: Path, final: Path, manifest: Manifest, keep: int, keep_every: int) -> None:
    _write_verified(temporary / MANIFEST, manifest.to_json().encode())
    _sync_folder(temporary)
    replaced = root / f"{final.name}.replaced.tmp"
    if final.exists():  # an older save of the same step: a run that went back and came here again
        final.rename(replaced)
    temporary.rename(final)
    _sync_folder(root)
    pointer = root / "latest.tmp"
    pointer.write_text(final.name + "\n")
    pointer.replace(root / "latest")
    # steps after this one are damaged or of a run that went back; they must not push out what this run can resume from
    earlier = [(step, path) for step, path in steps_in(root) if step <= manifest.step]
    old = removable([step for step, _ in earlier], keep, keep_every)
    for step, path in earlier:
        if step in old:
            _remove(path)
    shutil.rmtree(replaced, ignore_errors=True)


def removable(steps: list[int], keep: int, keep_every: int = 0) -> set[int]:
    """Steps that are neither among the newest `keep` nor multiples of `keep_every` (0: none is kept for that)."""
    return {step for step in sorted(steps)[:-keep] if not keep_every or step % keep_every}


def _remove(old: Path) -> None:
    """Half removed, it must not look like a checkpoint. The new one exists: what stays is no failure to write."""
    rubbish = old.with_name(f"{old.name}.removed.tmp")
    with suppress(OSError):
        old.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
