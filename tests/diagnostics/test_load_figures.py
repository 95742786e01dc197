"""Load figures against naive loops, and the history against the plain list of what went in."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_train.diagnostics.load import LoadHistory, layer_figures, rank_imbalance, summary

COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.one_of(st.just(0), st.integers(0, 10**6)))
)


def naive_layer(counts):
    """The definitions, one expert at a time."""
    total, experts = sum(counts), len(counts)
    if total == 0:
        return dict.fromkeys(("tokens", "max_vio", "max_over_mean", "cv", "entropy", "dead"), 0.0)
    mean = total / experts
    variance = sum((count - mean) ** 2 for count in counts) / experts
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return {
        "tokens": total,
        "max_vio": (max(counts) - mean) / mean,
        "max_over_mean": max(counts) / mean,
        "cv": math.sqrt(variance) / mean,
        "entropy": entropy / math.log(experts) if experts > 1 else 1.0,
        "dead": sum(count == 0 for count in counts),
    }


@given(COUNTS)
@settings(max_examples=150, deadline=None)
def test_figures_equal_the_naive_definitions(counts_LE):
    figures = layer_figures(counts_LE)
    for layer, counts in enumerate(counts_LE.tolist()):
        for name, expected in naive_layer(counts).items():
            assert getattr(figures, f"{name}_L")[layer] == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@given(COUNTS, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_experts_does_not_matter(counts_LE, random):
    order = list(range(counts_LE.shape[1]))
    random.shuffle(order)
    one, other = summary(counts_LE), summary(counts_LE[:, order])
    assert one == pytest.approx(other, rel=1e-12, abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 16), st.integers(1, 10**9))
@settings(max_examples=50, deadline=None)
def test_an_even_load_is_perfect(num_layers, num_experts, tokens):
    metrics = summary(np.full((num_layers, num_experts), tokens))
    expected = {"max_vio": 0, "max_vio_mean": 0, "cv_mean": 0, "entropy_mean": 1, "dead_experts": 0}
    assert metrics == pytest.approx({f"moe/{name}": value for name, value in expected.items()}, abs=1e-9)


def test_worked_example():
    figures = layer_figures(np.array([[6, 2, 0, 0], [0, 0, 0, 8]]))
    assert figures.max_vio_L.tolist() == [2.0, 3.0]
    assert figures.max_over_mean_L.tolist() == [3.0, 4.0]
    assert figures.dead_L.tolist() == [2, 3]
    assert figures.cv_L == pytest.approx([math.sqrt(6) / 2, math.sqrt(3)])
    assert figures.entropy_L == pytest.approx([-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4), 0.0])


def test_layers_without_tokens_are_zero_and_left_out_of_the_means():
    counts_LE = np.array([[0, 0], [3, 1]])
    figures = layer_figures(counts_LE)
    assert [figures.max_vio_L[0], figures.cv_L[0], figures.entropy_L[0], figures.dead_L[0]] == [0, 0, 0, 0]
    assert summary(counts_LE) == pytest.approx(summary(counts_LE[1:]))
    assert summary(counts_LE[1:])["moe/max_vio_mean"] == 0.5
    assert set(summary(np.zeros((2, 3), dtype=np.int64)).values()) == {0.0}
    assert set(summary(np.zeros((0, 3), dtype=np.int64)).values()) == {0.0}


def test_rank_imbalance_counts_ranks_without_experts():
    counts_LE = np.array([[4, 2, 6], [0, 0, 0], [1, 1, 1]])
    tokens_LR = np.array([[6, 6, 0], [0, 0, 0], [2, 1, 0]])
    assert rank_imbalance(tokens_LR).tolist() == [1.5, 0.0, 2.0]
    assert summary(counts_LE, tokens_LR)["moe/rank_imbalance"] == 2.0
    assert rank_imbalance(counts_LE.sum(axis=1, keepdims=True)).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [np.ones(3, int), np.ones((2, 2)), np.array([[-1, 2]]), np.ones((2, 0), int)])
def test_bad_counts_are_refused(bad):
    with pytest.raises(ValueError, match="counts must"):
        layer_figures(bad)


def test_history_merges_neighbours_evenly_and_loses_no_token():
    rng = np.random.default_rng(1)
    added = rng.integers(0, 100, size=(37, 2, 3))
    history = LoadHistory(max_snapshots=8)
    for index, counts_LE in enumerate(added):
        history.add(10 * (index + 1), counts_LE)
        assert len(history.snapshots) <= 8
    assert np.array_equal(history.totals_LE, added.sum(axis=0))
    # 37 steps in at most 8 equal spans: 8 steps each, the last one shorter
    assert [snapshot.num_adds for snapshot in history.snapshots] == [8, 8, 8, 8, 5]
    assert [snapshot.first_step for snapshot in history.snapshots] == [10, 90, 170, 250, 330]
    assert history.steps_S.tolist() == [80, 160, 240, 320, 370]
    expected = layer_figures(added[8:16].sum(axis=0)).max_vio_L
    assert history.max_vio_SL()[1] == pytest.approx(expected)


def test_history_bounds_the_numbers_it_holds():
    history = LoadHistory(max_snapshots=256, max_values=2000)
    for step in range(1, 400):
        history.add(step, np.ones((5, 20), dtype=np.int64))
    assert history.limit == 20
    assert len(history.snapshots) <= 20
    assert history.totals_LE.sum() == 399 * 100


def test_history_state_goes_through_json_and_continues_alike():
    rng = np.random.default_rng(2)
    added = rng.integers(0, 50, size=(30, 2, 4))
    straight, before, after = (LoadHistory(max_snapshots=4) for _ in range(3))
    for step, counts_LE in enumerate(added, start=1):
        straight.add(step, counts_LE)
    for step, counts_LE in enumerate(added[:13], start=1):
        before.add(step, counts_LE)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step, counts_LE in enumerate(added[13:], start=14):
        after.add(step, counts_LE)
    assert after.state_dict() == straight.state_dict()
    assert after.totals_LE.dtype == np.int64


def test_history_refuses_going_back():
    history = LoadHistory()
    history.add(5, np.ones((1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="step 5 comes after step 5"):
        history.add(5, np.ones((1, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="shape"):
        history.add(6, np.ones((2, 2), dtype=np.int64))
