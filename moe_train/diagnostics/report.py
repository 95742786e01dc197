"""One HTML file that shows a run, or two side by side: everything inside it, nothing loaded from anywhere.

The figures are made here, from metrics.jsonl alone; page/report.js only draws them.
L MoE layers, E logical experts, F frames of the heat map.
"""

import html
import json
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.diagnostics.load import LoadHistory, layer_figures
from moe_train.diagnostics.redact import redact, redact_text
from moe_train.diagnostics.run_record import LoadRecord, RunRecord, merge_loads, read_run
from moe_train.diagnostics.step_figures import coactivation
from moe_train.errors import ConfigError

PAGE = Path(__file__).parent / "page"
MAX_FRAMES, MAX_CELLS = 120, 400_000
"""Of the heat map over time: steps of its slider, and numbers in all of them together."""
MAX_POINTS = 1000
MAX_EVENTS = 500
SETTING = ("steps", "world", "expert_parallel", "device", "top_k", "tokens_per_step")
OF_LAYERS = ("max_vio_batch", "confidence", "logit_rms", "peak_rows", "skew_ms")
OF_RANKS = ("received", "lost_ms", "expert_ms")
BASELINES = ("untrained", "unigram")


def write_report(run_dir: Path, vs: Path | None, out: Path) -> list[RunRecord]:
    """Write the report of `run_dir`, beside `vs` if given, to `out`, under its name only when it is whole.

    Raises `ConfigError`: a folder without metrics, or an `out` that cannot be written.
    """
    runs = [read_run(path) for path in (run_dir, vs) if path is not None]
    text = report_html([run_data(run) for run in runs])
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise ConfigError(f"--out ({out}): cannot be written ({error.strerror}): give another place") from None
    return runs


def write_pictures(runs: Sequence[RunRecord], folder: Path) -> list[Path]:
    """One PNG per run: its loads, MaxVio and loss, as load.png shows them. Raises `ConfigError` if it cannot write."""
    from moe_train.diagnostics.picture import load_picture  # matplotlib: half a second of every start

    paths = []
    for number, run in enumerate(runs):
        history = LoadHistory()
        for record in run.loads:
            history.add(record.step, record.counts_LE)
        baselines = {key: run.curves[f"val/{key}"][-1][1] for key in BASELINES if f"val/{key}" in run.curves}
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", run.name) + ("-2" if number and run.name == runs[0].name else "")
        paths.append(folder / f"{stem}.png")
        losses, validation = (run.curves.get(key, []) for key in ("train/loss", "val/loss"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            load_picture(history, losses, validation, paths[-1], redact_text(run.name), baselines)
        except OSError as error:
            raise ConfigError(f"--png ({folder}): cannot be written ({error.strerror}): give another place") from None
    return paths


def report_html(runs: Sequence[dict[str, Any]]) -> str:
    """The page, from `run_data` of one run or two. Nothing that a run says can become markup or script."""
    title = " and ".join(run["name"] for run in runs)
    data = json.dumps({"runs": list(runs), "made": time.time()}, allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(title),
        "style": (PAGE / "report.css").read_text(encoding="utf-8"),
        "script": "".join((PAGE / name).read_text(encoding="utf-8") for name in ("draw.js", "report.js")),
        # inside a script element only these could end it or start markup
        "data": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    pieces = re.split(r"\{\{(\w+)\}\}", (PAGE / "report.html").read_text(encoding="utf-8"))
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def run_data(run: RunRecord) -> dict[str, Any]:
    """Plain values for the page: what it shows of one run."""
    frames = merge_loads(run.loads, _most_frames(run.loads))
    start = redact(run.starts[-1]) if run.starts else {}
    data = {
        "name": redact_text(run.name),
        "about": [str(line) for line in start.get("about", [])],
        "setting": {key: start.get(key) for key in SETTING},
        "finished": run.end is not None or run.last_step == start.get("steps"),
        "last_step": run.last_step,
        "seconds": None if run.first_time is None or run.last_time is None else run.last_time - run.first_time,
        "first_time": run.first_time,
        "num_damaged": run.num_damaged,
        "curves": {key: _thin(points) for key, points in run.curves.items()},
        "frames": [_frame(record, start.get("expert_groups"), start.get("shared_expert_ranks")) for record in frames],
        "coactivation": _coactivation(run),
        "saturation": [{"step": step, "layers": _short(values_L)} for step, values_L in run.saturation],
        "dead": _dead(run.loads),
        "events": _events(run),
    }
    return _finite(data)


def _most_frames(loads: Sequence[LoadRecord]) -> int:
    cells = loads[-1].counts_LE.size if loads else 1
    return min(MAX_FRAMES, max(8, MAX_CELLS // cells))


def _frame(record: LoadRecord, groups: Any, shared_ranks: Any) -> dict[str, Any]:
    figures = layer_figures(record.counts_LE)
    dims = {name: values.ndim for name, values in record.fields.items()}
    more: dict[str, Any] = {name: _short(record.fields[name]) for name in OF_LAYERS if dims.get(name) == 1}
    more |= {name: [_short(row) for row in record.fields[name]] for name in OF_RANKS if dims.get(name) == 2}
    if "received" in more:
        more["rank_share"] = _rank_share(record.fields["received"], groups, shared_ranks)
    return {
        **more,
        "step": record.step,
        "first_step": record.first_step,
        "counts": record.counts_LE.tolist(),
        "max_vio": _short(figures.max_vio_L),
        "entropy": _short(figures.entropy_L),
        "cv": _short(figures.cv_L),
    }


def _rank_share(received_LW: np.ndarray, groups: Any, shared_ranks: Any) -> list[list[float | None]] | None:
    """Rows of each rank over the mean of its EP group; None for ranks that hold the shared expert alone."""
    try:
        places = [list(group)[int(shared_ranks) :] for group in groups]
        share_LW = np.full(received_LW.shape, np.nan)
        for ranks in places:
            mean_L1 = received_LW[:, ranks].mean(axis=1, keepdims=True)
            share_LW[:, ranks] = np.where(mean_L1 > 0, received_LW[:, ranks] / np.where(mean_L1 > 0, mean_L1, 1), 0.0)
    except (TypeError, ValueError, IndexError):  # a file that says nothing of its groups, or something else
        return None
    return [_short(row) for row in share_LW]


def _coactivation(run: RunRecord) -> dict[str, Any] | None:
    """P(j | i) of the newest record, in thousandths: layers of a large model would fill the file otherwise."""
    if run.pairs is None:
        return None
    step, pairs_LEE = run.pairs
    shown = np.linspace(0, len(pairs_LEE) - 1, min(len(pairs_LEE), max(4, MAX_CELLS // pairs_LEE[0].size))).round()
    layers = sorted({int(layer) for layer in shown})
    return {
        "step": step,
        "layers": layers,
        "thousandths": (coactivation(pairs_LEE[layers]) * 1000).round().astype(int).tolist(),
    }


def _dead(loads: Sequence[LoadRecord]) -> list[dict[str, Any]]:
    """Experts without a token in the last record, and since which step: the records before it that say the same."""
    if not loads:
        return []
    found = []
    routed_L = loads[-1].counts_LE.sum(axis=1) > 0
    for layer, expert in np.argwhere((loads[-1].counts_LE == 0) & routed_L[:, None]).tolist():
        since = loads[-1].first_step
        for record in reversed(loads):
            if record.counts_LE[layer, expert]:
                break
            since = record.first_step
        found.append({"layer": layer, "expert": expert, "since": since})
    return found


def _events(run: RunRecord) -> list[dict[str, Any]]:
    """Of all kinds, in order of time, each with a line of text; the newest where there are too many."""
    lines = redact([*run.starts, *run.events, *([run.end] if run.end else [])])
    lines.sort(key=lambda line: line["time"] if isinstance(line.get("time"), int | float) else math.inf)
    return [
        {"step": line.get("step"), "time": line.get("time"), "kind": line["event"], "text": _text(line, number)}
        for number, line in enumerate(lines)
    ][-MAX_EVENTS:]


def _text(line: dict[str, Any], number: int) -> str:
    kind = line["event"]
    if kind == "start":
        return f"{'resumed' if number else 'started'} on {line.get('world', '?')} ranks ({line.get('device', '?')})"
    if kind == "guard":
        found = line.get("found")
        found = f"{found:.3g}" if isinstance(found, int | float) else str(found)
        return f"{line.get('when')} in MoE layer {line.get('layer')} ({found}); action: {line.get('action')}"
    shown = {key: value for key, value in line.items() if key not in ("event", "step", "time")}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def _thin(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most 2 * MAX_POINTS finite points: of each stretch the lowest and the highest, so that no spike is lost."""
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) <= 2 * MAX_POINTS:
        return [[step, _digits(value)] for step, value in points]
    kept = []
    for stretch in np.array_split(np.arange(len(points)), MAX_POINTS):
        of = sorted(stretch.tolist(), key=lambda index: points[index][1])
        kept += sorted({of[0], of[-1]})
    return [[points[index][0], _digits(points[index][1])] for index in kept]


def _short(values: np.ndarray) -> list[Any]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    """Six digits: more cannot be seen and would make the file larger."""
    return float(f"{value:.6g}")


def _finite(value: Any) -> Any:
    """None in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
