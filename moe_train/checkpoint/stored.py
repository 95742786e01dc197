"""Logical tensors as they lie in files: where each part is, and what a safetensors file says of itself."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.checkpoint.manifest import describe
from moe_train.checkpoint.runs import Runs
from moe_train.errors import CheckpointError
from moe_train.parallel.tensor_slice import TensorSlice

DTYPES = {
    **{"float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)},
    **{"int64": ("I64", 8), "int32": ("I32", 4), "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1)},
    **{"bool": ("BOOL", 1), "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1)},
}
"""Names of torch -> what safetensors calls them, and bytes per element."""


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


def slice_key(tensor: tuple[str, str, int | None], part: TensorSlice | None, start: int, stop: int) -> str:
    """What elements start to stop of a part of a tensor (kind, name, expert) are called inside of a file."""
    kind, name, expert = tensor
    unit = "" if expert is None else f"[{expert}]"
    box = "" if part is None else "@" + ",".join(f"{low}-{high}" for low, high in part.box)
    return f"{kind}/{name}{unit}{box}:{start}-{stop}"


def header_of(slices: Iterable[tuple[str, str, int]]) -> tuple[bytes, int]:
    """The bytes of a safetensors file before its data, and how many bytes of data follow.

    Args:
        slices: key, type in torch's words and number of elements, in the file's order: wide elements first, as
            safetensors are aligned.
    """
    entries, begin = {}, 0
    for key, dtype, count in slices:
        code, size = DTYPES[dtype]
        end = begin + count * size
        entries[key] = {"dtype": code, "shape": [count], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
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
