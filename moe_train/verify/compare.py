"""A layout's records against the truth: worst error per quantity, what failed first, and why it may have.

Errors of tensors are relative to the largest element of the logical tensor's reference, of numbers to the number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moe_train.verify.cause import explain_norm, explain_ratio
from moe_train.verify.grid import Layout
from moe_train.verify.record import Piece, RankRecord, StepRecord, Truth

QUANTITIES = (
    *("initial weights", "logits", "loss", "auxiliary loss", "z-loss", "counts", "rows", "gradient"),
    *("gradient norm", "clip factor", "bias", "parameters", "weights in use"),
)
"""In the order in which a step makes them: the first that differs is nearest to the cause."""

TENSORS = ("initial weights", "gradient", "parameters", "weights in use")
"""Those that are compared tensor by tensor."""

EXACT = {"initial weights": 0.0, "counts": 0.0, "rows": 0.0}
"""The same bits wherever they are drawn; whole numbers."""
BOUNDS: dict[str, dict[str, float]] = {
    # rounding is 1e-16, sums have at most 1e4 terms; nothing that is really wrong is smaller than 1e-6
    "fp64": {**dict.fromkeys(QUANTITIES, 1e-10), **EXACT},
    "fp32": {
        **EXACT,
        **dict.fromkeys(("loss", "auxiliary loss", "z-loss", "bias"), 2e-6),  # rounding 6e-8, three steps of feedback
        "logits": 5e-6,  # of single elements, against the largest
        **dict.fromkeys(("gradient norm", "clip factor"), 5e-6),  # the same, through a backward
        "gradient": 2e-5,  # of single elements: sums over tokens of terms that nearly cancel
        # of the update: Adam divides each element by its own size, but not its rounding
        **dict.fromkeys(("parameters", "weights in use"), 1e-3),
    },
    # rounding 4e-3, against the float64 reference. Parameters are left out: of an element whose gradient is rounding
    # AdamW makes a whole step either way; what they would show, the next step's loss and gradient norm show too
    "bf16": {
        **{"counts": 0.0, "rows": 0.0},
        "bias": 2e-6,
        "initial weights": 8e-3,  # DeepSpeed takes its float32 masters from the bf16 weights
        **dict.fromkeys(("loss", "auxiliary loss", "z-loss"), 1e-2),
        **dict.fromkeys(("gradient norm", "clip factor"), 7.5e-2),
        **dict.fromkeys(("logits", "gradient"), 2e-1),
    },
}
"""Largest error by precision and quantity: in fp32 about ten times what correct layouts show, and at most a tenth of
what the errors planted by tests/verify/test_mutations.py show; in bf16 about three times."""

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

    @property
    def badness(self) -> float:
        """To find the worst one: in units of the bound; what must be exact, and a NaN, are worse than anything."""
        if not np.isfinite(self.error):
            return np.inf
        return self.error / self.bound if self.bound else self.error * 1e12


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """worst: per quantity. first: of all failures the earliest, None if all passed. scope: how many expert and dense
    tensors fail like it, if it is about tensors."""

    worst: dict[str, Finding] = field(default_factory=dict)
    first: Finding | None = None
    scope: str = ""


def compare(truth: Truth, ranks: list[RankRecord], layout: Layout) -> Comparison:
    """Every quantity of every rank; failures are explained where a constant factor explains them."""
    findings = [*_numbers(truth, ranks, layout), *_tensors(truth, ranks, layout)]
    worst: dict[str, Finding] = {}
    for finding in findings:
        known = worst.get(finding.quantity)
        if known is None or finding.badness > known.badness:
            worst[finding.quantity] = finding
    failed = [finding for finding in findings if not finding.passed]
    first = min(failed, key=lambda f: (f.step, QUANTITIES.index(f.quantity), -f.badness), default=None)
    return Comparison(
        worst={name: worst[name] for name in QUANTITIES if name in worst},
        first=first,
        scope=_scope(first, findings, truth.is_expert) if first else "",
    )


def _scope(first: Finding, findings: list[Finding], experts: frozenset[str]) -> str:
    """Which tensors share the first failure: all experts and nothing else, say."""
    alike = [f for f in findings if (f.quantity, f.step) == (first.quantity, first.step)]
    if first.quantity not in TENSORS:
        return ""
    failed = {finding.parameter for finding in alike if not finding.passed}
    parts = []
    for words, wanted in (("expert", True), ("dense", False)):
        mine = {f.parameter for f in alike if (f.parameter.partition("[")[0] in experts) == wanted}
        parts.append(f"{len(failed & mine)} of {len(mine)} {words}")
    return f"in {' and '.join(parts)} tensors"


def _numbers(truth: Truth, ranks: list[RankRecord], layout: Layout) -> Iterator[Finding]:
    bounds = BOUNDS[layout.precision]
    if truth.bias_of_scores:  # differences of scores, seldom large against their rounding
        bounds = bounds | {"bias": bounds["gradient"]}
    squares = {True: 0.0, False: 0.0}
    for name, gradient in truth.gradient.items():
        squares[name in truth.is_expert] += float(np.square(gradient).sum())
    for rank, record in enumerate(ranks):
        yield from _logits(truth, rank, record, bounds["logits"], layout)
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


def _logits(truth: Truth, rank: int, record: RankRecord, bound: float, layout: Layout) -> Iterator[Finding]:
    """Of every sequence that a rank has computed in the first step."""
    scale = float(np.abs(truth.logits).max())
    for sequence, found in record.logits.items():
        expected = truth.logits[sequence]
        error = float(np.abs(found - expected).max()) / scale if found.shape == expected.shape else np.inf
        cause = "" if error <= bound else explain_ratio(found, expected, layout, 1.0)
        yield Finding(
            quantity="logits", step=1, parameter=f"rank {rank}, sequence {sequence}", error=error, bound=bound,
            cause=cause,
        )  # fmt: skip


def _of_step(found: StepRecord, expected: StepRecord) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    both = np.stack([found.counts_LE, expected.counts_LE])
    rows = [("rows", "rows_LE")] if (np.stack([found.rows_LE, expected.rows_LE]) != both).any() else []
    for quantity, name in (
        ("loss", "loss"),
        ("auxiliary loss", "aux_loss"),
        ("z-loss", "z_loss"),
        ("counts", "counts_LE"),
        *rows,  # where something was dropped
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
        if quantity not in BOUNDS[layout.precision]:
            continue
        mine = [piece for piece in pieces if piece.kind == kind]
        bound = BOUNDS[layout.precision][quantity]
        wrong = partial(Finding, quantity=quantity, step=step, error=np.inf, bound=bound)
        fitting = [piece for piece in mine if _fits(piece, reference, truth.is_expert)]
        yield from (
            wrong(parameter=piece.label, cause="the stock model has no such elements")
            for piece in mine
            if not _fits(piece, reference, truth.is_expert)
        )
        if kind != "forward":  # there every rank speaks for what it holds
            for parameter, cause in _not_held_once(fitting, reference, truth.is_expert):
                yield wrong(parameter=parameter, cause=cause)
        for piece in fitting:
            base = truth.initial if reference is updates else None
            actual, expected, scale = _aligned(piece, reference, base)
            error = float(np.abs(actual - expected).max(initial=0.0)) / max(scale, floor)
            cause = "" if error <= bound else explain_ratio(actual, expected, layout, factor)
            yield Finding(
                quantity=quantity, step=step, parameter=piece.label, error=error, bound=bound, cause=cause
            )  # fmt: skip


def _fits(piece: Piece, reference: dict[str, np.ndarray], experts: frozenset[str]) -> bool:
    """The piece is about elements that the stock model has, under the same name."""
    if piece.name not in reference or (piece.expert is not None) != (piece.name in experts):
        return False
    whole = reference[piece.name]
    if piece.expert is not None:
        if not 0 <= piece.expert < len(whole):
            return False
        whole = whole[piece.expert]
    return piece.fits(whole.size)


def _aligned(
    piece: Piece, reference: dict[str, np.ndarray], base: dict[str, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """(values, less the initial ones if `base` is given; their reference; largest element of the whole reference)."""

    def part(tensors: dict[str, np.ndarray]) -> np.ndarray:
        whole = tensors[piece.name] if piece.expert is None else tensors[piece.name][piece.expert]
        return whole.reshape(-1)

    whole = part(reference)
    chosen = piece.places
    actual = piece.values.astype(np.float64)
    if base is not None:
        actual = actual - part(base)[chosen]
    return actual, whole[chosen], float(np.abs(whole).max())


def _not_held_once(
    pieces: Iterable[Piece], reference: dict[str, np.ndarray], experts: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """(parameter, what is wrong): the owners' pieces must hold every logical element once."""
    held = {
        (name, expert): np.zeros(array.size if expert is None else array[0].size, np.int64)
        for name, array in reference.items()
        for expert in (range(len(array)) if name in experts else (None,))
    }
    for piece in pieces:
        if piece.owner:
            np.add.at(held[piece.name, piece.expert], piece.places, 1)  # pyright: ignore[reportArgumentType] - or a slice
    for (name, expert), times in held.items():
        if (times != 1).any():
            yield (
                name if expert is None else f"{name}[{expert}]",
                f"of {times.size} elements all ranks' optimizers together hold {(times == 0).sum()} nowhere and "
                f"{(times > 1).sum()} more than once",
            )
