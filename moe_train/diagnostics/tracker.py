"""Where metrics go: metrics.jsonl always, wandb and TensorBoard as copies that may fail without harm. The only file
that imports wandb.

Keys are grouped: train/..., val/..., moe/..., perf/..., ckpt/... . wandb gets no `step=` (it drops replayed steps);
`train/step` is its axis, so the steps repeated after a resume are drawn where they belong.
"""

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.config.schema import TrackingSection
from moe_train.diagnostics.metrics_file import MetricsFile, Rewound
from moe_train.diagnostics.redact import redact, redact_text
from moe_train.diagnostics.tensorboard import TensorBoard

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# wandb raises these, beside ConnectionError, for requests that its ended helper process will never answer
_LOST_HELPER = ("HandleAbandonedError", "MailboxClosedError")


class Tracker:
    """The tracker of rank 0.

    `run_id` is wandb's id of the run: keep it in checkpoints and hand it back as `resume_id`. It is set whatever the
    mode. Left by an exception, the context manager closes the files without an end event.
    """

    def __init__(
        self,
        run_dir: Path,
        section: TrackingSection,
        config: dict[str, Any],
        *,
        tags: Iterable[str] = (),
        resume_id: str | None = None,
        warn: Callable[[str], None] | None = None,
    ):
        """`config` (plain dicts: recipe, layout) is redacted before wandb sees it; `tags` are added to the section's.

        `warn` gets one line when wandb fails; unset, it goes to stderr.
        """
        self.run_dir = Path(run_dir)
        self.last_step = 0
        self._warn = warn or _warn_on_stderr
        self._file = MetricsFile(self.run_dir / "metrics.jsonl")
        if resume_id is not None and not _RUN_ID.fullmatch(resume_id):
            self._warn(f"run id {redact_text(resume_id)[:80]!r} is not [A-Za-z0-9_-]{{1,64}}: a new one is used")
            resume_id = None
        # not from `random`: the run's seeded generators must not notice the tracker
        self.run_id = resume_id or secrets.token_hex(5)
        self._finished = False
        self._wandb_run: Any = None
        self._max_layer_keys = section.max_layer_keys
        self._board = TensorBoard(self.run_dir, self._warn) if section.tensorboard else None
        mode = os.environ.get("WANDB_MODE") or section.mode
        if mode not in ("disabled", "noop"):
            self._on_wandb(lambda: self._start_wandb(section, mode, config, [*section.tags, *tags]))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line: step, time (seconds since 1970) and the metrics, plain numbers."""
        self.last_step = max(self.last_step, step)  # what a save has cost is known some steps later
        self._file.write({"step": step, "time": _now(), **metrics})
        self._copy(step, metrics)

    def layers(self, step: int, figures: Mapping[str, Sequence[float] | np.ndarray]) -> None:
        """One key per figure and layer for wandb and TensorBoard, `moe/layer_07/entropy`; metrics.jsonl has them in its
        `load` events. With more keys than `tracking.max_layer_keys`, layers spread evenly from first to last."""
        names = list(figures)[: self._max_layer_keys]
        if not names:
            return
        num_layers = len(figures[names[0]])
        wanted = min(num_layers, self._max_layer_keys // len(names))
        shown = sorted({round(layer) for layer in np.linspace(0, num_layers - 1, wanted)})
        self._copy(step, {f"moe/layer_{layer:02}/{name}": figures[name][layer] for layer in shown for name in names})

    def heat_map(self, step: int, counts_LE: np.ndarray) -> None:
        """Layer x expert as an image and a histogram of the shares, for wandb and TensorBoard."""
        if self._wandb_run is None and self._board is None:
            return
        from moe_train.diagnostics.picture import load_pixels  # matplotlib: half a second of every start

        pixels, shares = load_pixels(counts_LE)
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._log_heat_map(step, pixels, shares))
        if self._board is not None:
            self._board.image(step, "moe/heat_map", pixels)
            self._board.histogram(step, "moe/expert_shares", shares)

    def event(self, name: str, **fields: Any) -> None:
        """One line `{"event": name, ...}`, redacted; give it a `step` if a rewind shall drop it. Not sent to wandb."""
        self._file.write({"event": name, "time": _now(), **redact(fields)})

    def alert(self, title: str, text: str) -> None:
        """wandb's notification, where wandb is on; write an event as well."""
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._wandb_run.alert(title=title, text=redact_text(text)))

    def image(self, path: Path, key: str) -> None:
        """An image event with the path relative to the run directory, and a copy in wandb."""
        self.event("image", step=self.last_step, image=key, path=os.path.relpath(path, self.run_dir))
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._log_image(Path(path), key))

    def artifact(self, path: Path, kind: str) -> None:
        """A file of the run directory as wandb's artifact, where wandb is on. wandb writes its path down: left out
        where that would name a home folder."""
        if self._wandb_run is None:
            return
        shown = _below_here(Path(path))
        if redact_text(shown) != shown:
            self._warn(f"{Path(path).name} is no artifact in wandb: its path names a home folder; start above it")
            return
        self._on_wandb(lambda: self._log_artifact(shown, kind))

    def rewind(self, step: int) -> Rewound:
        """Resume after `step`: drop what metrics.jsonl says of later steps, and the end of an earlier run."""
        self.last_step = step
        return self._file.rewind(step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the last line, `"event": "end"` with the redacted summary, and close; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        summary = redact(summary)
        self._file.write({"event": "end", "step": self.last_step, "time": _now(), **summary})
        self._file.close()
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._wandb_run.summary.update(summary))
        self._finish_copies(exit_code=0)

    def close(self) -> None:
        """Close without an end event: the run failed."""
        self._finished = True
        self._file.close()
        self._finish_copies(exit_code=1)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self.close()

    def _start_wandb(self, section: TrackingSection, mode: str, config: dict[str, Any], tags: list[str]) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False):
            # init would ask on the terminal while every other rank waits
            raise RuntimeError("no API key: set WANDB_API_KEY or run `wandb login`")
        settings = wandb.Settings(
            # each of these would otherwise store host, user, command line, packages or console output
            console="off",
            host="host",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            silent=True,
            symlink=False,
            reinit="create_new",  # a run left open by an earlier recipe of this process stays itself
            init_timeout=30,  # of a network that does not answer; the other ranks wait for it
        )
        self._wandb_run = wandb.init(
            mode=mode,  # pyright: ignore[reportArgumentType] - wandb checks it and the user reads its message
            dir=_below_here(self.run_dir),
            id=self.run_id,
            resume="allow",
            project=section.project,
            name=section.name or self.run_dir.resolve().name,
            group=section.group,
            tags=tags,
            config=redact(config),
            settings=settings,
        )
        self._wandb_run.define_metric("*", step_metric="train/step")

    def _log_image(self, path: Path, key: str) -> None:
        import wandb

        self._wandb_run.log({"train/step": self.last_step, key: wandb.Image(str(path))})

    def _copy(self, step: int, metrics: dict[str, Any]) -> None:
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._wandb_run.log({"train/step": step, **metrics}))
        if self._board is not None:
            self._board.log(step, metrics)

    def _log_heat_map(self, step: int, pixels: np.ndarray, shares: np.ndarray) -> None:
        import wandb

        histogram = wandb.Histogram(np_histogram=np.histogram(shares, bins=32))
        image = wandb.Image(pixels)
        self._wandb_run.log({"train/step": step, "moe/heat_map": image, "moe/expert_shares": histogram})

    def _log_artifact(self, path: str, kind: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.run_id}", type=kind)
        artifact.add_file(path, policy="immutable")  # the other policy copies it below the home folder
        self._wandb_run.log_artifact(artifact)

    def _finish_copies(self, exit_code: int) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb_run is not None:
            self._on_wandb(lambda: self._wandb_run.finish(exit_code=exit_code))
            self._wandb_run = None
        _clean_wandb_logs(self.run_dir)

    def _on_wandb(self, action: Callable[[], None]) -> None:
        """Run `action`; should it fail, warn once and go on without wandb."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - wandb has no common base class, and none of it may stop training
            self._wandb_run = None
            lines = str(error).strip().splitlines()
            reason = redact_text(lines[0]) if lines else ""
            if lost := type(error).__name__ in _LOST_HELPER or isinstance(error, ConnectionError):
                reason = f"its helper process is gone: {reason}"  # which socket call notices first is chance
            self._warn(f"wandb is off ({type(error).__name__}: {reason[:200]}); metrics.jsonl goes on")
            if lost:
                _forget_wandb_service()


class NullTracker:
    """The tracker of every other rank: same calls, no effect."""

    def __init__(self, run_id: str = ""):
        self.run_id = run_id
        self.last_step = 0

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def event(self, name: str, **fields: Any) -> None:
        """Nothing."""

    def alert(self, title: str, text: str) -> None:
        """Nothing."""

    def layers(self, step: int, figures: Mapping[str, Sequence[float] | np.ndarray]) -> None:
        """Nothing."""

    def heat_map(self, step: int, counts_LE: np.ndarray) -> None:
        """Nothing."""

    def image(self, path: Path, key: str) -> None:
        """Nothing."""

    def artifact(self, path: Path, kind: str) -> None:
        """Nothing."""

    def rewind(self, step: int) -> Rewound:
        """Nothing was kept or dropped."""
        return Rewound(num_kept=0, num_dropped=0, num_damaged=0)

    def finish(self, summary: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def __enter__(self) -> "NullTracker":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""


def _now() -> float:
    return round(time.time(), 3)


def _warn_on_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _below_here(path: Path) -> str:
    """Relative where it can be: wandb's own logs repeat the path, and an absolute one may name a home folder."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _clean_wandb_logs(run_dir: Path) -> None:
    """Redact wandb's debug logs, whose tracebacks and links name home folders; earlier, killed runs' included."""
    for log in run_dir.glob("wandb/*run-*/logs/*.log"):
        try:
            if log.is_symlink():
                log.unlink()
                continue
            text = log.read_text(errors="replace")
            if (clean := redact_text(text)) != text:
                log.write_text(clean)
        except OSError:  # a log is no reason to fail a run
            continue


def _forget_wandb_service() -> None:
    """wandb's helper process died: let the next run of this process start a new one."""
    import wandb

    with contextlib.suppress(Exception):  # it reports the lost connection once more
        wandb.teardown()
