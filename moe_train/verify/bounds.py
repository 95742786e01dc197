"""How far a layout's numbers may lie from the truth: constants where it computes finely, what bf16 costs elsewhere."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

QUANTITIES = (
    *("initial weights", "logits", "loss", "auxiliary loss", "z-loss", "choices", "counts", "rows", "gradient"),
    *("gradient norm", "clip factor", "bias", "parameters", "weights in use"),
)
"""In the order in which a step makes them: the first that differs is nearest to the cause."""

EXACT = {"counts": 0.0, "rows": 0.0}
"""Whole numbers."""
CONSTANT: dict[str, dict[str, float]] = {
    # rounding is 1e-16, sums have at most 1e4 terms; nothing that is really wrong is smaller than 1e-6
    "fp64": {**dict.fromkeys(QUANTITIES, 1e-10), **EXACT, "initial weights": 0.0},
    "fp32": {
        **EXACT,
        "initial weights": 0.0,  # the same bits wherever they are drawn
        **dict.fromkeys(("loss", "auxiliary loss", "z-loss", "bias"), 2e-6),  # rounding 6e-8, three steps of feedback
        "logits": 5e-6,  # of single elements, against the largest
        **dict.fromkeys(("gradient norm", "clip factor"), 5e-6),  # the same, through a backward
        "gradient": 2e-5,  # of single elements: sums over tokens of terms that nearly cancel
        # of the update: Adam divides each element by its own size, but not its rounding
        **dict.fromkeys(("parameters", "weights in use"), 1e-3),
    },
}
"""Largest error by precision and quantity, of single elements: in fp32 about ten times what correct layouts show, and
at most a tenth of what the errors planted by tests/verify/test_mutations.py show."""

TIMES, UNIT = 2.5, 2.0**-8
"""A bf16 layout may err `TIMES` as much as one plain process in bf16, and a `UNIT` more, the largest error of rounding
one number to bf16: an error may be 0 by luck. 320 right layouts of 17 recipes showed at most 1.9 times (and the unit);
tests/verify/test_mutations.py plants what must be more."""
CEILING = {
    **dict.fromkeys(("loss", "auxiliary loss", "z-loss"), 1e-2),
    **dict.fromkeys(("gradient norm", "clip factor"), 7.5e-2),
    **dict.fromkeys(("choices", "logits", "gradient"), 2e-1),
}
"""However much the plain process errs: if it is wrong itself, nothing passes."""
NO_UNIT = {"initial weights": 0.0, "bias": 2e-6}
"""Their floor: the same rounding of the same numbers, and whole steps of counts that the layout was told."""


STEPPED = ("parameters", "weights in use")
"""Of an element whose gradient is rounding AdamW makes a whole step either way, and which elements these are is luck:
one in each tensor may go another way, which is 1 / sqrt(n) of the root mean square of n."""


class Bounds(Protocol):
    def bound(self, quantity: str, parameter: str = "", size: int = 1) -> float:
        """Largest relative error of a quantity; of one tensor, of `size` elements, or of the logits of a step."""
        ...


@dataclass(frozen=True)
class ConstantBounds:
    """Those of a precision that rounds finely."""

    precision: str

    def bound(self, quantity: str, parameter: str = "", size: int = 1) -> float:
        return CONSTANT[self.precision][quantity]


class Unbounded:
    """Lets everything pass, to measure it."""

    def bound(self, quantity: str, parameter: str = "", size: int = 1) -> float:
        return float("inf")


OF_GRADIENT = ("gradient norm", "clip factor")
"""Numbers that are no further off than the whole gradient is: |norm(g + e) - norm(g)| <= norm(e). Plain runs hit them
by luck, of a gradient that is 2e-2 off; the next layout, whose gradient is no worse, does not. The gradient is the
first step's: later ones are further off, if anything. A norm that is wrong by less than that is not found in bf16, but
in float32 and float64."""


@dataclass(frozen=True)
class RoundingBounds:
    """Of layouts in bf16. errors: the worst that plain runs of one process showed, by quantity and tensor. gradient:
    and of the first step's whole gradient, in the L2 norm.

    The same bits go in, so that a right layout rounds as much, if elsewhere.
    """

    errors: dict[tuple[str, str], float] = field(repr=False)
    gradient: float

    @classmethod
    def measured(cls, findings: Iterable, gradient: float) -> "RoundingBounds":
        errors: dict[tuple[str, str], float] = {}
        for finding in findings:
            key = _key(finding.quantity, f"step {finding.step}" if finding.quantity == "logits" else finding.parameter)
            errors[key] = max(errors.get(key, 0.0), finding.error)
        return cls(errors, gradient)

    def bound(self, quantity: str, parameter: str = "", size: int = 1) -> float:
        if quantity in EXACT:
            return 0.0
        floor = 1 / sqrt(size) if quantity in STEPPED else NO_UNIT.get(quantity, UNIT)
        measured = TIMES * self.errors.get(_key(quantity, parameter), 0.0)
        allowed = floor + (max(measured, self.gradient) if quantity in OF_GRADIENT else measured)
        return min(allowed, CEILING.get(quantity, float("inf")))


TENSORS = ("initial weights", "gradient", "parameters", "weights in use")
"""Those that are compared tensor by tensor."""


def _key(quantity: str, part: str) -> tuple[str, str]:
    """Tensors by name, logits by step: after one they err many times as much. Else one error for all steps."""
    return quantity, part if quantity in (*TENSORS, "logits") else ""
