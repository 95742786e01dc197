"""A run's metrics.jsonl as a report needs it: curves, loads, events. What cannot be read is counted, never guessed.

L MoE layers, E logical experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from moe_train.diagnostics.metrics_file import read_lines
from moe_train.diagnostics.routing_files import RoutingFiles
from moe_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """A `load` event. step, first_step: the optimizer steps it is of. fields: the event's other arrays, by name."""

    step: int
    first_step: int
    counts_LE: np.ndarray
    """int64, tokens per layer and expert."""
    fields: dict[str, np.ndarray] = field(default_factory=dict)

    def merged(self, later: "LoadRecord") -> "LoadRecord":
        """This one and the one after it as one; of the other arrays the later ones, which are of single steps."""
        return LoadRecord(
            step=later.step,
            first_step=self.first_step,
            counts_LE=self.counts_LE + later.counts_LE,
            fields={**self.fields, **later.fields},
        )


@dataclass(kw_only=True)
class RunRecord:
    """Everything a run has written down.

    curves: by metric, (step, value) in order of steps; the last value of a step counts. pairs: the newest co-activation
    counts, (step, [L, E, E]). saturation: (step, [L]) of each evaluation against the last one. starts: `start` events,
    one per process that worked on the run. end: the last line of a run that was finished. num_damaged: lines left out.
    """

    name: str
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    loads: list[LoadRecord] = field(default_factory=list)
    pairs: tuple[int, np.ndarray] | None = None
    saturation: list[tuple[int, np.ndarray]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    first_time: float | None = None
    last_time: float | None = None
    num_damaged: int = 0

    @property
    def last_step(self) -> int:
        """The last step that anything was logged of; 0 before the first."""
        return max((points[-1][0] for points in self.curves.values() if points), default=0)


def read_run(run_dir: Path) -> RunRecord:
    """Read `run_dir`/metrics.jsonl, and the choices kept beside it.

    Raises `ConfigError` if there is none, or nothing in it can be read.
    """
    run_dir = Path(run_dir)
    path = run_dir / "metrics.jsonl"
    run = RunRecord(name=run_dir.resolve().name)
    curves: dict[str, dict[int, float]] = {}
    try:
        for line in read_lines(path):
            if line is None or not _take(run, curves, line):
                run.num_damaged += 1
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): give the folder of a run, its --run-dir"
        ) from None
    run.saturation = RoutingFiles(run_dir).against_last()
    run.curves = {key: sorted(points.items()) for key, points in sorted(curves.items())}
    if not run.curves and not run.starts:
        damaged = f" ({run.num_damaged} damaged lines)" if run.num_damaged else ""
        raise ConfigError(f"{path}: holds no metrics{damaged}: nothing to report before the first log step")
    return run


def _take(run: RunRecord, curves: dict[str, dict[int, float]], line: dict[str, Any]) -> bool:
    """Put one line where it belongs; False if it is not what its place wants."""
    time = as_number(line.get("time"))
    if time is not None and math.isfinite(time):
        run.first_time = time if run.first_time is None else min(run.first_time, time)
        run.last_time = time if run.last_time is None else max(run.last_time, time)
    kind, step = line.get("event"), line.get("step")
    if kind is None:
        if not _is_step(step):
            return False
        for key, value in line.items():
            number = as_number(value)
            if key not in ("step", "time") and number is not None:
                curves.setdefault(key, {})[step] = number
        return True
    if not isinstance(kind, str) or not (step is None or _is_step(step)):
        return False
    if kind == "load":
        record = _load_record(line)
        if record is None or (run.loads and record.counts_LE.shape != run.loads[-1].counts_LE.shape):
            return False
        run.loads = [earlier for earlier in run.loads if earlier.step < record.step] + [record]
    elif kind == "coactivation":
        pairs_LEE = _array(line.get("pairs"))
        if step is None or pairs_LEE is None or pairs_LEE.ndim != 3 or pairs_LEE.shape[1] != pairs_LEE.shape[2]:
            return False
        run.pairs = (step, pairs_LEE)
    elif kind == "start":
        run.starts.append(line)
    elif kind == "end":
        run.end = line
    else:
        run.events.append(line)
    return True


def as_number(value: Any) -> float | None:
    """A float of a JSON value, its strings for what is not finite included; None of anything else."""
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _load_record(line: dict[str, Any]) -> LoadRecord | None:
    if not (_is_step(line.get("step")) and _is_step(line.get("first_step"))):
        return None
    counts_LE = _array(line.get("counts"))
    if counts_LE is None or counts_LE.ndim != 2 or not counts_LE.size or (counts_LE < 0).any():
        return None
    rest = {key: _array(value) for key, value in line.items() if isinstance(value, list) and key != "counts"}
    if any(array is None or len(array) != len(counts_LE) for array in rest.values()):
        return None
    fields = {key: array for key, array in rest.items() if array is not None}
    return LoadRecord(
        step=line["step"], first_step=line["first_step"], counts_LE=counts_LE.astype(np.int64), fields=fields
    )


def _array(value: Any) -> np.ndarray | None:
    """Nested lists of numbers of one shape as float64; None of anything else."""
    try:
        return np.array(value, dtype=np.float64)  # "NaN" and the infinities are read as such
    except (TypeError, ValueError):
        return None


def merge_loads(loads: Sequence[LoadRecord], most: int) -> list[LoadRecord]:
    """At most `most` records; neighbours become one, as often as it takes."""
    records = list(loads)
    while len(records) > max(most, 1):
        pairs = [records[index : index + 2] for index in range(0, len(records), 2)]
        records = [pair[0].merged(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return records
