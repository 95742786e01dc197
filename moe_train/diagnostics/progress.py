"""What a person sees while a run goes on: one live line on a terminal, plain lines anywhere else."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class Progress:
    """Progress of rank 0, a context manager; on a terminal it is closed properly whatever is raised inside.

        with Progress(600, start_step=0) as progress:
            progress.update(20, loss=4.1234, lr=3e-4, tokens_per_s=5100, max_vio=0.42)

    prints `step  20/600 | loss 4.1234 | lr 3.0e-04 |  5.1k tok/s | MaxVio 0.42 | ETA 1:23`.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        is_terminal: bool | None = None,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`is_terminal` unset: ask the file (stdout by default); a terminal without cursor control counts as none."""
        self.total_steps = total_steps
        self._file = file if file is not None else sys.stdout
        self._console = Console(file=self._file, highlight=False, force_terminal=is_terminal)
        if is_terminal is None:
            is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._clock = clock
        # the ETA follows the last 32 updates, so the slow first steps and old pauses are forgotten
        self._times: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=32)
        self._step = start_step
        self._live = Live(console=self._console, auto_refresh=False) if is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens_per_s: float | None = None,
        mfu: float | None = None,
        max_vio: float | None = None,
        val_loss: float | None = None,
        mark: str | None = None,
    ) -> None:
        """Show `step` (of total_steps) as done. `mfu` from 0 to 1; what is None is left out. `mark`: said first."""
        self._step = step
        self._times.append((step, self._clock()))
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", f"loss {loss:.4f}"]
        if mark is not None:
            parts.insert(0, mark)
        if val_loss is not None:
            parts.append(f"val {val_loss:.4f}")
        parts.append(f"lr {lr:.1e}")
        if tokens_per_s is not None:
            parts.append(f"{short_number(tokens_per_s):>5} tok/s")
        if mfu is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        if max_vio is not None:
            parts.append(f"MaxVio {max_vio:.2f}")
        parts.append(f"ETA {duration(self._seconds_left())}")
        self._show(parts)

    def message(self, text: str) -> None:
        """One line of its own: an evaluation, a checkpoint, a warning."""
        if self._live is not None:
            self._console.print(Text(text))
        else:
            print(text, file=self._file, flush=True)

    def _show(self, parts: list[str]) -> None:
        if self._live is None:
            print(" | ".join(parts), file=self._file, flush=True)
        else:
            self._live.update(self._line(parts), refresh=True)

    def _line(self, parts: list[str]) -> Table:
        """A bar of fixed width and the numbers, cut at the terminal's edge instead of wrapped."""
        width = 20
        filled = round(width * min(self._step / self.total_steps, 1.0)) if self.total_steps else width
        bar = Text("━" * filled, style="green") + Text("━" * (width - filled), style="bright_black")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        # the separator's style as a span: as its base style it would colour the numbers too
        numbers = Text.assemble((" │ ", "bright_black")).join([Text(part) for part in parts])
        grid.add_row(bar, numbers)
        return grid

    def _seconds_left(self) -> float | None:
        first_step, first_time = self._times[0]
        last_step, last_time = self._times[-1]
        if last_step <= first_step:
            return None
        return (self.total_steps - last_step) * (last_time - first_time) / (last_step - first_step)


class NullProgress:
    """Progress of every other rank: same calls, no effect."""

    def __enter__(self) -> "NullProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens_per_s: float | None = None,
        mfu: float | None = None,
        max_vio: float | None = None,
        val_loss: float | None = None,
        mark: str | None = None,
    ) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""


def short_number(value: float) -> str:
    """Three digits at most before the unit: 512, 5.1k, 51k, 1.2M."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5 or unit == "G":
            return f"{value:.1f}{unit}" if unit and value < 9.95 else f"{value:.0f}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """1:23, 2:03:04, 3d 04:05; ?:?? where unknown."""
    if seconds is None:
        return "?:??"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
