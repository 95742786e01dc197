"""`moe-train verify`: recipes -> certificates, as a table, as JSON and as an exit code."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_train.config import Recipe, load_recipe
from moe_train.errors import ConfigError
from moe_train.testing import run_distributed
from moe_train.verify.bounds import QUANTITIES
from moe_train.verify.compare import Comparison, Finding, compare
from moe_train.verify.grid import PRECISIONS, Device, Layout, Precision, full_grid, quick_grid
from moe_train.verify.place import Place, backends_left_out, how_shared, not_covered, place_for
from moe_train.verify.rounding import rounding_of
from moe_train.verify.shrink import shrink, traits_of
from moe_train.verify.truth import Case, prepare_case
from moe_train.verify.worker import Job, Plant, run_layout

WITHOUT_FP8 = "precision.experts (fp8) is left out: what is certified computes exactly, and its rounding is no error"
UNCOMPILED = "model.compile (true) is left out: not every layout can have it; it rounds otherwise, and moves nothing"
FAILED_EXIT_CODE = 1


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """crash: a rank's traceback instead of numbers. seconds: wall clock."""

    layout: Layout
    comparison: Comparison
    crash: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.crash and self.comparison.first is None

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.crash:
            return f"stopped: {_error_line(self.crash)}"
        first = self.comparison.first
        if first is None:
            return "equal"
        where = f" of {first.parameter}" if first.parameter else ""
        reasons = "; ".join(filter(None, (first.cause, self.comparison.scope)))
        return (
            f"{first.quantity}{where} differs first, at step {first.step}: error {first.error:.1e}, "
            f"bound {first.bound:.0e}; {reasons}"
        )


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """One recipe at every layout of a grid. left_out: what was asked for and not run, and why, one sentence each.

    sharing: worlds whose ranks shared GPUs.
    """

    recipe: str
    case: Case = field(repr=False)
    results: list[LayoutResult]
    device: Device = "cpu"
    left_out: tuple[str, ...] = ()
    sharing: tuple[int, ...] = ()

    @property
    def not_covered(self) -> str:
        return not_covered(self.device, sorted({result.layout.world for result in self.results}), self.sharing)

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)


def _error_line(text: str) -> str:
    """The line of a traceback that names its exception."""
    lines = text.strip().splitlines()
    return next((line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), lines[-1])


def certify(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    worlds: Sequence[int] = (1, 2, 3, 4),
    full: bool = False,
    device: str = "cpu",
    precisions: Sequence[Precision] | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Certify every recipe and print it. Returns the exit code: 1 if any layout of any recipe differs.

    All recipes are read and shrunk before the first worker starts, so that a wrong one costs nothing.

    Args:
        device: cpu (gloo) or cuda (NCCL, a GPU per rank; worlds of more ranks share the GPUs and talk over gloo).
        precisions: some of those that the device has; None: all of them.
    """
    console = console or Console()
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ConfigError(f"--json ({json_path}): there is no folder {json_path.parent}; make it first")
    place = place_for(device, worlds, precisions)
    loaded = {path: load_recipe(path, overrides) for path in paths}
    recipes = {path: shrink(recipe, place.worlds) for path, recipe in loaded.items()}
    certificates = []
    for path, recipe in recipes.items():
        if loaded[path].precision.experts == "fp8":
            console.print(f"{path}: {WITHOUT_FP8}", highlight=False, soft_wrap=True)
        if loaded[path].model.compile:
            console.print(f"{path}: {UNCOMPILED}", highlight=False, soft_wrap=True)
        certificates.append(certify_shrunk(str(path), recipe, place, full=full, console=console))
        console.print(table(certificates[-1]))
    if json_path is not None:
        json_path.write_text(json.dumps([as_json(certificate) for certificate in certificates], indent=1) + "\n")
    return 0 if all(certificate.passed for certificate in certificates) else FAILED_EXIT_CODE


def certify_shrunk(
    name: str,
    recipe: Recipe,
    place: Place,
    *,
    full: bool = False,
    modified: Plant | None = None,
    console: Console | None = None,
) -> Certificate:
    """Every layout of a grid against one process.

    Args:
        recipe: what `shrink` made for the worlds of `place`.
        modified: importable function; its context changes the package in the workers while a layout runs.
        console: gets a line per layout.
    """
    traits = traits_of(recipe, place.device, place.precisions)
    grid = (full_grid if full else quick_grid)(recipe.batch.global_size, place.worlds, traits)
    left_out = backends_left_out(recipe, traits)
    case = prepare_case(recipe)
    if console is not None:
        where = "" if place.device == "cpu" else ", on GPUs"
        lines = [
            f"{name}: {len(grid)} layouts against one process{where}",
            *([f"  {how_shared(place.sharing)}"] if place.sharing else []),
            *(f"  not run: {each}" for each in left_out),
        ]
        console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)
    results = []
    for layout in grid:
        results.append(check_layout(case, layout, modified, place.device))
        if console is not None:
            _report(console, results[-1])
    return Certificate(
        recipe=name, case=case, results=results, device=place.device, left_out=left_out, sharing=place.sharing
    )


def check_layout(case: Case, layout: Layout, plant: Plant | None = None, device: Device = "cpu") -> LayoutResult:
    """Run one layout on its own processes and compare it. A layout that raises is a failed one, not the end.

    In bf16 what a plain process of the same device loses is measured first, once per case.
    """
    began = time.perf_counter()
    truth = case.truths[layout.micro_size]
    try:
        bounds = rounding_of(case, device) if layout.precision == "bf16" else None
        ranks = run_distributed(run_layout, layout.world, Job.of(case, layout, device, plant), device=device)
    except AssertionError as error:  # what the worker pool raises when a rank has
        return LayoutResult(
            layout=layout, comparison=Comparison(), crash=str(error), seconds=time.perf_counter() - began
        )
    comparison = compare(truth, ranks, layout, bounds)
    return LayoutResult(layout=layout, comparison=comparison, seconds=time.perf_counter() - began)


def _report(console: Console, result: LayoutResult) -> None:
    """A line per layout, as it is done; a failed one says why."""
    mark = "[green]pass[/]" if result.passed else "[red]FAIL[/]"
    reason = "" if result.passed else f": {escape(result.verdict)}"
    console.print(f"  {mark} {result.layout}{reason}", highlight=False, soft_wrap=True)


def table(certificate: Certificate) -> Table:
    """Worst error per quantity and precision over all layouts, beside its bound."""
    verdict = "equal at every layout" if certificate.passed else "NOT EQUAL"
    on = " that was run on GPUs" if certificate.device == "cuda" else ""
    found = Table(title=f"{certificate.recipe}: {verdict}{on}", caption=escape(_caption(certificate)))
    for name in ("quantity", *(cell for precision in PRECISIONS for cell in (precision, "bound")), "worst parameter"):
        found.add_column(name, overflow="fold")
    for quantity in QUANTITIES:
        worst = {precision: _worst(certificate, quantity, precision) for precision in PRECISIONS}
        if not any(worst.values()):
            continue
        cells = [cell for finding in worst.values() for cell in _cells(finding)]
        shown = max((f for f in worst.values() if f), key=lambda f: f.badness)
        found.add_row(quantity, *cells, shown.parameter)
    return found


def _worst(certificate: Certificate, quantity: str, precision: str) -> Finding | None:
    results = [r.comparison.worst for r in certificate.results if r.layout.precision == precision]
    findings = [worst[quantity] for worst in results if quantity in worst]
    return max(findings, key=lambda finding: finding.badness, default=None)


def _cells(finding: Finding | None) -> tuple[str, str]:
    if finding is None:
        return "", ""
    color = "green" if finding.passed else "red"
    return f"[{color}]{finding.error:.1e}[/]", f"{finding.bound:.0e}" if finding.bound else "0"


def _caption(certificate: Certificate) -> str:
    results = certificate.results
    stopped = sum(bool(result.crash) for result in results)
    seconds = sum(result.seconds for result in results)
    return (
        f"{sum(result.passed for result in results)} of {len(results)} layouts pass"
        f"{f', {stopped} stopped' if stopped else ''}, {seconds:.0f} s; nearest routing decision "
        f"{certificate.case.margin:.1e}; not covered: {certificate.not_covered}"
        + (f"\n{how_shared(certificate.sharing)}" if certificate.sharing else "")
        + "".join(f"\nnot run: {sentence}" for sentence in certificate.left_out)
    )


def as_json(certificate: Certificate) -> dict[str, Any]:
    """Everything the table is made of, per layout."""
    return {
        "recipe": certificate.recipe,
        "passed": certificate.passed,
        "shrunk_model": certificate.case.recipe.model.model_dump(mode="json"),
        "margin": certificate.case.margin,
        "batches_redrawn": certificate.case.draw,
        "device": certificate.device,
        "not_covered": certificate.not_covered,
        "sharing_gpus": list(certificate.sharing),
        "left_out": list(certificate.left_out),
        "layouts": [
            {
                **asdict(result.layout),
                "passed": result.passed,
                "verdict": result.verdict,
                "crash": result.crash,
                "seconds": round(result.seconds, 3),
                "quantities": {
                    # JSON knows no infinity
                    name: {**asdict(finding), "error": finding.error if np.isfinite(finding.error) else None}
                    for name, finding in result.comparison.worst.items()
                },
            }
            for result in certificate.results
        ],
    }
