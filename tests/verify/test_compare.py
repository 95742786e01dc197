"""Verdicts on records made by hand: what fails, what it is called, and which cause is named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_train.verify import Layout
from moe_train.verify.bounds import CEILING, TIMES, UNIT, RoundingBounds, Unbounded
from moe_train.verify.cause import explain_norm, explain_ratio
from moe_train.verify.compare import compare, find_all, gradient_error
from moe_train.verify.record import Piece, RankRecord, StepRecord, Truth

LAYOUT = Layout(
    world=4,
    expert=2,
    stage=1,
    split="between",
    micro_size=2,
    accumulation=3,
    recompute=False,
    backend="loop",
    precision="fp32",
)
DENSE, EXPERTS = np.arange(1.0, 7.0).reshape(2, 3), np.arange(1.0, 9.0).reshape(2, 4) / 8
TENSORS = {"norm.weight": DENSE, "experts.down_proj": EXPERTS}
LOGITS = np.arange(12.0).reshape(2, 2, 3)


def step(**changes) -> StepRecord:
    values = {
        "loss": 2.0, "aux_loss": 1.0, "z_loss": 0.0, "grad_norm": 5.0, "clip_factor": 0.02,
        "counts_LE": np.array([[3, 5]]), "rows_LE": np.array([[3, 5]]), "bias_LE": np.zeros((0, 2)),
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


TRUTH = Truth(
    steps=[step()],
    initial=TENSORS,
    gradient=TENSORS,
    updated={name: value - 0.01 * value for name, value in TENSORS.items()},
    logits=LOGITS[None],
    chosen=np.zeros((1, 1, 4, 1), np.int64),
    is_expert=frozenset({"experts.down_proj"}),
    margin=1.0,
)


def pieces(kind: str, tensors: dict[str, np.ndarray]) -> list[Piece]:
    """The dense tensor in two parts, each expert by itself."""
    flat = tensors["norm.weight"].reshape(-1)
    dense = [Piece(kind=kind, name="norm.weight", expert=None, where=s, values=flat[s : s + 3]) for s in (0, 3)]
    rows = enumerate(tensors["experts.down_proj"])
    return [*dense, *(Piece(kind=kind, name="experts.down_proj", expert=e, where=0, values=row) for e, row in rows)]


def right() -> list[Piece]:
    named = {"initial": TRUTH.initial, "gradient": TRUTH.gradient, "updated": TRUTH.updated, "forward": TRUTH.updated}
    return [piece for kind, tensors in named.items() for piece in pieces(kind, tensors)]


def verdict(found: list[Piece] | None = None, **changes):
    return compare(TRUTH, [RankRecord(steps=[step(**changes)], pieces=right() if found is None else found)], LAYOUT)


def test_equal_records_pass():
    result = verdict()
    assert result.first is None
    assert all(finding.error == 0 for finding in result.worst.values())
    assert "z-loss" not in result.worst
    assert "bias" not in result.worst


@pytest.mark.parametrize(
    ("changes", "quantity"),
    [
        ({"loss": 2.00001}, "loss"),
        ({"loss": math.nan}, "loss"),
        ({"z_loss": 0.1}, "z-loss"),
        ({"counts_LE": np.array([[4, 4]])}, "counts"),
        ({"rows_LE": np.array([[4, 2]])}, "rows"),
        ({"grad_norm": math.inf}, "gradient norm"),
        ({"clip_factor": 1.0}, "clip factor"),
        ({"grad_norm": 6.0, "aux_loss": 1.1}, "auxiliary loss"),
    ],
)
def test_the_first_number_that_differs_is_named(changes, quantity):
    assert verdict(**changes).first.quantity == quantity


def test_another_rank_is_held_to_the_same_numbers():
    record = RankRecord(steps=[step()], pieces=right())
    other = RankRecord(steps=[step(loss=2.1)], pieces=[])
    first = compare(TRUTH, [record, other], LAYOUT).first
    assert (first.quantity, first.parameter) == ("loss", "rank 1")


def test_a_missing_a_doubled_and_a_strange_piece_fail():
    without = [p for p in right() if not (p.kind == "gradient" and p.expert == 1)]
    first = verdict(without).first
    assert (first.quantity, first.parameter) == ("gradient", "experts.down_proj[1]")
    assert "hold 4 nowhere and 0 more than once" in first.cause
    twice = [*right(), *[p for p in right() if p.kind == "updated" and p.where == 3]]
    assert "0 nowhere and 3 more than once" in verdict(twice).first.cause
    for changes in (
        {"name": "other"},
        {"where": 5},
        {"where": np.array([0, 1, 6])},
        {"where": np.array([0])},
        {"expert": 0},
    ):
        strange = Piece(**{**vars(right()[0]), **changes})
        assert "no such elements" in verdict([strange, *right()]).first.cause


def test_parts_by_their_places():
    """Columns of a tensor-parallel part: every second element."""
    flat = DENSE.reshape(-1)
    rest = [p for p in right() if not (p.kind == "gradient" and p.name == "norm.weight")]
    halves = [np.arange(start, 6, 2) for start in (0, 1)]
    parts = [Piece(kind="gradient", name="norm.weight", expert=None, where=w, values=flat[w]) for w in halves]
    assert verdict([*rest, *parts]).first is None
    swapped = [Piece(**{**vars(part), "values": other.values}) for part, other in zip(parts, parts[::-1], strict=True)]
    assert verdict([*rest, *swapped]).first.quantity == "gradient"
    assert "3 nowhere" in verdict([*rest, parts[0]]).first.cause


def test_logits_of_every_sequence():
    def first(logits):
        record = RankRecord(steps=[step()], pieces=right(), logits=[logits])
        return compare(TRUTH, [record], LAYOUT).first

    assert first({0: LOGITS[0], 1: LOGITS[1]}) is None
    found = first({1: LOGITS[0]})
    assert (found.quantity, found.parameter) == ("logits", "rank 0, sequence 1")
    assert first({1: LOGITS[1] * 2}).cause.startswith("2 x what it should be")
    assert first({1: LOGITS[1][:1]}).error == np.inf


def test_a_copy_is_compared_and_not_counted():
    piece = next(p for p in right() if p.kind == "updated" and p.expert == 0)
    assert verdict([*right(), Piece(**{**vars(piece), "owner": False})]).first is None
    stale = Piece(**{**vars(piece), "owner": False, "values": EXPERTS[0]})
    result = verdict([*right(), stale])
    assert (result.first.quantity, result.first.cause) == ("parameters", "zero: nothing arrives here")
    assert result.scope == "in 1 of 2 expert and 0 of 1 dense tensors"


# ---- bf16


BF16 = replace(LAYOUT, precision="bf16")


def rounded(found: list[Piece], error: float) -> list[Piece]:
    """Every second element of the dense gradient too large, of a tensor whose elements are 1 to 6."""
    wrong = np.array([error, 0, error])
    return [
        replace(p, values=p.values + wrong) if (p.kind, p.name) == ("gradient", "norm.weight") else p for p in found
    ]


def record_of(pieces: list[Piece], choices=((0, 8),), **changes) -> RankRecord:
    logits = [{0: LOGITS[0], 1: LOGITS[1]}]
    return RankRecord(steps=[step(**changes)], pieces=pieces, logits=logits, choices=list(choices))


def bounds_of(record: RankRecord) -> RoundingBounds:
    gradient = gradient_error(TRUTH, [record], BF16)
    return RoundingBounds.measured(find_all(TRUTH, [record], BF16, Unbounded()), gradient)


def test_bf16_layouts_may_err_a_few_times_as_much_as_the_plain_process_and_a_unit():
    bounds = bounds_of(record_of(rounded(right(), 0.03), loss=2.0002))
    # two thirds of the elements are off by 0.03; the root mean square of 1..6 is 3.894
    error = 0.03 * math.sqrt(2 / 3) / math.sqrt(91 / 6)
    assert bounds.errors["gradient", "norm.weight"] == pytest.approx(error)
    assert bounds.bound("gradient", "norm.weight", 6) == pytest.approx(TIMES * error + UNIT)
    assert bounds.bound("gradient", "experts.down_proj[1]", 4) == UNIT, "each tensor has its own"
    assert bounds.bound("loss") == pytest.approx(TIMES * 1e-4 + UNIT)
    assert bounds.bound("parameters", "norm.weight", 4) == 0.5, "one element of four, a whole step"
    assert bounds.bound("counts") == bounds.bound("rows") == bounds.bound("initial weights", "norm.weight", 6) == 0
    limit = (TIMES * error + UNIT) / math.sqrt(2 / 3) * math.sqrt(91 / 6)
    for wrong, quantity in ((0.95 * limit, None), (1.05 * limit, "gradient")):
        first = compare(TRUTH, [record_of(rounded(right(), wrong))], BF16, bounds).first
        assert (first and first.quantity) == quantity
    first = compare(TRUTH, [record_of(right(), loss=2.01)], BF16, bounds).first
    assert first.quantity == "loss"


def test_a_norm_may_be_as_far_off_as_the_whole_gradient_it_is_of():
    """However near to the truth that of the plain process was."""
    norm = math.sqrt(sum(np.square(gradient).sum() for gradient in TRUTH.gradient.values()))
    whole = 0.1 * math.sqrt(4) / norm  # four elements are off
    bounds = bounds_of(record_of(rounded(right(), 0.1)))
    assert bounds.gradient == pytest.approx(whole)
    assert bounds.bound("gradient norm") == bounds.bound("clip factor") == pytest.approx(whole + UNIT)
    bounds = bounds_of(record_of(rounded(right(), 0.1), grad_norm=TRUTH.steps[0].grad_norm * (1 + whole)))
    assert bounds.bound("gradient norm") == pytest.approx(TIMES * whole + UNIT)
    assert bounds.bound("loss") == UNIT


def test_a_plain_process_that_is_wrong_itself_makes_no_bound_wide():
    bounds = bounds_of(record_of(rounded(right(), 5.0), loss=3.0))
    assert bounds.bound("loss") == CEILING["loss"]
    assert bounds.bound("gradient norm") == CEILING["gradient norm"]
    assert bounds.bound("gradient", "norm.weight", 6) == CEILING["gradient"]


def test_in_bf16_pieces_are_compared_together():
    """A piece of one element, which rounding has hit hard, says nothing; the whole tensor does."""
    bounds = bounds_of(record_of(right()))
    flat = DENSE.reshape(-1)
    rest = [p for p in right() if not (p.kind == "gradient" and p.name == "norm.weight")]
    parts = [
        Piece(kind="gradient", name="norm.weight", expert=None, where=0, values=flat[:1] * 1.02),
        Piece(kind="gradient", name="norm.weight", expert=None, where=1, values=flat[1:]),
    ]
    assert compare(TRUTH, [record_of(rest + parts)], BF16, bounds).first is None
    assert "5 nowhere" in compare(TRUTH, [record_of(rest + parts[:1])], BF16, bounds).first.cause


def test_choices_of_all_ranks_are_compared_with_those_of_the_plain_process():
    bounds = bounds_of(record_of(right(), choices=[(4, 100)]))

    def first(*ranks):
        records = [record_of(right() if not rank else [], choices=[each]) for rank, each in enumerate(ranks)]
        return compare(TRUTH, records, BF16, bounds).first

    # 2.5 * 4 / 100 + 1 / 256 of 200 are 20.8
    assert first((0, 100), (20, 100)) is None
    found = first((0, 100), (21, 100))
    assert (found.quantity, found.step) == ("choices", 1)
    assert found.cause == "own routers would send 21 of 200 rows elsewhere"


@pytest.mark.parametrize(
    ("factor", "named"),
    [
        (2.0, "ep = world / ep = micro-batch size = 2"),
        (3.0, "accumulation"),
        (12, "world x accumulation"),
        (0.25, "1 / world"),
        (1 / 3, "1 / accumulation"),
        (50, "1 / clip factor"),
        (0.02, "clip factor"),
        (1.7, None),
    ],
)
def test_constant_factors_have_names(factor, named):
    found = explain_ratio(DENSE * factor, DENSE, LAYOUT, clip_factor=0.02)
    assert found == f"{factor:.6g} x what it should be" + (f" = {named}" if named else "")


def test_what_is_no_factor_says_so():
    assert explain_ratio(DENSE[::-1], DENSE, LAYOUT, 1.0) == "no constant factor: other values"
    assert explain_ratio(DENSE * 0, DENSE, LAYOUT, 1.0) == "zero: nothing arrives here"
    assert explain_ratio(DENSE * np.nan, DENSE, LAYOUT, 1.0) == "not finite"
    assert explain_ratio(np.array(2.5), np.array(2.0), LAYOUT, 1.0) == "2.5 instead of 2"


def test_norms_are_taken_apart():
    assert "experts are left out" in explain_norm(3.0, 9.0, 16.0, LAYOUT)
    assert "dense parameters are left out" in explain_norm(4.0, 9.0, 16.0, LAYOUT)
    assert "experts are counted 2 times" in explain_norm(math.sqrt(9 + 32), 9.0, 16.0, LAYOUT)
    assert "experts are counted 4 times (world = 4)" in explain_norm(math.sqrt(9 + 64), 9.0, 16.0, LAYOUT)
    assert "dense parameters are counted 4 times" in explain_norm(math.sqrt(36 + 16), 9.0, 16.0, LAYOUT)
    assert explain_norm(77.0, 9.0, 16.0, LAYOUT) == ""
