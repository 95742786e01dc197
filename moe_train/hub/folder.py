"""A Hugging Face folder from outside: what is in it, by its own headers.

Nothing in such a folder is trusted. Only safetensors are opened, under plain names; pickle is refused unread.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_train.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.\-]*\.safetensors")
PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a folder: `nbytes` from byte `offset` of a file on."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, start: int, out: np.ndarray) -> None:
        """Bytes of the tensor from `start` on, as many as `out` takes."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                done = 0
                while done < len(out):
                    count = file.readinto(memoryview(out[done:]))  # type: ignore[arg-type]
                    if not count:
                        raise CheckpointError(f"{self.path} has become shorter while it was read")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None


def entries_of(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, by name. Reads headers alone.

    Raises `CheckpointError` for a folder without safetensors, a name outside of it, a missing or damaged file.
    """
    index = _index(folder)
    names = sorted(set(index.values())) if index is not None else [WEIGHTS]
    found: dict[str, Entry] = {}
    for name in names:
        for key, entry in _header(folder / name).items():
            if key in found:
                raise CheckpointError(f"{folder}: {key} is both in {found[key].path.name} and in {name}")
            found[key] = entry
    for key, name in (index or {}).items():
        if key not in found or found[key].path.name != name:
            raise CheckpointError(f"{folder / name} has no {key}, which {INDEX} says is in it")
    return found


def _index(folder: Path) -> dict[str, str] | None:
    """Which file has which tensor; None: there is one file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give one with config.json and {WEIGHTS}")
    path = folder / INDEX
    if not path.is_file():
        if not (folder / WEIGHTS).is_file():
            pickles = sorted(item.name for item in folder.iterdir() if PICKLE.fullmatch(item.name))
            raise _pickle(folder / pickles[0]) if pickles else CheckpointError(f"{folder} holds no {WEIGHTS}")
        return None
    try:
        tree: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    index = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files")
    for name in sorted(set(index.values())):
        if PICKLE.fullmatch(name):
            raise _pickle(folder / name)
        if not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names {name!r}, which is no safetensors file of this folder: not opened")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; {INDEX} names it")
    return index


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is pickle, which can run any program when it is read: not opened. Convert the weights to safetensors"
    )


def _header(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, framework="pt") as file:  # refuses what is cut off, overlaps or leaves gaps
            file.keys()
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    header.pop("__metadata__", None)
    entries = {}
    for key, item in header.items():
        start, stop = item["data_offsets"]
        entries[key] = Entry(
            path=path, dtype=item["dtype"], shape=tuple(item["shape"]), offset=8 + length + start, nbytes=stop - start
        )
    return entries
