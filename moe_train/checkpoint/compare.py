"""Two checkpoints hold the same: proved by a hash of every logical tensor, whatever layouts they were written by.

A tensor's hash is the SHA-256 of its elements' bytes in the order of the logical tensor, every part and shard put in
its place. Compared are names, kinds, shapes, types and hashes; step, family, the optimizers' scalars, the trainer's
state. Not compared, because they belong to a layout or a run: layout, recipe, tracking id, where redundant copies lay;
and the random states, unless both checkpoints hold those of the same ranks.
"""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_train.checkpoint.reshard import verify_source
from moe_train.checkpoint.source import Key, Source, candidates
from moe_train.checkpoint.stream import Buffers, chunks
from moe_train.checkpoint.target import Owned, order
from moe_train.checkpoint.threads import Crew, Meter, Report

UNCOMPARED = ("run_id", "plans", "python_random")
"""Keys of a manifest's state; python_random is compared with the random states."""


@dataclass(kw_only=True)
class Comparison:
    """differences: one line each, in the order of the model; empty: equal. kinds: tensors compared, by kind.

    fingerprint: of all logical tensors, random states left out; the same for every layout of a checkpoint.
    """

    directories: tuple[Path, Path]
    differences: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    fingerprint: str = ""
    randoms: bool = True

    @property
    def equal(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        one, other = self.directories
        if self.differences:
            more = f"\n  and {len(self.differences) - 10} more" if len(self.differences) > 10 else ""
            first = "\n  ".join(self.differences[:10])
            return f"{one} and {other} differ:\n  {first}{more}"
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        note = "" if self.randoms else "; random states are of other ranks, and were not compared"
        return (
            f"{one} and {other} are equal: {counts} tensors, {self.nbytes} bytes, hash by hash; step, scalars and "
            f"state too{note}\nSHA-256 of all logical tensors: {self.fingerprint}"
        )


def compare(one: Path, other: Path, jobs: int | None = None, report: Report | None = None) -> Comparison:
    """Raises `CheckpointError` if one of the two is damaged."""
    crew = Crew(jobs, report)
    sources = Source(candidates(one)[0]), Source(candidates(other)[0])
    for source in sources:
        verify_source(source, crew)
    found = Comparison(directories=(sources[0].directory, sources[1].directory))
    found.randoms = _random_ranks(sources[0]) == _random_ranks(sources[1])
    found.differences += _manifest_differences(*sources, found.randoms)
    keys = sorted({*sources[0].tensors, *sources[1].tensors}, key=order)
    keys = [key for key in keys if found.randoms or key.kind != "rng"]
    unlike = {key: text for key in keys if (text := _unlike(key, *sources))}
    alike = [key for key in keys if key not in unlike]
    hashes = _hashes(sources, alike, crew)
    for key in keys:
        if key in unlike:
            found.differences.append(unlike[key])
        elif hashes[0, key] != hashes[1, key]:
            found.differences.append(f"{key}: other values")
    summary = hashlib.sha256()
    for key in alike:
        tensor = sources[0].tensors[key]
        found.kinds[key.kind] = found.kinds.get(key.kind, 0) + 1
        found.nbytes += tensor.numel * tensor.itemsize
        if key.kind != "rng":
            summary.update(repr((*key, tensor.dtype, tensor.shape, hashes[0, key])).encode())
    found.fingerprint = summary.hexdigest()
    return found


def _hashes(sources: tuple[Source, Source], keys: list[Key], crew: Crew) -> dict[tuple[int, Key], str]:
    total = sum(s.tensors[key].numel * s.tensors[key].itemsize for s in sources for key in keys)
    meter, buffers, found, lock = Meter(crew, "comparing", total), Buffers(), {}, threading.Lock()

    def hash_one(number: int, key: Key) -> None:
        digest = hashlib.sha256()
        tensor = sources[number].tensors[key]
        for chunk in chunks(sources[number], Owned(key, None, 0, tensor.numel), buffers):
            digest.update(chunk)
            meter.advance(len(chunk))
        with lock:
            found[number, key] = digest.hexdigest()

    crew.run(partial(hash_one, number, key) for key in keys for number in (0, 1))
    return found


def _unlike(key: Key, one: Source, other: Source) -> str | None:
    """What can be said without reading."""
    mine, theirs = one.tensors.get(key), other.tensors.get(key)
    if mine is None or theirs is None:
        return f"{key}: only in {(one if mine else other).directory}"
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return f"{key}: {mine.dtype} {list(mine.shape)} and {theirs.dtype} {list(theirs.shape)}"
    return None


def _random_ranks(source: Source) -> set[str]:
    return {key.name for key in source.tensors if key.kind == "rng"} | set(_randoms(source))


def _randoms(source: Source) -> dict[str, Any]:
    return source.manifest.state.get("python_random", {})


def _manifest_differences(one: Source, other: Source, randoms: bool) -> Iterator[str]:
    mine, theirs = one.manifest, other.manifest
    for name in ("step", "model_type"):
        if getattr(mine, name) != getattr(theirs, name):
            yield f"{name}: {getattr(mine, name)} and {getattr(theirs, name)}"
    for group in sorted({*mine.scalars, *theirs.scalars}):
        found = mine.scalars.get(group), theirs.scalars.get(group)
        if found[0] != found[1]:
            yield f"scalars of the {group} optimizer: {found[0]} and {found[1]}"
    for name in sorted({*mine.state, *theirs.state} - set(UNCOMPARED)):
        if mine.state.get(name) != theirs.state.get(name):
            yield f"state {name}: {_short(mine.state.get(name))} and {_short(theirs.state.get(name))}"
    if randoms and _randoms(one) != _randoms(other):
        yield "state python_random: other values"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
