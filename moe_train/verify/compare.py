"""A layout's records against the truth: worst error per quantity, what failed first, and why it may have.

Errors are relative to the reference. Of tensors: the largest error of an element against the largest element. In bf16
root mean squares instead, which hardly change from one way of rounding to another; the largest of many roundings does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np

from moe_train.verify.bounds import QUANTITIES, TENSORS, Bounds, ConstantBounds
from moe_train.verify.cause import explain_norm, explain_ratio
from moe_train.verify.grid import Layout
from moe_train.verify.record import Piece, RankRecord, StepRecord, Truth

GRADIENT_FLOOR = 1e-3
"""Share of the model's largest gradient element below which a tensor's own scale is not used: some gradients are zero
but for rounding, as of a key's bias, which softmax cancels."""
TINY = 1e-30


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


def compare(truth: Truth, ranks: list[RankRecord], layout: Layout, bounds: Bounds | None = None) -> Comparison:
    """Every quantity of every rank; failures are explained where a constant factor explains them.

    Args:
        bounds: default: the constants of a layout's precision; bf16 has none.
    """
    findings = find_all(truth, ranks, layout, bounds or ConstantBounds(layout.precision))
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


def find_all(truth: Truth, ranks: list[RankRecord], layout: Layout, bounds: Bounds) -> list[Finding]:
    return [*_numbers(truth, ranks, layout, bounds), *_tensors(truth, ranks, layout, bounds)]


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


def _numbers(truth: Truth, ranks: list[RankRecord], layout: Layout, bounds: Bounds) -> Iterator[Finding]:
    squares = {True: 0.0, False: 0.0}
    for name, gradient in truth.gradient.items():
        squares[name in truth.is_expert] += float(np.square(gradient).sum())
    yield from _choices(ranks, bounds)
    for rank, record in enumerate(ranks):
        # in bf16 losses hide what logits show; a float32 step's rounding becomes another step, and there losses show it
        kept = record.logits if layout.precision == "bf16" else record.logits[:1]
        for step, by_sequence in enumerate(kept, 1):
            bound = bounds.bound("logits", f"step {step}")
            yield from _logits(truth.logits[step - 1], by_sequence, rank, step, bound, layout)
        for step, (found, expected) in enumerate(zip(record.steps, truth.steps, strict=True), 1):
            for quantity, actual, reference in _of_step(found, expected):
                if not actual.any() and not reference.any():
                    continue  # the recipe has no such loss or bias
                bound = bounds.bound(quantity)
                if quantity == "bias" and truth.bias_of_scores:  # differences of scores, seldom large against rounding
                    bound += bounds.bound("gradient")
                scale = max(float(np.abs(reference).max(initial=0.0)), TINY)
                error = float(np.abs(actual - reference).max(initial=0.0)) / scale
                cause = ""
                if not error <= bound:
                    cause = explain_ratio(actual, reference, layout, found.clip_factor)
                    if quantity == "gradient norm" and step == 1:
                        cause = explain_norm(float(actual), squares[False], squares[True], layout) or cause
                yield Finding(
                    quantity=quantity,
                    step=step,
                    parameter="" if rank == 0 else f"rank {rank}",
                    error=error,
                    bound=bound,
                    cause=cause,
                )


def _choices(ranks: list[RankRecord], bounds: Bounds) -> Iterator[Finding]:
    """Of a layout that was told the reference's choice: the share that its own routers would have chosen otherwise.

    bf16 turns near ties round, as many as in a plain run; a router that chooses by other numbers strays at many tokens.
    """
    for step, by_rank in enumerate(zip(*(record.choices for record in ranks), strict=True), 1):
        strayed, told = (sum(parts) for parts in zip(*by_rank, strict=True))
        error, bound = strayed / max(told, 1), bounds.bound("choices")
        cause = "" if error <= bound else f"own routers would send {strayed} of {told} rows elsewhere"
        yield Finding(quantity="choices", step=step, parameter="", error=error, bound=bound, cause=cause)


def _logits(
    truth_BSV: np.ndarray, by_sequence: dict[int, np.ndarray], rank: int, step: int, bound: float, layout: Layout
) -> Iterator[Finding]:
    """Of every sequence that a rank has computed in a step."""
    size = _rms if layout.precision == "bf16" else _largest
    scale = size(truth_BSV)
    for sequence, found in by_sequence.items():
        expected = truth_BSV[sequence]
        error = size(found - expected) / scale if found.shape == expected.shape else np.inf
        cause = "" if error <= bound else explain_ratio(found, expected, layout, 1.0)
        parameter = f"rank {rank}, sequence {sequence}"
        yield Finding(
            quantity="logits", step=step, parameter=parameter, error=error, bound=bound, cause=cause
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


def _tensors(truth: Truth, ranks: list[RankRecord], layout: Layout, bounds: Bounds) -> Iterator[Finding]:
    pieces = [piece for record in ranks for piece in record.pieces]
    updates = {name: truth.updated[name] - truth.initial[name] for name in truth.initial}
    largest = max(_largest(gradient) for gradient in truth.gradient.values())
    factor = ranks[0].steps[0].clip_factor
    for quantity, kind, step, reference, floor in (
        ("initial weights", "initial", 0, truth.initial, TINY),
        ("gradient", "gradient", 1, truth.gradient, largest * GRADIENT_FLOOR),
        ("parameters", "updated", len(truth.steps), updates, TINY),
        ("weights in use", "forward", len(truth.steps), updates, TINY),
    ):
        mine = [piece for piece in pieces if piece.kind == kind]
        fitting = [piece for piece in mine if _fits(piece, reference, truth.is_expert)]
        wrong = partial(Finding, quantity=quantity, step=step, error=np.inf, bound=bounds.bound(quantity))
        for piece in mine:
            if not _fits(piece, reference, truth.is_expert):
                yield wrong(parameter=piece.label, cause="the stock model has no such elements")
        if kind != "forward":  # there every rank speaks for what it holds
            for parameter, cause in _not_held_once(fitting, reference, truth.is_expert):
                yield wrong(parameter=parameter, cause=cause)
        base = truth.initial if reference is updates else None
        for actual, expected, whole, parameter in _compared(fitting, reference, base, layout):
            size = _rms if layout.precision == "bf16" else _largest
            error = size(actual - expected) / max(size(whole), floor)
            bound = bounds.bound(quantity, parameter, whole.size)
            cause = "" if error <= bound else explain_ratio(actual, expected, layout, factor)
            yield Finding(quantity=quantity, step=step, parameter=parameter, error=error, bound=bound, cause=cause)


def gradient_error(truth: Truth, ranks: list[RankRecord], layout: Layout) -> float:
    """Of the first step's whole gradient, as far as a process has it: L2 norm of the error, relative."""
    pieces = [piece for record in ranks for piece in record.pieces if piece.kind == "gradient"]
    pieces = [piece for piece in pieces if _fits(piece, truth.gradient, truth.is_expert)]
    parts = [(actual - expected, expected) for actual, expected, *_ in _compared(pieces, truth.gradient, None, layout)]
    error, whole = (sum(float(np.square(part).sum()) for part in side) for side in zip(*parts, strict=True))
    return float(np.sqrt(error / whole))


def _compared(
    pieces: list[Piece], reference: dict[str, np.ndarray], base: dict[str, np.ndarray] | None, layout: Layout
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """(values, their reference, the whole logical tensor's, its label): of each piece; in bf16 of all pieces of a
    tensor on all ranks together, for a mean over the few elements of a piece is no mean."""
    parts = [(*_aligned(piece, reference, base), piece.label) for piece in pieces]
    if layout.precision != "bf16":
        yield from parts
        return
    for label, alike in groupby(sorted(parts, key=lambda part: part[-1]), key=lambda part: part[-1]):
        actual, expected, wholes, _ = zip(*alike, strict=True)
        yield np.concatenate(actual), np.concatenate(expected), wholes[0], label


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, less the initial ones if `base` is given; their reference; the whole reference)."""

    def part(tensors: dict[str, np.ndarray]) -> np.ndarray:
        whole = tensors[piece.name] if piece.expert is None else tensors[piece.name][piece.expert]
        return whole.reshape(-1)

    whole = part(reference)
    chosen = piece.places
    actual = piece.values.astype(np.float64)
    if base is not None:
        actual = actual - part(base)[chosen]
    return actual, whole[chosen], whole


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
