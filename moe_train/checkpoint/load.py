"""Read a checkpoint into whatever layout asks: each wanted range is put together from the slices that overlap it."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moe_train.checkpoint.manifest import Manifest, Slice, covered, read_manifest, verify_files
from moe_train.checkpoint.save import Piece, numel
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
            if not covered(slices, numel(slices[0].shape)):
                raise CheckpointError(f"{directory}: parts of {kind} of {describe(name, expert)} are missing")
        self._open: dict[str, object] = {}

    def kinds(self, experts: bool) -> set[str]:
        """Kinds stored for expert (or dense) weights: master and optimizer states."""
        return {
            kind
            for kind, _, expert in self._slices
            if (expert is not None) == experts and kind not in ("buffer", "rng")
        }

    def tensors(self, kind: str) -> dict[tuple[str, int | None], tuple[int, ...]]:
        """Logical tensors of one kind and their shapes."""
        return {(n, e): slices[0].shape for (k, n, e), slices in self._slices.items() if k == kind}

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copy the stored values into the pieces' `data`, in place. Call `check` first.

        Raises `CheckpointError` for a piece that is not stored: zeros in its place would train on, and be wrong.
        """
        for piece in pieces:
            stored_slices = self._slices.get((piece.kind, piece.name, piece.expert))
            if stored_slices is None:
                raise CheckpointError(f"{self.directory} holds no {piece.kind} of {describe(piece.name, piece.expert)}")
            stop = piece.start + piece.data.numel()
            for item in stored_slices:
                low, high = max(piece.start, item.start), min(stop, item.stop)
                if low < high:
                    stored = self._read(item, low - item.start, high - item.start)
                    piece.data[low - piece.start : high - piece.start].copy_(stored)

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
            return self._open[item.file].get_slice(item.key)[low:high]  # type: ignore[attr-defined]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.directory / item.file}: {error}") from None


def describe(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}, expert {expert}"
