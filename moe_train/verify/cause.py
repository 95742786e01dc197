"""Guesses at why a quantity differs: constant factors that are the size of some group, parts left out of a norm."""

import math

import numpy as np

from moe_train.verify.grid import Layout

NEAR = 1e-3
"""Relative distance within which a ratio is taken for a named one."""
NEAR_IN_BF16 = 0.1
"""The same among numbers that carry bf16's rounding."""


def named_factors(layout: Layout, clip_factor: float) -> dict[str, float]:
    """What a wrong factor usually is, by name; 1 is left out."""
    sizes = {
        "ep": layout.expert,
        "tp": layout.tensor,
        "expert tp": layout.expert_tensor,
        "dp": layout.data if layout.tensor > 1 else 1,  # else it is the world
        "world": layout.world,
        "expert copies": layout.expert_data if layout.expert_tensor > 1 else 1,
        "world / ep": layout.world // layout.expert,
        "accumulation": layout.accumulation,
        "micro-batch size": layout.micro_size,
        "world x accumulation": layout.world * layout.accumulation,
        "1 / clip factor": 1 / clip_factor if clip_factor else 1,
        "2": 2,
    }
    both = {**sizes, **{_inverse(name): 1 / size for name, size in sizes.items()}}
    return {name: value for name, value in both.items() if not math.isclose(value, 1)}


def _inverse(name: str) -> str:
    return name.removeprefix("1 / ") if name.startswith("1 / ") else f"1 / ({name})" if " " in name else f"1 / {name}"


def explain_ratio(actual: np.ndarray, expected: np.ndarray, layout: Layout, clip_factor: float) -> str:
    """One sentence: a constant factor between the two, named where it has a name."""
    actual, expected = np.asarray(actual, np.float64).reshape(-1), np.asarray(expected, np.float64).reshape(-1)
    if actual.shape != expected.shape:
        return f"{actual.size} values instead of {expected.size}"
    if not np.isfinite(actual).all():
        return "not finite"
    square = float(expected @ expected)
    if not square:
        return "should be zero"
    if not actual.any():
        return "zero: nothing arrives here"
    ratio, near = float(actual @ expected) / square, NEAR_IN_BF16 if layout.precision == "bf16" else NEAR
    if np.abs(actual - ratio * expected).max() > near * max(ratio, 1) * np.abs(expected).max():
        return "no constant factor: other values"
    factors = named_factors(layout, clip_factor).items()
    names = [name for name, value in factors if math.isclose(ratio, value, rel_tol=near)]
    if expected.size == 1 and not names:
        return f"{actual[0]:.8g} instead of {expected[0]:.8g}"
    return f"{ratio:.6g} x what it should be" + (f" = {' = '.join(names)}" if names else "")


def explain_norm(norm: float, dense: float, expert: float, layout: Layout) -> str:
    """Which squares were added up wrongly. `dense`, `expert`: the true sums of squares of the first step."""
    if math.isclose(norm, math.sqrt(dense), rel_tol=NEAR):
        return "the norm of the dense parameters alone: experts are left out"
    if math.isclose(norm, math.sqrt(expert), rel_tol=NEAR):
        return "the norm of the experts alone: dense parameters are left out"
    sizes = {
        "world / ep": layout.world // layout.expert,
        "world": layout.world,
        "ep": layout.expert,
        "tp": layout.tensor,
        "expert tp": layout.expert_tensor,
    }
    for name, size in sizes.items():
        if size == 1:
            continue
        for times, which, total in (
            (size, "experts", dense + size * expert),
            (1 / size, "experts", dense + expert / size),
            (size, "dense parameters", size * dense + expert),
        ):
            if math.isclose(norm, math.sqrt(total), rel_tol=NEAR):
                return f"squares of the {which} are counted {times:.3g} times ({name} = {size})"
    return ""
