"""Read a checkpoint into whatever layout asks.

A range that is cut as it was written is put together from the slices that overlap it. Where tensor parallelism cuts a
tensor otherwise than the checkpoint does, that one logical tensor is put together in memory and cut anew.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moe_train.checkpoint.manifest import (
    Manifest,
    Slice,
    coverage_problem,
    describe,
    normal,
    read_manifest,
    verify_files,
)
from moe_train.checkpoint.piece import Piece
from moe_train.errors import CheckpointError

Tensor = tuple[str, str, int | None]


class CheckpointReader:
    """A complete, verified checkpoint.

    Args:
        directory: a `step_<N>` folder.
        verify: compare every file's SHA-256 first.

    Raises `CheckpointError` for anything damaged or missing, by file name.
    """

    def __init__(self, directory: Path, verify: bool = True):
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        if verify:
            verify_files(directory, self.manifest)
        slices_of: dict[Tensor, list[Slice]] = defaultdict(list)
        for item in self.manifest.slices:
            slices_of[item.tensor].append(item)
        self._slices = dict(slices_of)
        for (kind, name, expert), slices in self._slices.items():
            problem = coverage_problem(slices)
            if problem:
                raise CheckpointError(f"{directory}: parts of {kind} of {describe(name, expert)} {problem}")
        self._open: dict[str, object] = {}
        self._last: tuple[Tensor, torch.Tensor] | None = None

    def kinds(self) -> set[str]:
        """Kinds stored for weights: master and optimizer states."""
        return {kind for kind, _, _ in self._slices} - {"buffer", "rng"}

    def tensors(self, kind: str) -> dict[tuple[str, int | None], tuple[int, ...]]:
        """Logical tensors of one kind and their shapes."""
        return {(n, e): slices[0].shape for (k, n, e), slices in self._slices.items() if k == kind}

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copy the stored values into the pieces' `data`, in place. Call `check` first.

        Raises `CheckpointError` for a piece that is not stored: zeros in its place would train on, and be wrong.
        """
        for piece in pieces:
            tensor = (piece.kind, piece.name, piece.expert)
            slices = self._slices.get(tensor)
            if slices is None:
                raise CheckpointError(f"{self.directory} holds no {piece.kind} of {describe(piece.name, piece.expert)}")
            part = normal(piece.part)
            as_written = [item for item in slices if normal(item.part) == part]
            if as_written:
                self._copy(as_written, piece.start, piece.data)
            else:
                whole = self._assemble(tensor, piece.data.dtype)
                cut = whole if part is None else part.take(whole)
                piece.data.copy_(cut.view(-1)[piece.start : piece.stop])
        self._last = None

    def _copy(self, slices: list[Slice], start: int, data: torch.Tensor) -> None:
        """Elements from `start` on of what the slices count in, into `data`."""
        for item in slices:
            low, high = max(start, item.start), min(start + data.numel(), item.stop)
            if low < high:
                data[low - start : high - start].copy_(self._read(item, low - item.start, high - item.start))

    def _assemble(self, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A logical tensor from all of its parts. The last one is kept: a rank may ask for several ranges of it."""
        if self._last is None or self._last[0] != tensor or self._last[1].dtype != dtype:
            self._last = None  # before the next one is allocated
            slices = self._slices[tensor]
            whole = torch.empty(slices[0].shape, dtype=dtype)
            for part in {normal(item.part) for item in slices}:
                mine = [item for item in slices if normal(item.part) == part]
                if part is None:
                    self._copy(mine, 0, whole.view(-1))
                else:
                    local = torch.empty(part.numel, dtype=dtype)
                    self._copy(mine, 0, local)
                    part.put(whole, local)
            self._last = (tensor, whole)
        return self._last[1]

    def check(self, pieces: list[Piece], wanted: set[tuple[str, int | None]]) -> None:
        """All that is asked for is stored with the same shape, and nothing stored is left over; before any copy.

        Args:
            pieces: what this rank will ask for.
            wanted: all logical weights of the model, over all ranks.
        """
        problems = []
        for piece in pieces:
            slices = self._slices.get((piece.kind, piece.name, piece.expert))
            if slices is None:
                problems.append(f"{piece.kind} of {describe(piece.name, piece.expert)} is not in the checkpoint")
            elif slices[0].shape != piece.shape:
                problems.append(
                    f"{describe(piece.name, piece.expert)}: {list(slices[0].shape)} in the checkpoint, "
                    f"{list(piece.shape)} in the model"
                )
        stored = set(self.tensors("master"))
        problems += [
            f"{describe(*tensor)} is in the checkpoint, not in the model" for tensor in sorted(stored - wanted, key=str)
        ]
        if problems:
            shown = list(dict.fromkeys(problems))
            more = f"\n  and {len(shown) - 10} more" if len(shown) > 10 else ""
            raise CheckpointError(f"{self.directory} is of another model:\n  " + "\n  ".join(shown[:10]) + more)

    def _read(self, item: Slice, low: int, high: int) -> torch.Tensor:
        try:
            if item.file not in self._open:
                self._open[item.file] = safe_open(self.directory / item.file, framework="pt")
            stored = self._open[item.file].get_slice(item.key)[low:high]  # type: ignore[attr-defined]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory / item.file}: {error}") from None
        if stored.shape != (high - low,):
            raise CheckpointError(f"{self.directory / item.file}: {item.key} is shorter than the manifest says")
        return stored
