"""Which experts the same held-out tokens chose at each evaluation: RUN_DIR/routing/step_<N>.npz, and what they tell.

L MoE layers, N tokens, K experts per token.
"""

import os
import re
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

_NAME = re.compile(r"step_(\d{8,})\.npz")


def saturation(earlier_LNK: np.ndarray, later_LNK: np.ndarray) -> np.ndarray:
    """Router saturation by layer [L]: of the experts that a token chooses later, the share it had chosen already, mean
    over tokens (OLMoE, arXiv 2409.02060, section 5.1). Order within a choice is of no account.

    Raises ValueError for different shapes: not the same tokens.
    """
    if earlier_LNK.shape != later_LNK.shape:
        raise ValueError(f"choices of shape {earlier_LNK.shape} and {later_LNK.shape} are not of the same tokens")
    both_LNK = (earlier_LNK[..., :, None] == later_LNK[..., None, :]).any(axis=-1)
    return both_LNK.mean(axis=(1, 2))


class RoutingFiles:
    """The files of one run."""

    def __init__(self, run_dir: Path):
        self.folder = Path(run_dir) / "routing"

    def steps(self) -> list[int]:
        """Steps that have a file, ascending."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.glob("step_*.npz")]
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, ids_LNK: np.ndarray) -> None:
        """Write a step's choices, under its name only when whole. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "writing.tmp"
        with open(temporary, "wb") as file:
            np.savez_compressed(file, ids=ids_LNK.astype(np.uint16))
        os.replace(temporary, self._path(step))

    def load(self, step: int) -> np.ndarray | None:
        """[L, N, K]; None where it cannot be read."""
        try:
            with np.load(self._path(step), allow_pickle=False) as file:
                ids_LNK = file["ids"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # gone, cut off, damaged
            return None
        return ids_LNK if ids_LNK.ndim == 3 and ids_LNK.size else None

    def rewind(self, step: int) -> None:
        """Remove what is of later steps than `step`: a resumed run writes them again."""
        for later in self.steps():
            if later > step:
                self._path(later).unlink(missing_ok=True)

    def since_previous(self, step: int, ids_LNK: np.ndarray) -> np.ndarray | None:
        """Saturation of the evaluation before `step` against these choices [L]; None if there is none to compare."""
        before = [earlier for earlier in self.steps() if earlier < step]
        previous = self.load(before[-1]) if before else None
        if previous is None or previous.shape != ids_LNK.shape:
            return None
        return saturation(previous, ids_LNK)

    def against_last(self) -> list[tuple[int, np.ndarray]]:
        """(step, saturation against the last evaluation [L]) of every one that can be compared."""
        steps = self.steps()
        final = self.load(steps[-1]) if steps else None
        if final is None:
            return []
        choices = ((step, self.load(step)) for step in steps)
        return [(step, saturation(ids, final)) for step, ids in choices if ids is not None and ids.shape == final.shape]

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.npz"
