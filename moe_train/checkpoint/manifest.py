"""The manifest of a checkpoint: which slice of which logical tensor lies in which file.

`step_<N>/manifest.json` beside safetensors files; no pickle anywhere. A tensor is named as Hugging Face names it,
a stacked expert parameter additionally by its logical expert, so nothing in it depends on the layout that wrote it.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from moe_train.errors import CheckpointError
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import TensorSlice

DIGEST_KEY = ',"sha256":'
FORMAT = 2
"""2 knows parts of tensor parallelism; 1, which did not, is read all the same."""
READABLE = (1, FORMAT)
MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"rank_\d{5}_\d{3}\.safetensors")
STEP_NAME = re.compile(r"step_(\d+)")
POINTERS = LATEST, BEST = "latest", "best"
"""Files beside the checkpoints, each with the name of one."""
HASH_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements `start` to `stop` of the flattened logical tensor (name, expert), stored in `file` under `key`.

    kind: master (fp32 weights), an optimizer state by its own name (exp_avg, ...), buffer, or rng.
    shape: of the whole logical tensor.
    part: where tensor parallelism has cut the tensor, the piece of it whose elements start and stop count.
    """

    name: str
    expert: int | None
    kind: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    file: str
    key: str
    part: TensorSlice | None = None

    @property
    def tensor(self) -> tuple[str, str, int | None]:
        return (self.kind, self.name, self.expert)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of what was meant to be written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """scalars: step counts of the optimizers. state: the trainer's own (position, tracking id, ...)."""

    step: int
    model_type: str
    layout: dict[str, Any]
    recipe: dict[str, Any]
    scalars: dict[str, dict[str, float]]
    state: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)
    slices: tuple[Slice, ...] = ()
    format: int = FORMAT

    def to_json(self) -> str:
        """One object whose last key is the SHA-256 of all text before it: a changed digit is still JSON."""
        body = json.dumps(vars(self), default=vars, separators=(",", ":"))[:-1]  # `asdict` would copy it all first
        return f"{body}{_digest_suffix(body)}"


def read_manifest(directory: Path) -> Manifest:
    """Raises `CheckpointError` naming the file and what is wrong with it."""
    path = directory / MANIFEST
    try:
        text = path.read_text()
        tree = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {directory.name} is no complete checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") not in READABLE:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise CheckpointError(f"{path} has format {found}; this version reads formats {READABLE[0]} and {READABLE[1]}")
    body, _, _ = text.rpartition(DIGEST_KEY)
    if text != body + _digest_suffix(body):
        raise CheckpointError(f"{path}: its content differs from its own SHA-256; the file is damaged")
    del tree["sha256"]
    try:
        tree["files"] = {name: FileEntry(**entry) for name, entry in tree["files"].items()}
        tree["slices"] = tuple(_slice_of(path, item) for item in tree["slices"])
        manifest = Manifest(**tree)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest of this program: {error}") from None
    named = {item.file for item in manifest.slices}
    for name in sorted({*manifest.files, *named}):
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r}, which is no data file of a checkpoint; it is not opened")
    for name in sorted(named - set(manifest.files)):
        raise CheckpointError(f"{path} has slices in {name} and no size and SHA-256 of it")
    return manifest


def _slice_of(path: Path, item: dict[str, Any]) -> Slice:
    """Raises `CheckpointError` for a part that is none of the tensor, TypeError or KeyError for other fields."""
    shape, part = tuple(item["shape"]), item.get("part")
    if part is None:
        return Slice(**{**item, "shape": shape})
    try:
        found = TensorSlice(tuple(part["view_shape"]), tuple(map(tuple, part["box"])))
        found.local_shape(shape)
        if not 0 <= item["start"] <= item["stop"] <= found.numel:
            raise ValueError(f"elements {item['start']} to {item['stop']} lie outside its {found.numel}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        name = describe(item["name"], item["expert"])
        raise CheckpointError(
            f"{path}: the part of {item['kind']} of {name} does not fit the tensor: {error}"
        ) from None
    return Slice(**{**item, "shape": shape, "part": found})


def describe(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}, expert {expert}"


def _digest_suffix(body: str) -> str:
    return f'{DIGEST_KEY}"{hashlib.sha256(body.encode()).hexdigest()}"}}'


def verify_files(directory: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Every file is there, a plain file, of the right size and content, and no data file besides.

    Args:
        part, parts: hash only every `parts`-th file, from the `part`-th on: ranks share the work.

    Raises `CheckpointError` naming the first bad one.
    """
    try:
        _verify_files(directory, manifest, sorted(manifest.files)[part::parts])
    except OSError as error:  # a disk that fails, a folder without permission: as unusable as a damaged file
        raise CheckpointError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None


def _verify_files(directory: Path, manifest: Manifest, names: list[str]) -> None:
    refuse_strays(directory, manifest)
    for name in names:
        verify_file(directory / name, manifest.files[name])


def refuse_strays(directory: Path, manifest: Manifest) -> None:
    for path in sorted(directory.iterdir()):
        if FILE_NAME.fullmatch(path.name) and path.name not in manifest.files:
            raise CheckpointError(f"{path} is not in the manifest: the folder holds files of two checkpoints")


def verify_file(path: Path, entry: FileEntry, advance: Callable[[int], None] | None = None) -> None:
    """A plain file of this size and content. `advance` is told of the bytes as they are hashed."""
    verify_size(path, entry)
    if digest_file(path, advance) != entry.sha256:
        raise CheckpointError(f"{path}: its content differs from the manifest's SHA-256; the file is damaged")


def verify_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path} is missing or no plain file")
    if path.stat().st_size != entry.bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the manifest says {entry.bytes}")


def digest_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    with path.open("rb", buffering=0) as file:
        if advance is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_BYTES))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            advance(size)
        return digest.hexdigest()


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything that looks like a checkpoint, oldest first. Ordered by step number alone."""
    if not root.is_dir():
        return []
    found = [(STEP_NAME.fullmatch(path.name), path) for path in root.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match and path.is_dir())


def newest_complete(root: Path, world: ParallelGroup | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and why newer ones were passed over.

    Collective over `world`, if one is given: rank 0 lists, every rank hashes its share of the files, all agree.
    """
    world = world or ParallelGroup.single()
    reasons = []
    for _, directory in reversed(world.gather_objects(_listed(root) if world.rank_in_group == 0 else None)[0]):
        problem = None
        try:
            verify_files(directory, read_manifest(directory), world.rank_in_group, world.world_size)
        except CheckpointError as error:
            problem = str(error)
        problems = [found for found in world.gather_objects(problem) if found]
        if not problems:
            return directory, reasons
        reasons.append(problems[0])
    return None, reasons


def _listed(root: Path) -> list[tuple[int, Path]]:
    try:
        return steps_in(root)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed ({error.strerror})") from None


def coverage_problem(slices: Iterable[Slice]) -> str | None:
    """What keeps the slices of one tensor from holding each of its elements; None: nothing.

    Parts of tensor parallelism must be complete one by one, be cut under one view, and lie side by side.
    """
    ranges: dict[TensorSlice | None, list[Slice]] = defaultdict(list)
    for item in slices:
        ranges[normal(item.part)].append(item)
    shape = next(iter(ranges.values()))[0].shape
    if any(item.shape != shape for items in ranges.values() for item in items):
        return "disagree about its shape"
    if None in ranges:
        if len(ranges) > 1:
            return "are cut in more than one way"
        return None if _gapless(ranges[None], math.prod(shape)) else "are missing"
    parts = [part for part in ranges if part is not None]
    if len({part.view_shape for part in parts}) > 1:
        return "are cut in more than one way"
    if any(one.overlaps(other) for one, other in combinations(parts, 2)):
        return "overlap"
    complete = all(_gapless(items, part.numel) for part, items in ranges.items() if part is not None)
    return None if complete and sum(part.numel for part in parts) == math.prod(shape) else "are missing"


def normal(part: TensorSlice | None) -> TensorSlice | None:
    """One spelling for the whole tensor."""
    return None if part is None or part.whole else part


def _gapless(slices: Iterable[Slice], numel: int) -> bool:
    reached = 0
    for item in sorted(slices, key=lambda s: s.start):
        if item.start > reached:
            return False
        reached = max(reached, item.stop)
    return reached >= numel
