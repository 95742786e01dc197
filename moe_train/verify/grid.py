"""Which layouts are compared. Pure: sizes -> list of `Layout`.

A new axis is a field of `Layout` with its values in `full_grid`; the quick grid finds it by itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

QUICK_LIMIT = 12
"""Layouts of a quick certificate: enough for every value of every axis at worlds 1 to 4."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of running the same optimizer steps.

    expert: ranks of an EP group. stage: ZeRO. split: how a rank's sequences become micro-batches: `whole` is one,
    `single` one sequence each, `between` something in between; `micro_size` and `accumulation` say it in numbers.
    recompute: activation checkpointing. precision: fp64 leaves DeepSpeed out, which insists on float32.
    """

    world: int
    expert: int
    stage: int
    split: Literal["whole", "single", "between"]
    micro_size: int
    accumulation: int
    recompute: bool
    backend: Literal["loop", "grouped"]
    precision: Literal["fp32", "fp64"]

    def __str__(self) -> str:
        parts = [f"{self.world} x EP {self.expert}", f"ZeRO-{self.stage}", f"{self.accumulation} x {self.micro_size}"]
        return ", ".join([*parts, *(["recompute"] if self.recompute else []), self.backend, self.precision])


ARITHMETIC: tuple[tuple[Literal["fp32", "fp64"], Literal["loop", "grouped"]], ...] = (
    ("fp32", "loop"),
    ("fp32", "grouped"),
    ("fp64", "loop"),  # torch's grouped GEMM takes no float64
)
AXES = tuple(f.name for f in fields(Layout) if f.name not in ("micro_size", "accumulation"))
"""What is varied; micro_size and accumulation follow from `split` and `world`."""


def full_grid(global_size: int, worlds: Sequence[int]) -> list[Layout]:
    """Every combination. `global_size` sequences per step must be a multiple of each world."""
    return [
        Layout(
            world=world,
            expert=expert,
            stage=stage,
            split=split,
            micro_size=micro_size,
            accumulation=global_size // (world * micro_size),
            recompute=recompute,
            backend=backend,
            precision=precision,
        )
        for world in worlds
        for expert in _divisors(world)
        for precision, backend in ARITHMETIC
        for stage in range(4)
        for split, micro_size in _splits(global_size // world)
        for recompute in (False, True)
    ]


def quick_grid(global_size: int, worlds: Sequence[int], limit: int = QUICK_LIMIT) -> list[Layout]:
    """At most `limit` layouts: every value of every axis if the limit allows, then as many pairs of values as fit.

    Greedy: the layout that shows the most values not seen yet, then the most pairs not seen yet, then the first.
    """
    candidates = full_grid(global_size, worlds)
    values: set[tuple] = set()
    pairs: set[tuple] = set()
    chosen: list[Layout] = []
    while len(chosen) < limit and len(chosen) < len(candidates):
        best = max(candidates, key=lambda c: (len(_values(c) - values), len(_pairs(c) - pairs)))
        if not _pairs(best) - pairs:
            break
        chosen.append(best)
        values |= _values(best)
        pairs |= _pairs(best)
    return sorted(chosen, key=lambda layout: layout.world)


def _values(layout: Layout) -> set[tuple]:
    """(axis, value) of a layout. How ranks are divided counts as one axis: EP 2 of 2 is not EP 2 of 4.

    So does the corner where most errors live: experts cut over ranks, several copies of each slice, their gradients
    sharded by ZeRO beside DeepSpeed's, and several micro-batches.
    """
    cut_and_copied = 1 < layout.expert < layout.world
    corner = cut_and_copied and layout.stage >= 2 and layout.accumulation > 1 and layout.precision == "fp32"
    return {(axis, getattr(layout, axis)) for axis in AXES} | {
        ("division", layout.world, layout.expert),
        ("corner", corner),
    }


def _pairs(layout: Layout) -> set[tuple]:
    return set(itertools.combinations(sorted(_values(layout), key=str), 2))


def _splits(per_rank: int) -> list[tuple[Literal["whole", "single", "between"], int]]:
    """Micro-batch sizes of a rank that has `per_rank` sequences a step."""
    found: list[tuple[Literal["whole", "single", "between"], int]] = [("whole", per_rank)]
    if per_rank > 1:
        found.append(("single", 1))
    between = [size for size in _divisors(per_rank) if 1 < size < per_rank]
    if between:
        found.append(("between", between[len(between) // 2]))
    return found


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
