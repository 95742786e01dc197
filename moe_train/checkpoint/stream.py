"""Write a rank's files from a source, a megabyte in memory at a time."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_train.checkpoint import save
from moe_train.checkpoint.manifest import FileEntry, Slice
from moe_train.checkpoint.source import DTYPES, Source
from moe_train.checkpoint.target import Owned
from moe_train.checkpoint.threads import Meter
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
        header, size = header_of(aligned, source)
        yield OutFile(name, aligned, len(header) + size)


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


def name_of(item: Owned) -> str:
    """What a save calls it inside of a file."""
    kind, name, expert = item.key
    unit = "" if expert is None else f"[{expert}]"
    box = "" if item.part is None else "@" + ",".join(f"{start}-{stop}" for start, stop in item.part.box)
    return f"{kind}/{name}{unit}{box}:{item.start}-{item.stop}"


def header_of(items: Iterable[Owned], source: Source) -> tuple[bytes, int]:
    """The bytes of a safetensors file before its data, and how many bytes of data follow."""
    entries, begin = {}, 0
    for item in items:
        code, size = DTYPES[source.tensors[item.key].dtype]
        end = begin + (item.stop - item.start) * size
        entries[name_of(item)] = {"dtype": code, "shape": [item.stop - item.start], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin


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
            key=name_of(item),
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
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
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
            emit(header_of(file.items, source)[0])
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


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
