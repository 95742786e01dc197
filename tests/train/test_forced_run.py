"""Runs whose load is forced, or whose tokens are dropped: what their logs say, and what may resume what."""

from pathlib import Path

import pytest
import torch
from tiny_run import DEEPSEEK, differences, resolve, start, state_of, tiny_recipe, train_until, write_corpus

from moe_train.errors import CheckpointError
from moe_train.model import count_parameters
from moe_train.testing import run_distributed
from moe_train.train import describe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def recipe(corpus: Path, model=DEEPSEEK, **moe) -> dict:
    tree = tiny_recipe(corpus, model, moe=moe)
    tree["model"]["config"] |= {"n_group": 1, "topk_group": 1} if model is DEEPSEEK else {}
    return tree


def described(tree: dict) -> str:
    run = resolve(tree, world=1)
    return describe(run, count_parameters(run.recipe, run.model_config, run.plan, run.topology))


def test_a_forced_load_is_on_every_row_and_line(corpus, tmp_path):
    run_distributed(a_forced_load_is_on_every_row_and_line, 2, corpus, tmp_path)


def a_forced_load_is_on_every_row_and_line(rank: int, corpus: Path, tmp_path: Path):
    tree = recipe(corpus, force_load={"zipf": 1.2})
    assert "FORCED LOAD  moe.force_load (zipf 1.2): tokens go where they are told" in described(tree)
    run = start(tree, tmp_path)
    lines = []
    run.trainer.progress.update = lambda step, **shown: lines.append(shown["mark"])
    run.trainer.train()
    assert [row["moe/forced_load"] for row in run.recorder.logged.values()] == ["zipf 1.2"] * 6
    assert lines == ["FORCED LOAD (zipf 1.2)"] * 6
    counts = torch.from_numpy(run.trainer.history.totals_LE)[0]
    assert (counts.diff() <= 0).all(), counts
    # 6 experts, top-2, 1 / (1 + e)^1.2: 0.49, 0.21, 0.13, 0.09, 0.07, 0.06 of the rows
    assert counts[0] / counts.sum() == pytest.approx(0.4497, abs=0.05)


def test_a_plain_run_is_not_marked(corpus, tmp_path):
    run_distributed(a_plain_run_is_not_marked, 2, corpus, tmp_path)


def a_plain_run_is_not_marked(rank: int, corpus: Path, tmp_path: Path):
    run = start(recipe(corpus), tmp_path)
    train_until(run, 1, save=False)
    assert "moe/forced_load" not in run.recorder.logged[1]
    assert "FORCED" not in described(recipe(corpus))
    assert "WARNING" not in described(recipe(corpus))


def test_a_benchmark_and_a_run_do_not_resume_each_other(corpus, tmp_path):
    run_distributed(a_benchmark_and_a_run_do_not_resume_each_other, 2, corpus, tmp_path)


def a_benchmark_and_a_run_do_not_resume_each_other(rank: int, corpus: Path, tmp_path: Path):
    forced, plain = recipe(corpus, force_load="balanced"), recipe(corpus)
    for first, second, said in ((forced, plain, "with moe.force_load"), (plain, forced, "without moe.force_load")):
        folder = tmp_path / said.split()[0]
        train_until(start(first, folder), 1)
        with pytest.raises(CheckpointError, match=f"was trained {said}, and this recipe has"):
            start(second, folder)
        assert start(first, folder).trainer.step == 1


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        (
            {"router": "expert_choice"},
            "WARNING    moe.router (expert_choice): which expert a token gets depends on later",
        ),
        ({"router": "sinkhorn"}, "WARNING    moe.router (sinkhorn): which expert"),
        ({"capacity_factor": 1.0}, "WARNING    moe.drop (probability): which expert"),
        ({"capacity_factor": 1.0, "drop": "position"}, ""),
    ],
)
def test_what_is_not_causal_says_so(corpus, moe, said):
    text = described(recipe(corpus, **moe))
    assert said in text
    assert bool(said) == ("WARNING" in text)


def test_dropped_rows_are_in_the_log_and_survive_a_resume(corpus, tmp_path):
    run_distributed(dropped_rows_are_in_the_log_and_survive_a_resume, 2, corpus, tmp_path)


def dropped_rows_are_in_the_log_and_survive_a_resume(rank: int, corpus: Path, tmp_path: Path):
    tree = recipe(corpus, capacity_factor=0.5, drop="position", bias_update_rate=0.01)
    tree["diagnostics"] |= {"log_interval": 4}
    whole = start(tree, tmp_path / "whole")
    whole.trainer.train()
    row = whole.recorder.logged[4]
    # 6 experts, top-2, 16 tokens: at most 6 x ceil(0.5 x 16 x 2 / 6) = 18 of 32 rows find room
    assert 14 / 32 <= row["moe/drop_rate"] < 1
    assert row["moe/drop_rate"] <= row["moe/drop_rate_layer"] <= row["moe/drop_rate_expert"] <= 1
    (event,) = [fields for name, fields in whole.recorder.events if name == "dropped"]
    assert event["step"] == 6
    assert len(event["shares"][0]) == 6
    train_until(start(tree, tmp_path / "parts"), 2)
    again = start(tree, tmp_path / "parts")
    assert again.trainer.rows_since_log.sum() < again.trainer.counts_since_log.sum()
    again.trainer.train()
    assert again.recorder.logged[4]["moe/drop_rate"] == row["moe/drop_rate"]


def test_a_choice_by_place_resumes_to_the_bit(corpus, tmp_path):
    run_distributed(a_choice_by_place_resumes_to_the_bit, 2, corpus, tmp_path)


def a_choice_by_place_resumes_to_the_bit(rank: int, corpus: Path, tmp_path: Path):
    tree = recipe(corpus, force_load={"zipf": 1.0}, capacity_factor=1.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = start(tree, whole)
    train_until(straight, 4)
    train_until(start(tree, parts), 2)
    resumed = start(tree, parts)
    train_until(resumed, 4)
    assert not differences(state_of(straight), state_of(resumed))


def test_evaluations_between_steps_change_nothing(corpus, tmp_path):
    run_distributed(evaluations_between_steps, 2, corpus, tmp_path)


def evaluations_between_steps(rank: int, corpus: Path, tmp_path: Path):
    """They call the gate in another way, which ZeRO-3 follows as well."""
    losses, counts = [], []
    for number, (stage, interval) in enumerate(((1, 0), (3, 2))):
        tree = recipe(corpus, capacity_factor=1.0, bias_update_rate=0.5, bias_update="quantile")
        tree["zero"], tree["train"] = {"stage": stage}, tree["train"] | {"eval_interval": interval}
        run = start(tree, tmp_path / f"stage{number}")
        run.trainer.train()
        losses.append(list(run.recorder.losses().values()))
        counts.append(run.trainer.history.totals_LE.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert counts[0] == counts[1]
