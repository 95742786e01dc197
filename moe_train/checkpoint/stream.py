"""Write a rank's files from a source, a megabyte in memory at a time."""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_train.checkpoint import save
from moe_train.checkpoint.manifest import FileEntry, Slice
from moe_train.checkpoint.source import Source
from moe_train.checkpoint.stored import header_of, slice_key
from moe_train.checkpoint.target import Owned
from moe_train.checkpoint.threads import Meter
from moe_train.disk import write_all
from moe_train.errors import CheckpointError

BUFFER_BYTES = 1 << 20
"""Per thread, twice: what is written, and what is read around it. Little enough to stay in a core's cache."""
FILES_PER_RANK = 1000
"""A file's name has three digits for its number."""
SYNC_BYTES = 128 << 20
"""What is written goes to the disk, and out of the page cache, in steps of this: the source is to stay in it."""


@dataclass(frozen=True, slots=True)
class OutFile:
    """One file of a rank: what is in it, in order, and its size."""

    name: str
    items: tuple[Owned, ...]
    nbytes: int


def files_of(rank: int, items: list[Owned], source: Source) -> Iterator[OutFile]:
    """Files of about a save's size; larger ones where a rank would have too many."""
    sizes = [(item.stop - item.start) * source.tensors[item.key].itemsize for item in items]
    limit = max(save.FILE_BYTES, -(-sum(sizes) // (FILES_PER_RANK // 2)))
    batches: list[list[Owned]] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if not batches or held + size > limit:
            batches.append([])
            held = 0
        batches[-1].append(item)
        held += size
    for number, batch in enumerate(batches):
        # wide elements first: safetensors are aligned
        aligned = tuple(sorted(batch, key=lambda item: -source.tensors[item.key].itemsize))
        name = f"rank_{rank:05d}_{number:03d}.safetensors"
        head, size = header(aligned, source)
        yield OutFile(name, aligned, len(head) + size)


def sources_of(file: OutFile, source: Source) -> set[str]:
    """Files that have something that goes into this one."""
    found: set[str] = set()
    for item in file.items:
        if item.start < item.stop:
            tensor = source.tensors[item.key]
            runs = source.runs(tensor.shape, item.part)
            near = tensor.near(runs.place(item.start), runs.place(item.stop - 1) + 1)
            found.update(stored.file for stored in near)
    return found


def header(items: Iterable[Owned], source: Source) -> tuple[bytes, int]:
    """The bytes before a file's data, and how many bytes of data follow."""
    return header_of((_key(item), source.tensors[item.key].dtype, item.stop - item.start) for item in items)


def _key(item: Owned) -> str:
    return slice_key(item.key, item.part, item.start, item.stop)


def slices_of(file: OutFile, source: Source) -> Iterator[Slice]:
    """What the manifest says of a file."""
    for item in file.items:
        tensor = source.tensors[item.key]
        kind, name, expert = item.key
        yield Slice(
            name=name,
            expert=expert,
            kind=kind,
            shape=tensor.shape,
            dtype=tensor.dtype,
            start=item.start,
            stop=item.stop,
            file=file.name,
            key=_key(item),
            part=item.part,
        )


class Buffers(threading.local):
    """Each thread's own, made when first used."""

    def __init__(self):
        self.out = np.empty(BUFFER_BYTES, dtype=np.uint8)
        self.scratch = np.empty(BUFFER_BYTES, dtype=np.uint8)


def chunks(source: Source, item: Owned, buffers: Buffers) -> Iterator[memoryview]:
    """The bytes of an item in order; each chunk is valid until the next one is asked for."""
    tensor = source.tensors[item.key]
    runs, step = source.runs(tensor.shape, item.part), max(len(buffers.out) // tensor.itemsize, 1)
    for start in range(item.start, item.stop, step):
        stop = min(start + step, item.stop)
        out = buffers.out[: (stop - start) * tensor.itemsize]
        source.read(item.key, runs, start, stop, out, buffers.scratch)
        yield memoryview(out)  # type: ignore[arg-type]


def unfinished(path: Path) -> Path:
    """What a file is called until it is known to be whole."""
    return path.with_name(f"{path.name}.part")


def write_file(path: Path, file: OutFile, source: Source, buffers: Buffers, meter: Meter) -> FileEntry:
    """Write and sync `unfinished(path)`. The digest is of the bytes meant, not of what a disk has kept.

    Raises `CheckpointError`, also if the disk is full.
    """
    part, digest, unsynced = unfinished(path), hashlib.sha256(), 0

    def emit(content: bytes | memoryview) -> None:
        nonlocal unsynced
        digest.update(content)
        write_all(descriptor, content)
        unsynced += len(content)
        if unsynced >= SYNC_BYTES:
            _sync(descriptor)
            unsynced = 0
        meter.advance(len(content))

    try:
        part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(part, flags, 0o666)
        try:
            emit(header(file.items, source)[0])
            for item in file.items:
                for chunk in chunks(source, item, buffers):
                    emit(chunk)
            _sync(descriptor)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if size != file.nbytes:
            raise CheckpointError(f"{part}: {size} bytes were kept of {file.nbytes}")
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(f"{path}: {error.strerror}; {file.nbytes} bytes needed, {free} free") from None
    return FileEntry(bytes=file.nbytes, sha256=digest.hexdigest())


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
