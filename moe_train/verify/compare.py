"""A layout's records against the truth: worst error per quantity, what failed first, and why it may have.

Errors of tensors are relative to the largest element of the logical tensor's reference, of numbers to the number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moe_train.verify.cause import explain_norm, explain_ratio
from moe_train.verify.grid import Layout
from moe_train.verify.record import Piece, RankRecord, StepRecord, Truth

QUANTITIES = (
    *("initial weights", "loss", "auxiliary loss", "z-loss", "counts", "gradient", "gradient norm", "clip factor"),
    *("bias", "parameters", "weights in use"),
)
"""In the order in which a step makes them: the first that differs is nearest to the cause."""

BOUNDS: dict[str, dict[str, float]] = {
    "fp64": {
        # rounding is 1e-16 and sums have at most 1e4 terms; the rest is distance to the smallest real error, about 1e-6
        **dict.fromkeys(QUANTITIES, 1e-10),
        # Adam divides a gradient by its own size: elements near zero keep their absolute error, not their relative one
        **dict.fromkeys(("parameters", "weights in use"), 1e-8),
        "initial weights": 0.0,  # the same bits, wherever they are drawn
        "counts": 0.0,  # whole numbers
        "bias": 1e-10,
    },
    "fp32": {
        "initial weights": 0.0,
        "counts": 0.0,
        **dict.fromkeys(("loss", "auxiliary loss", "z-loss"), 2e-6),  # rounding 6e-8, three steps of feedback
        **dict.fromkeys(("gradient norm", "clip factor"), 5e-6),  # an average over all elements of what is next
        "gradient": 5e-5,  # single elements: sums over tokens of terms that nearly cancel
        "bias": 2e-6,  # three additions of the same rate
        **dict.fromkeys(
            ("parameters", "weights in use"), 2e-3
        ),  # of the update, in units of a tensor's largest; as above
    },
}
"""Largest error by precision. The smallest planted error is at least ten times the bound of a quantity that shows it
(tests/verify/test_mutations.py)."""

GRADIENT_FLOOR = 1e-3
"""Share of the model's largest gradient element below which a tensor's own scale is not used: some gradients are zero
but for rounding, as of a key's bias, which softmax cancels."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One error. step: 1-based, 0 for before the first. error, bound: relative. cause: only if it failed."""

    quantity: str
    step: int
    parameter: str
    error: float
    bound: float
    cause: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # a NaN fails


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """worst: per quantity. first: of all failures the earliest, None if all passed."""

    worst: dict[str, Finding] = field(default_factory=dict)
    first: Finding | None = None


def compare(truth: Truth, ranks: list[RankRecord], layout: Layout) -> Comparison:
    """Every quantity of every rank; failures are explained where a constant factor explains them."""
    findings = [*_numbers(truth, ranks, layout), *_tensors(truth, ranks, layout)]
    worst: dict[str, Finding] = {}
    for finding in findings:
        known = worst.get(finding.quantity)
        if known is None or _badness(finding) > _badness(known):
            worst[finding.quantity] = finding
    failed = [finding for finding in findings if not finding.passed]
    first = min(failed, key=lambda f: (f.step, QUANTITIES.index(f.quantity), -_badness(f)), default=None)
    return Comparison(worst={name: worst[name] for name in QUANTITIES if name in worst}, first=first)


def _badness(finding: Finding) -> float:
    if not np.isfinite(finding.error):
        return np.inf
    return finding.error / finding.bound if finding.bound else finding.error * 1e12


def _numbers(truth: Truth, ranks: list[RankRecord], layout: Layout) -> Iterator[Finding]:
    bounds = BOUNDS[layout.precision]
    squares = {True: 0.0, False: 0.0}
    for name, gradient in truth.gradient.items():
        squares[name in truth.is_expert] += float(np.square(gradient).sum())
    for rank, record in enumerate(ranks):
        for step, (found, expected) in enumerate(zip(record.steps, truth.steps, strict=True), 1):
            for quantity, actual, reference in _of_step(found, expected):
                if not actual.any() and not reference.any():
                    continue  # the recipe has no such loss or bias
                scale = max(float(np.abs(reference).max(initial=0.0)), 1e-30)
                error = float(np.abs(actual - reference).max(initial=0.0)) / scale
                cause = ""
                if not error <= bounds[quantity]:
                    cause = explain_ratio(actual, reference, layout, found.clip_factor)
                    if quantity == "gradient norm" and step == 1:
                        cause = explain_norm(float(actual), squares[False], squares[True], layout) or cause
                yield Finding(
                    quantity=quantity,
                    step=step,
                    parameter="" if rank == 0 else f"rank {rank}",
                    error=error,
                    bound=bounds[quantity],
                    cause=cause,
                )


def _of_step(found: StepRecord, expected: StepRecord) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for quantity, name in (
        ("loss", "loss"),
        ("auxiliary loss", "aux_loss"),
        ("z-loss", "z_loss"),
        ("counts", "counts_LE"),
        ("gradient norm", "grad_norm"),
        ("clip factor", "clip_factor"),
        ("bias", "bias_LE"),
    ):
        yield quantity, np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))


def _tensors(truth: Truth, ranks: list[RankRecord], layout: Layout) -> Iterator[Finding]:
    pieces = [piece for record in ranks for piece in record.pieces]
    updates = {name: truth.updated[name] - truth.initial[name] for name in truth.initial}
    largest = max(float(np.abs(g).max()) for g in truth.gradient.values())
    factor = ranks[0].steps[0].clip_factor
    for quantity, kind, step, reference, floor in (
        ("initial weights", "initial", 0, truth.initial, 1e-30),
        ("gradient", "gradient", 1, truth.gradient, largest * GRADIENT_FLOOR),
        ("parameters", "updated", len(truth.steps), updates, 1e-30),
        ("weights in use", "forward", len(truth.steps), updates, 1e-30),
    ):
        mine = [piece for piece in pieces if piece.kind == kind]
        bound = BOUNDS[layout.precision][quantity]
        if kind != "forward":  # every rank speaks for what it holds there
            yield from _coverage(quantity, step, bound, mine, reference, truth.is_expert)
        for piece in mine:
            if piece.name not in reference:
                yield Finding(
                    quantity=quantity, step=step, parameter=piece.label, error=np.inf, bound=bound,
                    cause="the stock model has no parameter of this name",
                )  # fmt: skip
                continue
            base = truth.initial if reference is updates else None
            actual, expected, scale = _aligned(piece, reference, base)
            error = float(np.abs(actual - expected).max(initial=0.0)) / max(scale, floor)
            cause = "" if error <= bound else explain_ratio(actual, expected, layout, factor)
            yield Finding(
                quantity=quantity, step=step, parameter=piece.label, error=error, bound=bound, cause=cause
            )  # fmt: skip


def _aligned(
    piece: Piece, reference: dict[str, np.ndarray], base: dict[str, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """(values, less the initial ones if `base` is given; their reference; largest element of the whole reference)."""

    def part(tensors: dict[str, np.ndarray]) -> np.ndarray:
        whole = tensors[piece.name] if piece.expert is None else tensors[piece.name][piece.expert]
        return whole.reshape(-1)

    whole = part(reference)
    chosen = slice(piece.start, piece.start + piece.values.size)
    actual = piece.values.astype(np.float64)
    if base is not None:
        actual = actual - part(base)[chosen]
    return actual, whole[chosen], float(np.abs(whole).max())


def _coverage(
    quantity: str,
    step: int,
    bound: float,
    pieces: Iterable[Piece],
    reference: dict[str, np.ndarray],
    experts: frozenset[str],
) -> Iterator[Finding]:
    """The owners' pieces must hold every logical element once."""
    wanted = {
        (name, expert): array.size if expert is None else array[0].size
        for name, array in reference.items()
        for expert in (range(len(array)) if name in experts else (None,))
    }
    held = dict.fromkeys(wanted, 0)
    for piece in pieces:
        if piece.owner and (piece.name, piece.expert) in held:
            held[piece.name, piece.expert] += piece.values.size
    for (name, expert), size in wanted.items():
        if held[name, expert] != size:
            yield Finding(
                quantity=quantity,
                step=step,
                parameter=name if expert is None else f"{name}[{expert}]",
                error=np.inf,
                bound=bound,
                cause=f"{held[name, expert]} of {size} elements are held by the optimizers of all ranks together",
            )
