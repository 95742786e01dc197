"""Figures of planted sums, against arithmetic done by hand."""

import math

import numpy as np
import pytest

from moe_train.diagnostics.routing_files import RoutingFiles, saturation
from moe_train.diagnostics.step_figures import coactivation, rank_figures, router_figures, step_summary


def rows(received, ms, **others):
    """[L, W] arrays of one layer; peak, sent, saved are zeros unless given, the timed rows are those received."""
    tables = {"received": received, "ms": ms, "timed_rows": received, "peak": 0, **others}
    tables = {"sent": 0, "returned": 0, "saved": 0, **tables}
    return {name: np.broadcast_to(np.asarray(table, float), (1, len(received))) for name, table in tables.items()}


def test_router_figures_are_means_over_tokens():
    sums = {
        "tokens": [4, 0],
        "top_share": [2, 0],
        "chosen_share": [3, 0],
        "logit_square": [36, 0],
        "logsumexp": [-6, 0],
    }
    figures = router_figures({name: np.array(values, float) for name, values in sums.items()})
    assert {name: values[0] for name, values in figures.items()} == {
        "confidence": 0.5, "topk_mass": 0.75, "logit_rms": 3.0, "logsumexp": -1.5,
    }  # fmt: skip
    assert all(np.isnan(values[1]) for values in figures.values())


def test_time_lost_is_that_of_the_slowest_rank_times_its_excess():
    """Two EP groups: ranks 0, 1 with rows 30, 10 and ranks 2, 3 with 20, 20."""
    figures = rank_figures(rows([30, 10, 20, 20], [6, 3, 50, 40]), np.array([80]), [[0, 1], [2, 3]])
    # mean / max is 2 / 3: a third of 6 ms on average, two thirds of them on rank 1; the even group loses nothing
    assert figures.lost_L == pytest.approx([2.0])
    assert figures.lost_LW == pytest.approx(np.array([[0.0, 4.0, 0.0, 0.0]]))


def test_time_and_rows_are_of_the_same_step():
    """Rows of the timed step decide, not those of the step that is logged."""
    figures = rank_figures(rows([10, 10], [8, 8], timed_rows=[30, 10]), np.array([20]), [[0, 1]])
    assert figures.lost_L == pytest.approx([8 * (1 - 20 / 30)])


def test_without_times_or_rows_nothing_is_lost():
    empty = rank_figures(rows([0, 0], [0, 0]), np.array([0]), [[0, 1]])
    for values in (empty.lost_L, empty.lost_LW, empty.peak_L, empty.drop_rate_L):
        assert not values.any()
    # rows of an idle rank count as its part of the mean
    assert rank_figures(rows([0, 9], [0, 5]), np.array([9]), [[0, 1]]).lost_LW == pytest.approx(np.array([[5.0, 0.0]]))


def test_peak_is_over_what_balance_would_give():
    """Three micro-batches, 60 rows on two ranks: 10 each at balance, and one rank had 25 at once."""
    figures = rank_figures(rows([40, 20], [0, 0], peak=[25, 12]), np.array([60]), [[0, 1]], micro_batches=3)
    assert figures.peak_L == pytest.approx([2.5])


def test_ranks_of_the_shared_expert_are_no_part_of_the_balance():
    values = rows([99, 30, 10], [70, 6, 3], peak=[99, 30, 10])
    figures = rank_figures(values, np.array([40]), [[0, 1, 2]], shared_ranks=1)
    assert figures.lost_LW == pytest.approx(np.array([[0.0, 0.0, 4.0]]))
    assert (figures.peak_L, figures.drop_rate_L) == (pytest.approx([1.5]), pytest.approx([0.0]))


def test_choices_that_reached_no_expert():
    assert rank_figures(rows([30, 15], [0, 0]), np.array([60]), [[0, 1]]).drop_rate_L == pytest.approx([0.25])
    halves = rank_figures(rows([60, 60], [0, 0]), np.array([60]), [[0], [1]], copies=2)
    assert halves.drop_rate_L == pytest.approx([0.0])


def test_bytes_are_rows_times_their_crossings():
    figures = rank_figures(
        rows([5, 5], [0, 0], sent=[3, 4], returned=[4, 3], saved=[1, 2]),
        np.array([10]),
        [[0, 1]],
        row_bytes=(110, 90),
    )
    assert figures.sent_LW.tolist() == [[3 * 110 + 4 * 90, 4 * 110 + 3 * 90]]
    summary = step_summary(np.array([[5, 5]]), {}, figures)
    assert (summary["perf/wire_mb"], summary["perf/wire_spared_mb"]) == (700e-6, 300e-6)


def test_summary_takes_the_worst_layer_or_the_mean():
    counts = np.array([[3, 1], [2, 2], [0, 0]])
    ranks = rank_figures({k: np.zeros((3, 1)) for k in rows([0], [0])}, np.zeros(3), [[0]])
    summary = step_summary(counts, {"confidence": np.array([0.2, 0.4, np.nan]), "logit_rms": np.full(3, np.nan)}, ranks)
    assert summary["moe/max_vio_batch"] == 0.5
    assert summary["moe/max_vio_batch_mean"] == 0.25
    assert summary["moe/confidence"] == pytest.approx(0.3)
    assert "moe/logit_rms" not in summary
    assert not [key for key in summary if key.startswith("perf/")], "one rank sends nothing"


def test_coactivation_is_conditional():
    pairs = np.array([[[4, 1, 3], [1, 1, 0], [3, 0, 3]], np.zeros((3, 3))])
    assert coactivation(pairs)[0].tolist() == [[1, 0.25, 0.75], [1, 1, 0], [1, 0, 1]]
    assert not coactivation(pairs)[1].any()


# ---- saturation


def test_saturation_is_the_overlap_of_sets():
    generator = np.random.default_rng(0)
    draws = [[[generator.permutation(8)[:3] for _ in range(50)] for _ in range(2)] for _ in range(2)]
    earlier, later = np.array(draws[0]), np.array(draws[1])
    expected = [
        sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(earlier[layer], later[layer], strict=True)) / 150
        for layer in range(2)
    ]
    assert saturation(earlier, later) == pytest.approx(expected)
    assert saturation(earlier, earlier[..., ::-1]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="not of the same tokens"):
        saturation(earlier, later[:, :-1])


def test_routing_files_compare_with_the_one_before_and_the_last(tmp_path):
    files = RoutingFiles(tmp_path)
    first, second, third = np.array([[[0, 1]]]), np.array([[[1, 2]]]), np.array([[[2, 1]]])
    assert files.since_previous(0, first) is None
    for step, ids in ((0, first), (20, second)):
        files.save(step, ids)
    assert files.since_previous(100, third) == pytest.approx([1.0])
    assert files.since_previous(20, third) == pytest.approx([0.5]), "not against itself"
    files.save(100, third)
    assert [(step, float(found[0])) for step, found in files.against_last()] == [(0, 0.5), (20, 1.0), (100, 1.0)]


def test_a_resumed_run_forgets_what_came_later(tmp_path):
    files = RoutingFiles(tmp_path)
    for step in (0, 20, 100):
        files.save(step, np.zeros((1, 1, 1), int))
    files.rewind(20)
    assert files.steps() == [0, 20]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", b"not at all"])
def test_a_damaged_file_is_passed_over(tmp_path, damage):
    files = RoutingFiles(tmp_path)
    files.save(10, np.zeros((1, 4, 2), int))
    (tmp_path / "routing" / "step_00000010.npz").write_bytes(damage)
    assert files.load(10) is None
    assert files.since_previous(20, np.zeros((1, 4, 2), int)) is None
    assert files.against_last() == []


def test_other_tokens_are_not_compared(tmp_path):
    files = RoutingFiles(tmp_path)
    files.save(10, np.zeros((1, 4, 2), int))
    assert files.since_previous(20, np.zeros((1, 5, 2), int)) is None
    assert math.isclose(files.since_previous(20, np.zeros((1, 4, 2), int))[0], 1.0)
