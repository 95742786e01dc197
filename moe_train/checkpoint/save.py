"""Write a checkpoint: every rank what it owns, then one rename that makes it exist.

1. rank 0 makes `step_<N>.tmp`, and all ranks' bytes must fit. 2. Every rank writes its files, syncs them, and compares
what lies on disk with the bytes it meant to write: no communication, so a thread can do it while training goes on.
3. All ranks learn whether all succeeded. 4. rank 0, perhaps on its thread again, writes the manifest, renames the
folder, moves `latest`, and only then removes old checkpoints, each renamed to a `.tmp` first. 5. All ranks learn
whether it succeeded. A crash before the rename, or in the middle of a removal, leaves a `.tmp` that is never read, and
that the next save removes.
"""

import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from moe_train.checkpoint.commit import Retention, commit
from moe_train.checkpoint.manifest import MANIFEST, FileEntry, Manifest, Slice, digest_file
from moe_train.checkpoint.piece import Piece
from moe_train.checkpoint.snapshot import available_memory
from moe_train.checkpoint.stored import header_of, slice_key
from moe_train.checkpoint.threads import Stopped
from moe_train.disk import write_all
from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup

FILE_BYTES = 1 << 30
CHUNK_BYTES = 4 << 20
"""Hashed and written at once; between two, a save can be given up."""
CANCEL_S = 30.0
"""How long to wait for a thread that has been told to give up: a disk that hangs must not keep the process."""
SPARE_MEMORY = 0.9
"""Of a host's free memory, how much a save may take."""


def save_checkpoint(
    root: Path,
    manifest: Manifest,
    pieces: Iterable[Piece],
    world: ParallelGroup,
    keep: int,
    *,
    keep_every: int = 0,
    keep_best: int = 0,
    nbytes: int = 0,
) -> Path:
    """All stages of a `Save` at once. Collective. Returns the checkpoint's folder.

    Args:
        keep, keep_every, keep_best: see `Retention`.
        nbytes: what this rank will write, if known.

    Raises `CheckpointError` on every rank if any rank failed to write; the previous checkpoint is untouched.
    """
    retention = Retention(keep=keep, keep_every=keep_every, keep_best=keep_best)
    save = Save(root, manifest, world, retention, nbytes=nbytes)
    save.write(pieces)
    return save.commit()


@dataclass
class _Written:
    """Of one rank: its files, and what they hold."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    seconds: float = 0.0


class Save:
    """A checkpoint on its way: begun, gathered and committed by all ranks together, written by each rank alone between.

    Args:
        nbytes: what this rank will write, if known; all ranks' must fit on the disk before one of them writes.
        memory: bytes of host memory that this rank will take before it writes, if it writes on a thread.

    Attributes, of all ranks together, known after `gather`:
        nbytes: of the files. write_s: seconds of the slowest writer.

    Collective. Raises `CheckpointError` on every rank; the previous checkpoint is untouched.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        world: ParallelGroup,
        retention: Retention,
        *,
        nbytes: int = 0,
        memory: int = 0,
    ):
        self.manifest, self.world, self.retention = manifest, world, retention
        self.final = root / f"step_{manifest.step:08d}"
        self.temporary = root / f"{self.final.name}.tmp"
        self.nbytes, self.write_s = 0, 0.0
        self._lead = world.rank_in_group == 0
        self.gathered = False
        self._written = _Written()
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._bug: BaseException | None = None
        self._cancelled = threading.Event()
        host = socket.gethostname()

        def prepare() -> tuple[int, str, int]:
            if self._lead:
                _make_folder(root, self.temporary)
            return nbytes, host, memory

        def check(asked: list[tuple[int, str, int]]) -> bool:
            _check_space(root, sum(size for size, _, _ in asked))
            wanted = sum(size for _, there, size in asked if there == host)
            return not wanted or wanted <= SPARE_MEMORY * available_memory()

        with self._whole_or_nothing():
            asked = _together(world, prepare)
            self.fits_memory = all(_together(world, lambda: check(asked)))

    @property
    def step(self) -> int:
        return self.manifest.step

    def write(self, pieces: Iterable[Piece]) -> None:
        """This rank's files, now. A failure to write is kept for `gather`."""

        def action() -> None:
            began = time.perf_counter()
            files, slices = _write_files(self.temporary, self.world.rank_in_group, pieces, self._go_on)
            self._written = _Written(files, slices, time.perf_counter() - began)

        self._attempt(action)

    def start(self, pieces: list[Piece]) -> None:
        """The same on a thread. Nobody may change the pieces' data before `busy` is false."""
        self._on_thread(lambda: self.write(pieces))

    def gather(self) -> None:
        """Learn what all ranks have written, waiting for their threads; then rank 0 makes the checkpoint exist, on a
        thread if there was one before. Collective.

        Raises `CheckpointError` on every rank if any rank failed to write.
        """
        self._join()
        with self._whole_or_nothing():
            told = self.world.gather_objects((self._written, self._failure))
            _raise_first([failure for _, failure in told])
        written = [rank for rank, _ in told]
        files = {name: entry for rank in written for name, entry in rank.files.items()}
        slices = tuple(item for rank in written for item in rank.slices)
        complete = replace(self.manifest, files=files, slices=slices)
        self.nbytes = sum(entry.bytes for entry in files.values())
        self.write_s = max(rank.seconds for rank in written)
        self.gathered = True
        if self._lead:
            action = partial(self._attempt, lambda: self._commit(complete))
            self._on_thread(action) if self.started else action()

    def commit(self) -> Path:
        """What is still to be done, and wait for it. Collective. Raises as `gather` does."""
        if not self.gathered:
            self.gather()
        self._join()
        with self._whole_or_nothing():
            _raise_first(self.world.gather_objects(self._failure))
        return self.final

    @property
    def started(self) -> bool:
        """On a thread."""
        return self._thread is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread has something left to do."""
        return self._thread is not None and self._thread.is_alive()

    def cancel(self) -> None:
        """Give it up: this rank's thread ends soon, and what it has written is never read."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(CANCEL_S)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, CheckpointError) as error:
            self._failure = str(error)

    def _on_thread(self, action: Callable[[], None]) -> None:
        def serve() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - raised by `_join`, on the thread that can end the run
                self._bug = error

        self._thread = threading.Thread(target=serve, name=f"write {self.final.name}", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._bug is not None:
            raise self._bug

    def _commit(self, complete: Manifest) -> None:
        content = complete.to_json().encode()
        _write_verified(self.temporary / MANIFEST, [content], len(content))
        commit(self.temporary, self.final, self.step, self.retention)

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise Stopped

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if self._lead:  # half a checkpoint would fill the disk that the next one needs
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise


def _together(world: ParallelGroup, action: Callable) -> list:
    """Run `action` on each rank; every rank gets every result, or every rank raises the first failure.

    Only failures to write are caught: the death of a peer must end the run, not look like a full disk.
    """
    try:
        outcome = (action(), None)
    except (OSError, CheckpointError) as error:
        outcome = (None, str(error))
    outcomes = world.gather_objects(outcome)
    _raise_first([failure for _, failure in outcomes])
    return [result for result, _ in outcomes]


def _raise_first(failures: list[str | None]) -> None:
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise CheckpointError(f"checkpoint not written (rank {rank}): {failure}")


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


def _write_files(
    folder: Path, rank: int, pieces: Iterable[Piece], go_on: Callable[[], None]
) -> tuple[dict[str, FileEntry], list[Slice]]:
    files: dict[str, FileEntry] = {}
    slices: list[Slice] = []
    for number, batch in enumerate(_batches(pieces)):
        name = f"rank_{rank:05d}_{number:03d}.safetensors"
        batch.sort(key=lambda piece: -piece.data.element_size())
        keys = [slice_key(piece.tensor, piece.part, piece.start, piece.stop) for piece in batch]
        header, size = header_of((key, piece.dtype, piece.data.numel()) for key, piece in zip(keys, batch, strict=True))
        content = _content(header, batch, go_on)
        files[name] = _write_verified(folder / name, content, len(header) + size)
        slices += [
            Slice(
                name=piece.name,
                expert=piece.expert,
                kind=piece.kind,
                shape=piece.shape,
                dtype=piece.dtype,
                start=piece.start,
                stop=piece.stop,
                file=name,
                key=key,
                part=piece.part,
            )
            for key, piece in zip(keys, batch, strict=True)
        ]
    return files, slices


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Files of about FILE_BYTES."""
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


def _content(header: bytes, batch: list[Piece], go_on: Callable[[], None]) -> Iterator[bytes | memoryview]:
    """The bytes of a file in order; of a piece that lies elsewhere, one copy at a time is in host memory."""
    yield header
    for piece in batch:
        data = memoryview(piece.data.detach().to("cpu").contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), CHUNK_BYTES):
            go_on()
            yield data[start : start + CHUNK_BYTES]


def _write_verified(path: Path, content: Iterable[bytes | memoryview], nbytes: int) -> FileEntry:
    """Write, sync, read back. The digest is of the bytes meant: hashing the file would certify a short write."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for chunk in content:
                digest.update(chunk)
                write_all(descriptor, chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(f"{path}: {error.strerror}; {nbytes} bytes needed, {free} free") from None
    wanted = digest.hexdigest()
    if digest_file(path) != wanted:
        raise CheckpointError(f"{path}: what lies on disk differs from what was written")
    return FileEntry(bytes=nbytes, sha256=wanted)
