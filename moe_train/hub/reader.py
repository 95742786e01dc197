"""Hugging Face folder -> pieces of logical tensors, in whatever layout asks: each rank reads what it holds."""

import re
from pathlib import Path

import numpy as np
import torch

from moe_train.checkpoint.load import CheckpointReader
from moe_train.checkpoint.manifest import Slice, describe
from moe_train.errors import CheckpointError
from moe_train.hub.folder import Entry, entries_of
from moe_train.hub.layout import FolderLayout, Logical, Place, Tensor

READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that weights are read from, by the names of safetensors."""
NEVER_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that old folders hold and no model reads any more."""


class HubReader(CheckpointReader):
    """A folder of one model, read like a checkpoint of weights alone.

    Raises `CheckpointError` for anything damaged, missing, superfluous or of another shape, all of it listed.
    """

    def __init__(self, folder: Path, layout: FolderLayout):
        self.directory = folder
        self._entries = entries_of(folder)
        chosen = matched(folder, self._entries, layout)
        self._sources: dict[Slice, tuple[Place, ...]] = {}
        self._slices = {tensor: self._slices_of(tensor, logical) for tensor, logical in chosen.items()}
        self._last = None

    def _slices_of(self, tensor: Tensor, logical: Logical) -> list[Slice]:
        """One per place whose elements are neighbours; else one for all, put together when it is read."""
        kind, name, expert = tensor
        straight = all(isinstance(place.elements, range) for place in logical.places)
        slices = []
        for place in logical.places if straight else (None,):
            item = Slice(
                name=name,
                expert=expert,
                kind=kind,
                shape=logical.shape,
                dtype="float32",
                start=place.elements.start if place else 0,  # type: ignore[union-attr]
                stop=place.elements.stop if place else logical.numel,  # type: ignore[union-attr]
                file=str(self.directory),
                key=place.name if place else describe(name, expert),
            )
            self._sources[item] = (place,) if place else logical.places
            slices.append(item)
        return slices

    def _read(self, item: Slice, low: int, high: int) -> torch.Tensor:
        places = self._sources[item]
        if isinstance(places[0].elements, range):
            return self._elements(places[0], low, high)
        whole = torch.empty(item.stop)
        for place in places:
            whole[place.elements] = self._elements(place, 0, len(place.elements)).float()
        return whole[low:high]

    def _elements(self, place: Place, low: int, high: int) -> torch.Tensor:
        """Elements low to high of a place, as they are stored."""
        entry = self._entries[place.name]
        dtype = READABLE[entry.dtype]
        out = np.empty((high - low) * dtype.itemsize, dtype=np.uint8)
        entry.read(((place.row or 0) * len(place.elements) + low) * dtype.itemsize, out)
        return torch.from_numpy(out).view(dtype)


def check_folder(folder: Path, layout: FolderLayout) -> None:
    """Whether a folder holds the weights of this model, by its headers. Raises `CheckpointError` with all that differs.

    Tensors may lie as the family's folders have them or as the model holds them.
    """
    matched(folder, entries_of(folder), layout)


def matched(folder: Path, entries: dict[str, Entry], layout: FolderLayout) -> dict[Tensor, Logical]:
    """Where each logical tensor is to be read. Raises as `check_folder` does."""
    chosen: dict[Tensor, Logical] = {}
    problems: list[str] = []
    used: set[str] = set()
    for tensor, logical in layout.tensors.items():
        as_held = layout.in_memory[tensor]
        missing = [place.name for place in logical.places if place.name not in entries]
        if missing and as_held.places[0].name in entries:
            logical, missing = as_held, []
        problems += [f"{name} is missing" for name in missing]
        for place in logical.places if not missing else ():
            used.add(place.name)
            entry = entries[place.name]
            if entry.shape != place.shape:
                problems.append(
                    f"{place.name}: {list(entry.shape)} in the folder, {list(place.shape)} in the {_family(layout)}"
                )
            if entry.dtype not in READABLE:
                problems.append(f"{place.name} is stored as {entry.dtype}: weights are read from {', '.join(READABLE)}")
        chosen[tensor] = logical
    ignored = [NEVER_WEIGHTS.pattern, *(layout.model._keys_to_ignore_on_load_unexpected or ())]
    problems += [
        f"{name} is in the folder, not in the {_family(layout)}"
        for name in sorted(entries.keys() - used)
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    refuse(f"{folder} does not hold the weights of this {_family(layout)}", problems)
    return chosen


def refuse(what: str, problems: list[str]) -> None:
    """Raises `CheckpointError` with the first ten of all problems, if there are any."""
    if problems:
        shown = list(dict.fromkeys(problems))
        more = f"\n  and {len(shown) - 10} more" if len(shown) > 10 else ""
        raise CheckpointError(f"{what}:\n  " + "\n  ".join(shown[:10]) + more)


def _family(layout: FolderLayout) -> str:
    return layout.model.config.model_type
