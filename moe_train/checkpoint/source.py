"""A stored checkpoint to stream from: verified first, then read range by range into buffers of the caller's.

Files are read with `pread` and never mapped, so that what is resident is what the caller has allocated. Bytes are
copied as they are: no element is ever interpreted.
"""

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.checkpoint.manifest import (
    MANIFEST,
    POINTERS,
    STEP_NAME,
    Slice,
    coverage_problem,
    digest_file,
    normal,
    read_manifest,
    refuse_strays,
    steps_in,
    verify_file,
    verify_size,
)
from moe_train.checkpoint.runs import Overlap, Runs
from moe_train.checkpoint.stored import DTYPES, Key, Stored, StoredTensor, read_header
from moe_train.errors import CheckpointError
from moe_train.parallel.tensor_slice import TensorSlice

Advance = Callable[[int], None]
OPEN_FILES = 32
"""Per thread: a checkpoint of a large run has more files than a process may open."""
LONG_RUN, WASTE = 1 << 16, 16
"""Runs of this many bytes are read one by one; shorter ones all at once with what lies between them, unless that is
this many times as much."""


class DamagedError(CheckpointError):
    """A file of a source is not what its manifest says."""


class Source:
    """The folder of a checkpoint. Its manifest and every part's place are checked here, its bytes by `verifications`.

    tensors: logical tensors, with shape and type. manifest: without its slices, which are here.

    Raises `CheckpointError` by file name.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / MANIFEST).is_symlink():
            raise CheckpointError(f"{directory / MANIFEST} is a link; it is not opened")
        manifest = read_manifest(directory)
        self.digest = digest_file(directory / MANIFEST)
        texts, trees = (manifest.model_type,), (manifest.layout, manifest.scalars, manifest.state, manifest.recipe)
        if not all(isinstance(tree, dict) for tree in trees) or not all(isinstance(text, str) for text in texts):
            raise CheckpointError(f"{directory / MANIFEST}: layout, scalars, state or recipe is not what it has to be")
        self.manifest = replace(manifest, slices=())
        self.tensors: dict[Key, StoredTensor] = {}
        self._all_runs: dict[tuple[tuple[int, ...], TensorSlice | None], Runs] = {}
        self._expected: dict[str, list[tuple[Stored, str, str]]] = defaultdict(list)
        self._identity: dict[str, tuple[int, ...]] = {}
        self._hashed: set[str] = set()
        self._open = threading.local()
        slices: dict[Key, list[Slice]] = defaultdict(list)
        for item in manifest.slices:
            slices[Key(*item.tensor)].append(item)
        for key, items in slices.items():
            self.tensors[key] = self._tensor(key, items)
        self._look()

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

    def _look(self) -> None:
        """What the folder and the files' headers show: links, files of other sizes, parts that are not there."""
        try:
            refuse_strays(self.directory, self.manifest)
            for name, entry in self.manifest.files.items():
                path = self.directory / name
                verify_size(path, entry)
                self._identity[name] = _identity(os.stat(path, follow_symlinks=False))
                self._place(path, *read_header(path))
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.directory}: cannot be read ({error.strerror})") from None

    def _place(self, path: Path, header: dict[str, dict[str, Any]], begin: int) -> None:
        """Find every part that the manifest says is in a file."""
        for stored, key, dtype in self._expected.pop(path.name, ()):
            code, size = DTYPES[dtype]
            numel = stored.stop - stored.start
            if header.get(key, {}).get("dtype") != code or header[key].get("shape") != [numel]:
                raise CheckpointError(f"{path} has no {key} of {numel} elements of {dtype}, as the manifest says")
            start, stop = header[key]["data_offsets"]
            if not 0 <= start <= stop <= path.stat().st_size - begin or stop - start != numel * size:
                raise CheckpointError(f"{path}: {key} lies outside of the file")
            stored.offset = begin + start

    def verifications(self, advance: Advance) -> dict[str, Callable[[], None]]:
        """By file that was not hashed yet, the task to do it. What is read from a file is worth nothing before."""
        return {name: partial(self._verify, name, advance) for name in self.manifest.files if name not in self._hashed}

    def _verify(self, name: str, advance: Advance) -> None:
        try:
            self._refuse_change(name)
            verify_file(self.directory / name, self.manifest.files[name], advance)
        except (CheckpointError, OSError) as error:
            what = (
                f"{self.directory / name}: cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            )
            raise DamagedError(str(what)) from None
        self._hashed.add(name)

    def refuse_changes(self) -> None:
        """Raises `CheckpointError` for a file that is not the one that was looked at in the beginning."""
        for name in self.manifest.files:
            self._refuse_change(name)

    def _refuse_change(self, name: str) -> None:
        path = self.directory / name
        if not path.exists() or _identity(os.stat(path, follow_symlinks=False)) != self._identity[name]:
            raise DamagedError(f"{path} has changed while it was read")

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
            files[name] = os.fdopen(descriptor, "rb", buffering=0)
            if _identity(os.fstat(descriptor)) != self._identity[name]:
                raise DamagedError(f"{path} has changed while it was read")
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


def candidates(path: Path) -> Sequence[Path]:
    """The checkpoints that a path means: itself, the one that a pointer names, or those of a run, newest first."""
    if (path / MANIFEST).exists() or (path / MANIFEST).is_symlink():
        return [path]
    if path.name in POINTERS and path.is_file():
        name = path.read_text(errors="replace").strip()
        if not STEP_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names {name[:60]!r}, which is no checkpoint: give a step_<N> folder")
        return [path.parent / name]
    for root in (path, path / "checkpoints"):
        found = [directory for _, directory in reversed(steps_in(root))]
        if found:
            return found
    raise CheckpointError(f"{path} holds no checkpoint: give a step_<N> folder, or the checkpoints folder of a run")
