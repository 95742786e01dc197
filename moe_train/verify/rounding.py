"""What bf16 costs: a plain process of the same device in bf16, against the truth."""

from dataclasses import replace
from typing import Any

from moe_train.testing import run_distributed
from moe_train.verify.bounds import RoundingBounds, Unbounded
from moe_train.verify.compare import find_all, gradient_error
from moe_train.verify.grid import Layout
from moe_train.verify.truth import Case
from moe_train.verify.worker import Job, run_layout


def plain_layouts(case: Case) -> list[Layout]:
    """One process, naive loops over experts, nothing sharded: the whole batch at once, and sequence by sequence."""
    size = case.recipe.batch.global_size
    whole = Layout(
        world=1,
        expert=1,
        stage=0,
        split="whole",
        micro_size=size,
        accumulation=1,
        recompute=False,
        backend="loop",
        precision="bf16",
    )
    return [whole, replace(whole, split="single", micro_size=1, accumulation=size)]


def rounding_of(case: Case, device: str) -> RoundingBounds:
    """Measured once per case and device."""
    if device not in case.roundings:
        findings, gradient = [], 0.0
        for layout in plain_layouts(case):
            truth = case.truths[layout.micro_size]
            ranks: list[Any] = run_distributed(run_layout, 1, Job.of(case, layout, device), device=device)
            findings += find_all(truth, ranks, layout, Unbounded())
            gradient = max(gradient, gradient_error(truth, ranks, layout))
        case.roundings[device] = RoundingBounds.measured(findings, gradient)
    return case.roundings[device]
