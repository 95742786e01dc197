"""metrics.jsonl: one JSON object a line, appended, handed to the operating system line by line.

It is the truth about a run: a process that is killed loses none of the lines it wrote. (A machine that loses power may
lose the last ones.) Infinite and undefined numbers are the strings "NaN", "Infinity" and "-Infinity": valid JSON that
`float()` reads back. A write that fails, on a full disk for example, raises OSError.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rewound:
    """What a rewind did."""

    num_kept: int
    """Lines kept."""
    num_dropped: int
    """Whole lines dropped: of later steps, or the end of an earlier run."""
    num_damaged: int
    """Lines that were not a JSON object, dropped too."""


class MetricsFile:
    """An open metrics.jsonl. A damaged last line, left by a kill in mid-write, is removed on opening."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _ends_with_newline(path):
            _rewrite(path, last_step=None)
        self._descriptor: int | None = _open(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; numpy and torch scalars become plain numbers. Raises TypeError for what JSON cannot hold."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        rest = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        while rest:  # a signal or a nearly full disk may cut a write short
            rest = rest[os.write(self._descriptor, rest) :]

    def rewind(self, step: int) -> Rewound:
        """Drop lines of steps after `step`, any end event and damaged lines; atomic: the old file or the new one."""
        self.close()
        rewound = _rewrite(self.path, last_step=step)
        self._descriptor = _open(self.path)
        return rewound

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a metrics.jsonl in order; None stands for a damaged line."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8: cut off by a kill or damaged on disk
                record = None
            yield record if isinstance(record, dict) else None


def read_curve(path: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has `key`, in order; "NaN" and the infinities become floats again."""
    return [
        (int(record["step"]), float(record[key]))
        for record in read_lines(path)
        if record is not None and "step" in record and record.get(key) is not None
    ]


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _ends_with_newline(path: Path) -> bool:
    """True for an empty or missing file as well: there is no line to end."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _rewrite(path: Path, last_step: int | None) -> Rewound:
    """Keep whole lines, with `last_step` only those up to it and no end event."""
    kept, dropped, damaged = 0, 0, 0
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for record in read_lines(path):
            if record is None:
                damaged += 1
            elif last_step is not None and _is_after(record, last_step):
                dropped += 1
            else:
                kept += 1
                file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return Rewound(num_kept=kept, num_dropped=dropped, num_damaged=damaged)


def _is_after(record: dict[str, Any], last_step: int) -> bool:
    step = record.get("step")
    return record.get("event") == "end" or (isinstance(step, int | float) and step > last_step)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, str | int | float | bool | None) and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value
