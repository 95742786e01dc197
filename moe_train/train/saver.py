"""Saves of a running trainer: begun at a step, written while training goes on, committed by all ranks later."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_train.checkpoint.commit import Retention
from moe_train.checkpoint.save import Save
from moe_train.checkpoint.snapshot import Snapshot
from moe_train.diagnostics.progress import NullProgress, Progress, short_number
from moe_train.diagnostics.tracker import NullTracker, Tracker
from moe_train.errors import CheckpointError
from moe_train.train.assemble import Assembly
from moe_train.train.state import Position, begin_save

MAX_FAILED_SAVES = 3
WORTH_TELLING_S = 1.0


class Saver:
    """At most one save is on its way. A context manager: left early, it gives up what its thread has not written.

    A failure to write warns and training goes on; `MAX_FAILED_SAVES` in a row raise `CheckpointError` on every rank.
    Logs `ckpt/pause_s` (seconds that training has lost), `ckpt/write_s` (of the slowest rank), `ckpt/bytes` (of all
    files), or `ckpt/failed` (saves in a row), with the step that was saved.

    Attributes:
        saved_step: the last one that exists as a checkpoint. failed: saves in a row.
    """

    def __init__(
        self,
        assembly: Assembly,
        root: Path,
        tracker: Tracker | NullTracker,
        progress: Progress | NullProgress,
        saved_step: int | None,
    ):
        section = assembly.run.recipe.checkpoint
        self.assembly, self.root, self.tracker, self.progress = assembly, root, tracker, progress
        self.saved_step, self.failed = saved_step, 0
        self.retention = Retention(keep=section.keep, keep_every=section.keep_every, keep_best=section.keep_best)
        self.snapshot = Snapshot()
        self.asynchronous = section.asynchronous
        self._save: Save | None = None
        self._pause_s = 0.0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._save is not None:  # an error: peers may be gone, so nothing is waited for but the own thread
            self._save.cancel()
            self._save = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._save is not None and self._save.busy

    def save(self, step: int, position: Callable[[], Position], wait: bool) -> None:
        """Save this step, once. Without `wait` only the copy is waited for, if the recipe allows that. Collective."""
        late, began = self._save and self._save.step, time.perf_counter()
        self.finish()
        waited = time.perf_counter() - began
        if late is not None and waited >= WORTH_TELLING_S:
            self.progress.message(
                f"step {step}: waited {waited:.1f} s for the checkpoint of step {late}, which was still being written"
            )
        if self.saved_step == step:
            return
        snapshot = self.snapshot if self.asynchronous and not wait else None
        try:
            with self._paused():
                self._save = begin_save(self.root, self.assembly, position(), self.retention, snapshot)
        except CheckpointError as error:
            self._warn(step, error)
            return
        if self._save.started:
            return
        if snapshot and not self._save.fits_memory:
            self.progress.message(f"step {step}: a copy of the state does not fit in host memory; training waits")
        self.finish()

    def advance(self) -> None:
        """Go on with the save that is on its way, now that no rank is busy with it. Collective."""
        if self._save is None or self._save.gathered:
            self.finish()
            return
        save = self._save
        try:
            with self._paused():
                save.gather()
        except CheckpointError as error:
            self._save = None
            self._warn(save.step, error)

    def finish(self) -> None:
        """Commit the save that is on its way, if there is one; waits for it. Collective."""
        if self._save is None:
            return
        save, self._save = self._save, None
        try:
            with self._paused():
                path = save.commit()
        except CheckpointError as error:
            self._warn(save.step, error)
            return
        self.failed, self.saved_step = 0, save.step
        pause_s, self._pause_s = round(self._pause_s, 3), 0.0
        write_s, nbytes = round(save.write_s, 3), save.nbytes
        self.tracker.log(save.step, {"ckpt/pause_s": pause_s, "ckpt/write_s": write_s, "ckpt/bytes": nbytes})
        self.tracker.event("checkpoint", step=save.step, path=path.name, seconds=write_s)
        self.progress.message(
            f"saved {path}: {short_number(nbytes)}B in {write_s:.1f} s, training waited {pause_s:.1f} s"
        )

    @contextmanager
    def _paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._pause_s += time.perf_counter() - began

    def _warn(self, step: int, error: CheckpointError) -> None:
        self.failed, self._pause_s = self.failed + 1, 0.0
        self.tracker.log(step, {"ckpt/failed": self.failed})
        self.tracker.event("checkpoint_failed", step=step, reason=str(error))
        self.progress.message(f"warning: {error}; the previous checkpoint is untouched")
        if self.failed >= MAX_FAILED_SAVES:
            raise error
