"""A stored checkpoint to stream from: verified first, then read range by range into buffers of the caller's.

Files are read with `pread` and never mapped, so that what is resident is what the caller has allocated. Bytes are
copied as they are: no element is ever interpreted.
"""

import json
import math
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.checkpoint.manifest import (
    MANIFEST,
    Slice,
    coverage_problem,
    describe,
    normal,
    read_manifest,
    refuse_strays,
    steps_in,
    verify_file,
    verify_size,
)
from moe_train.checkpoint.runs import Overlap, Runs
from moe_train.errors import CheckpointError
from moe_train.parallel.tensor_slice import TensorSlice

Advance = Callable[[int], None]
DTYPES = {
    **{"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)},
    **{"int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1)},
    **{"bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1)},
}
"""Names of torch -> what safetensors calls them, and bytes per element."""
OPEN_FILES = 32
"""Per thread: a checkpoint of a large run has more files than a process may open."""
LONG_RUN, WASTE = 1 << 16, 16
"""Runs of this many bytes are read one by one; shorter ones all at once with what lies between them, unless that is
this many times as much."""


class Key(NamedTuple):
    """One logical tensor."""

    kind: str
    name: str
    expert: int | None

    def __str__(self) -> str:
        return f"{self.kind} of {describe(self.name, self.expert)}"


@dataclass(slots=True)
class Stored:
    """Elements start to stop of a part, from byte `offset` of a file on; all of it between two logical indices."""

    runs: Runs
    start: int
    stop: int
    low: int
    high: int
    file: str
    offset: int = -1


@dataclass(slots=True)
class StoredTensor:
    """A logical tensor and where its elements lie."""

    shape: tuple[int, ...]
    dtype: str
    slices: list[Stored] = field(default_factory=list)
    bounds: np.ndarray | None = None

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def near(self, low: int, high: int) -> list[Stored]:
        """Slices that may have elements between two logical indices."""
        if len(self.slices) == 1:
            return self.slices
        if self.bounds is None:
            self.bounds = np.array([(item.low, item.high) for item in self.slices])
        found = np.flatnonzero((self.bounds[:, 0] < high) & (self.bounds[:, 1] > low))
        return [self.slices[number] for number in found]


class Source:
    """The folder of a checkpoint. Its manifest and every part's place are checked here, its files by `verify`.

    tensors: logical tensors, with shape and type. manifest: without its slices, which are here.

    Raises `CheckpointError` by file name.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / MANIFEST).is_symlink():
            raise CheckpointError(f"{directory / MANIFEST} is a link; it is not opened")
        manifest = read_manifest(directory)
        self.manifest = replace(manifest, slices=())
        self.tensors: dict[Key, StoredTensor] = {}
        self._all_runs: dict[tuple[tuple[int, ...], TensorSlice | None], Runs] = {}
        self._expected: dict[str, list[tuple[Stored, str, str]]] = defaultdict(list)
        self._identity: dict[str, tuple[int, ...]] = {}
        self._open = threading.local()
        slices: dict[Key, list[Slice]] = defaultdict(list)
        for item in manifest.slices:
            slices[Key(*item.tensor)].append(item)
        for key, items in slices.items():
            self.tensors[key] = self._tensor(key, items)
        self._listed()

    @property
    def nbytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    def runs(self, shape: tuple[int, ...], part: TensorSlice | None) -> Runs:
        """One for all tensors of this shape and part."""
        key = (shape, normal(part))
        if key not in self._all_runs:
            self._all_runs[key] = Runs(*key)
        return self._all_runs[key]

    def _tensor(self, key: Key, items: list[Slice]) -> StoredTensor:
        where = f"{self.directory / MANIFEST}: {key}"
        numbers = [number for item in items for number in (item.start, item.stop, *item.shape)]
        names = [text for item in items for text in (item.kind, item.name, item.key, item.dtype)]
        if any(type(n) is not int or n < 0 for n in numbers) or any(type(text) is not str for text in names):
            raise CheckpointError(f"{where} has a size that is no number, or a name that is no text")
        if key.expert is not None and type(key.expert) is not int:
            raise CheckpointError(f"{where} has an expert that is no number")
        dtypes = {item.dtype for item in items}
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise CheckpointError(f"{where} is stored as {' and '.join(sorted(dtypes))}; one type of torch is read")
        problem = coverage_problem(items)
        if problem:
            raise CheckpointError(f"{where}: its parts {problem}")
        tensor = StoredTensor(shape=items[0].shape, dtype=items[0].dtype)
        for item in items:
            runs = self.runs(item.shape, item.part)
            if not item.start <= item.stop <= runs.numel:
                raise CheckpointError(f"{where}: elements {item.start} to {item.stop} lie outside its {runs.numel}")
            if item.start < item.stop:
                low, high = runs.place(item.start), runs.place(item.stop - 1) + 1
                stored = Stored(runs, item.start, item.stop, low, high, item.file)
                tensor.slices.append(stored)
                self._expected[item.file].append((stored, item.key, item.dtype))
        return tensor

    def _listed(self) -> None:
        """What a look at the folder shows: links, files of another size, files of another checkpoint."""
        try:
            refuse_strays(self.directory, self.manifest)
            for name, entry in self.manifest.files.items():
                verify_size(self.directory / name, entry)
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.directory}: cannot be read ({error.strerror})") from None

    def verifications(self, advance: Advance) -> list[Callable[[], None]]:
        """One task per file: hash it, and find every part that the manifest says is in it."""
        names = sorted(self.manifest.files, key=lambda name: -self.manifest.files[name].bytes)
        return [lambda name=name: self._verify(name, advance) for name in names]

    def _verify(self, name: str, advance: Advance) -> None:
        path = self.directory / name
        try:
            self._identity[name] = _identity(os.stat(path, follow_symlinks=False))
            verify_file(path, self.manifest.files[name], advance)
            header, begin = _header(path)
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
        for stored, key, dtype in self._expected.pop(name, ()):
            code, size = DTYPES[dtype]
            numel = stored.stop - stored.start
            if header.get(key, {}).get("dtype") != code or header[key].get("shape") != [numel]:
                raise CheckpointError(f"{path} has no {key} of {numel} elements of {dtype}, as the manifest says")
            start, stop = header[key]["data_offsets"]
            if not 0 <= start <= stop <= path.stat().st_size - begin or stop - start != numel * size:
                raise CheckpointError(f"{path}: {key} lies outside of the file")
            stored.offset = begin + start

    def read(self, key: Key, runs: Runs, start: int, stop: int, out: np.ndarray, scratch: np.ndarray) -> None:
        """Elements start to stop of a part into `out`, as bytes.

        Args:
            scratch: bytes to work with; several runs at once are read in pieces of its size.
        """
        tensor = self.tensors[key]
        size, filled = tensor.itemsize, 0
        for stored in tensor.near(runs.place(start), runs.place(stop - 1) + 1):
            overlap = runs.overlap(start, stop, stored.runs, stored.start, stored.stop)
            if overlap is not None:
                places = Overlap(
                    ours=(overlap.ours - start) * size,
                    theirs=(overlap.theirs - stored.start) * size + stored.offset,
                    length=overlap.length * size,
                )
                self._copy(stored.file, places, out, scratch)
                filled += int(places.length.sum())
        if filled < (stop - start) * size:
            raise CheckpointError(f"{self.directory}: parts of {key} are missing")

    def _copy(self, name: str, places: Overlap, out: np.ndarray, scratch: np.ndarray) -> None:
        ours, theirs, length = places.ours, places.theirs, places.length
        ends = theirs + length
        useful = int(length.sum())
        if len(ours) == 1 or useful >= LONG_RUN * len(ours) or int(ends[-1] - theirs[0]) > WASTE * useful:
            for at, from_, size in zip(ours.tolist(), theirs.tolist(), length.tolist(), strict=True):
                self._pread(name, out[at : at + size], from_)
            return
        first = 0
        while first < len(ours):
            last = max(int(np.searchsorted(ends, theirs[first] + len(scratch), side="right")), first + 1)
            begin, size = int(theirs[first]), int(ends[last - 1] - theirs[first])
            if size > len(scratch):  # one run, longer than the scratch space
                self._pread(name, out[ours[first] : ours[first] + size], begin)
            else:
                self._pread(name, scratch[:size], begin)
                some = slice(first, last)
                _spread(Overlap(ours=ours[some], theirs=theirs[some] - begin, length=length[some]), out, scratch)
            first = last

    def _pread(self, name: str, out: np.ndarray, offset: int) -> None:
        path = self.directory / name
        try:
            descriptor, done = self._file(name).fileno(), 0
            while done < len(out):
                count = os.preadv(descriptor, [memoryview(out[done:])], offset + done)  # type: ignore[list-item]
                if not count:
                    raise CheckpointError(f"{path} has become shorter while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None

    def _file(self, name: str) -> Any:
        files: OrderedDict = self._open.__dict__.setdefault("files", OrderedDict())
        if name not in files:
            path = self.directory / name
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            files[name] = open(descriptor, "rb", buffering=0)  # noqa: SIM115 - closed with the others
            if _identity(os.fstat(descriptor)) != self._identity.get(name):
                raise CheckpointError(f"{path} has changed since it was hashed")
            if len(files) > OPEN_FILES:
                files.popitem(last=False)[1].close()
        files.move_to_end(name)
        return files[name]


def _spread(places: Overlap, out: np.ndarray, read: np.ndarray) -> None:
    for ours, theirs, length, step, their_step, count in places.strided():
        shape = (count, length)
        into = np.lib.stride_tricks.as_strided(out[ours:], shape, (step, 1))
        into[...] = np.lib.stride_tricks.as_strided(read[theirs:], shape, (their_step, 1))


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a safetensors file says it holds, and the byte at which the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise CheckpointError(f"{path} is no safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path} is no safetensors file: its header is no JSON") from None
    entries = header.values() if isinstance(header, dict) else [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path} is no safetensors file: its header lists no tensors")
    header.pop("__metadata__", None)
    for key, entry in header.items():
        offsets = entry.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(number) is not int for number in offsets):
            raise CheckpointError(f"{path} is no safetensors file: {key} has no place in it")
    return header, 8 + length


def candidates(path: Path) -> Sequence[Path]:
    """The checkpoints that a path means, the one to take first: itself, or those of a run, newest first."""
    if (path / MANIFEST).exists() or (path / MANIFEST).is_symlink():
        return [path]
    for root in (path, path / "checkpoints"):
        found = [directory for _, directory in reversed(steps_in(root))]
        if found:
            return found
    raise CheckpointError(f"{path} holds no checkpoint: give a step_<N> folder, or the checkpoints folder of a run")
