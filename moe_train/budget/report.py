"""A plan as tables, and as JSON."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_train.budget.estimate import Comparison, Plan
from moe_train.errors import ConfigError

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(plan: Plan, compared: list[Comparison], title: str) -> None:
    console = Console(highlight=False)
    console.print(f"{title}: rank {plan.rank} of {plan.world}, which holds most", soft_wrap=True)
    for table in (_memory(plan), _wire(plan), _loads(plan), _compared(compared)):
        if table.row_count:
            console.print(table)
    hardware = plan.hardware
    console.print(
        f"FLOPs per token {plan.flops_per_token:.4g} (forward and backward), {plan.tokens} tokens a step. Assumed: "
        f"{hardware.name}, peak {hardware.flops / 1e12:.4g} TFLOP/s of which {hardware.efficiency:.0%} are reached "
        f"(--efficiency), {hardware.link / 1e9:.4g} GB/s in a host, {hardware.network / 1e9:.4g} GB/s between hosts, "
        "nothing overlapped. Weights, gradients and states are exact; the rest is an estimate, without the allocator's "
        "gaps and what CUDA itself takes. parallel.tensor is not taken off the activations.",
        soft_wrap=True,
    )


def write_json(plan: Plan, compared: list[Comparison], path: Path) -> None:
    """Raises `ConfigError` if it cannot be written."""
    tree = plan.to_dict() | {
        "compared": [vars(item) | {"error_percent": item.error_percent} for item in compared],
    }
    try:
        path.write_text(json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from None


def _memory(plan: Plan) -> Table:
    table = Table("", "weights", "gradients", "states", title="held", title_justify="left")
    for what, held in (("experts", plan.experts), ("dense", plan.dense)):
        table.add_row(what, *map(_size, (held.weights, held.gradients, held.states)))
    return table


def _wire(plan: Plan) -> Table:
    table = Table("", "bytes", "ranks", title="sent in a step", title_justify="left")
    for flow in plan.flows:
        table.add_row(flow.what, _size(flow.nbytes), str(len(flow.ranks)))
    return table


def _loads(plan: Plan) -> Table:
    table = Table(
        *("load", "activations", "memory", "compute", "wire", "step", "tokens/s"),
        title="by load: rows of its experts, in fair shares",
        title_justify="left",
    )
    for load in plan.loads:
        seconds = (f"{value:.3g} s" for value in (load.compute_s, load.wire_s, load.seconds))
        memory = map(_size, (load.activations, load.memory))
        table.add_row(f"{load.skew:g}", *memory, *seconds, f"{plan.tokens / load.seconds:,.0f}")
    return table


def _size(nbytes: float) -> str:
    for unit, name in UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def _compared(compared: list[Comparison]) -> Table:
    table = Table("", "planned", "measured", "error", title="beside the run", title_justify="left")
    for item in compared:
        table.add_row(item.what, f"{item.planned:.6g}", f"{item.measured:.6g}", f"{item.error_percent:+.1f} %")
    return table
