"""One rename makes a checkpoint exist; then the pointers move, and only then old ones go."""

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moe_train.checkpoint.manifest import BEST, LATEST, read_manifest, steps_in
from moe_train.disk import sync_folder
from moe_train.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, multiples of `keep_every`, the `keep_best` of lowest validation loss.

    For `keep_every` and `keep_best`, 0: none is kept for that. losses: validation loss by step as far as it has been
    read, None for a checkpoint that has none; filled by `commit`.
    """

    keep: int
    keep_every: int = 0
    keep_best: int = 0
    losses: dict[int, float | None] = field(default_factory=dict, compare=False)

    def removable(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of all steps, by validation loss or None."""
        stay = {*sorted(losses)[-self.keep :], *self.best(losses)}
        return {step for step in losses if step not in stay and (not self.keep_every or step % self.keep_every)}

    def best(self, losses: Mapping[int, float | None]) -> list[int]:
        """Steps of the lowest losses, the best one first, and the earlier of equal ones."""
        ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss))
        return [step for _, step in ranked[: self.keep_best]]


def commit(temporary: Path, final: Path, step: int, retention: Retention) -> None:
    """Rename a folder whose files and manifest are on the disk; move `latest` and `best`; remove old checkpoints."""
    root = final.parent
    sync_folder(temporary)
    replaced = root / f"{final.name}.replaced.tmp"
    if final.exists():  # an older save of the same step: a run that went back and came here again
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(root)
    _point(root / LATEST, final.name)
    # steps after this one are damaged or of a run that went back; they must not push out what this run can resume from
    earlier = {number: path for number, path in steps_in(root) if number <= step}
    retention.losses.pop(step, None)
    losses = {number: _loss(number, path, retention) for number, path in earlier.items()}
    best = retention.best(losses)
    if best:
        _point(root / BEST, earlier[best[0]].name)
    else:
        (root / BEST).unlink(missing_ok=True)
    for old in sorted(retention.removable(losses)):
        _remove(earlier[old])
    shutil.rmtree(replaced, ignore_errors=True)


def _loss(step: int, path: Path, retention: Retention) -> float | None:
    """Validation loss of a checkpoint; None also for one that cannot be read: it is no good as the best."""
    if not retention.keep_best:
        return None
    if step not in retention.losses:
        found = None
        with suppress(CheckpointError):
            found = read_manifest(path).state.get("val_loss")
        retention.losses[step] = found
    return retention.losses[step]


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f"{pointer.name}.tmp")
    temporary.write_text(f"{name}\n")
    temporary.replace(pointer)


def _remove(old: Path) -> None:
    """Half removed, it must not look like a checkpoint. The new one exists: what stays is no failure to write."""
    rubbish = old.with_name(f"{old.name}.removed.tmp")
    with suppress(OSError):
        old.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)
