"""What a rule on the load does to a run: every rank at the same step, and again after a resume."""

from pathlib import Path

import pytest
import torch
from tiny_run import DEEPSEEK, start, tiny_recipe, train_until, write_corpus

from moe_train.checkpoint import read_manifest
from moe_train.config import parse_recipe
from moe_train.errors import ConfigError, TrainingError
from moe_train.testing import run_distributed

STOP = {"when": "max_vio_above", "value": 0.0, "steps": 3, "action": "stop"}
RAISE = {"when": "max_vio_above", "value": 0.0, "steps": 2, "action": "raise_bias_rate", "max_rate": 0.03}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def guarded(corpus: Path, *rules: dict, **sections) -> dict:
    return tiny_recipe(
        corpus,
        DEEPSEEK,
        diagnostics={"guards": list(rules)},
        moe={"bias_update_rate": 0.01},
        **sections,
    )


def run_to_the_end(rank: int, recipe: dict, folder: str):
    run = start(recipe, folder)
    try:
        run.trainer.train()
    except TrainingError as error:
        return run.trainer.step, str(error), run.recorder.events
    return run.trainer.step, "", run.recorder.events


def test_stop_saves_and_ends_every_rank_at_the_same_step(corpus, tmp_path):
    recipe = guarded(corpus, STOP)
    for last in (3, 6):  # resumed, the count begins at zero: three steps more
        for step, error, events in run_distributed(run_to_the_end, 2, recipe, str(tmp_path)):
            assert step == last
            assert f"step {last}: MoE layer 0: MaxVio" in error
            assert "for 3 steps, and diagnostics.guards says stop (saved)" in error
            assert next(fields for name, fields in events if name == "guard")["step"] == last
        assert (tmp_path / "checkpoints" / f"step_{last:08}").is_dir()


def rates(rank: int, recipe: dict, folder: str):
    """The bias rate after each step, the run saved and taken up again after the third."""
    found = []
    for steps in (range(3), range(3, 6)):
        run = start(recipe, folder)
        for _ in steps:
            sums, _ = run.trainer.train_step()
            run.trainer.guard(sums)
            found.append(run.trainer.bias_rate)
        train_until(run, run.trainer.step)
    return found


def test_a_raised_rate_stays_raised_up_to_its_limit_and_after_a_resume(corpus, tmp_path):
    for found in run_distributed(rates, 2, guarded(corpus, RAISE), str(tmp_path)):
        assert found == [0.01, 0.02, 0.02, 0.03, 0.03, 0.03]


def test_replan_moves_experts(corpus, tmp_path):
    rule = {"when": "max_vio_above", "value": 0.0, "steps": 2, "action": "replan"}
    recipe = guarded(corpus, rule, parallel={"expert": 2, "redundant_experts": 2})
    for _, error, events in run_distributed(run_to_the_end, 2, recipe, str(tmp_path)):
        assert not error
        assert [fields["step"] for name, fields in events if name == "guard"] == [2, 4, 6]
    # which the next plan is made of
    state = read_manifest(tmp_path / "checkpoints" / "step_00000006").state
    assert len(state["counts_since_plan"]) == 1


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"when": "dead_experts", "steps": 2, "value": 1.0}, "when (dead_experts) takes no value"),
        ({"when": "entropy_below", "steps": 2}, "when (entropy_below) needs a value"),
        ({**RAISE, "max_rate": None}, "action (raise_bias_rate) needs a max_rate"),
        ({**STOP, "max_rate": 0.1}, "action (stop) takes no max_rate"),
        ({**RAISE, "max_rate": 0.005}, "up to max_rate (0.005) needs a moe.bias_update_rate (0.01) between 0 and that"),
        ({**STOP, "action": "replan"}, "action (replan) places redundant experts, and parallel.redundant_experts is 0"),
    ],
)
def test_rules_that_cannot_act_are_refused(rule, sentence, corpus):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(guarded(corpus, rule))
    assert sentence in str(caught.value)


GROWTH = {"when": "router_logit_growth", "value": 1.5, "reference_step": 1, "steps": 1}


def logit_sizes(rank: int, recipe: dict, folder: str):
    """RMS of every layer's router logits by step, from the trainer and from hooks on the routers; and what was said."""
    run = start(recipe, folder)
    seen: list[list[float]] = []
    squares: dict[str, list] = {}

    def hook(name):
        def note(module, args, output):
            if torch.is_grad_enabled() and not run.trainer.built.context._recomputing:
                squares.setdefault(name, []).append(output.detach().double())

        return note

    for layer in run.trainer.built.layers:
        layer.get_submodule(layer.names.router).register_forward_hook(hook(layer.index))
    found = []
    for _ in range(3):
        squares.clear()
        sums, _ = run.trainer.train_step()
        run.trainer.guard(sums)
        found.append(sums.logit_rms_L.tolist())
        seen.append([[float(each.square().mean()), len(each)] for layer in squares.values() for each in layer])
        with torch.no_grad():
            for layer in run.trainer.built.layers:
                layer.get_submodule(layer.names.router).weight.mul_(2.0)
    return found, seen, run.recorder.events


@pytest.mark.parametrize("recompute", [False, True])
def test_the_size_of_router_logits_is_that_of_all_ranks_and_micro_batches(corpus, tmp_path, recompute):
    recipe = guarded(corpus, GROWTH, zero={"stage": 0}, data={"corpora": [{"prefix": str(corpus)}]})
    recipe["model"]["activation_checkpointing"] = recompute
    both = run_distributed(logit_sizes, 2, recipe, str(tmp_path))
    for found, _, events in both:
        for step, (rms,) in enumerate(found):
            parts = [part for _, seen, _ in both for part in seen[step]]
            assert rms**2 == pytest.approx(sum(mean * n for mean, n in parts) / sum(n for _, n in parts), rel=1e-5)
        steps = [fields["step"] for name, fields in events if name == "guard"]
        assert steps == [2, 3], "weights were doubled after each step"
