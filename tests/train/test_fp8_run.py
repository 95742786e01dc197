"""A run with experts in FP8: its quantised weights are those of the step, also after a load; what it says of itself."""

from contextlib import nullcontext
from copy import deepcopy
from unittest.mock import patch

import pytest
from tiny_run import QWEN3, differences, start, state_of, tiny_recipe, train_until, write_corpus

from moe_train import kernels
from moe_train.kernels import choose
from moe_train.moe.fp8 import Fp8Experts
from moe_train.optim import ExpertTensor
from moe_train.testing import run_distributed
from moe_train.train.run import _experts_line

pytest.importorskip("triton", reason="the test extra installs it on Linux")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def recipe_of(corpus, stage: int = 1, **sections) -> dict:
    model = deepcopy(QWEN3)
    precision = {"compute": "bf16", "experts": "fp8"}
    return tiny_recipe(corpus, model, precision=precision, zero={"stage": stage}, **sections)


def trained(rank: int, recipe: dict, folder: str, forgetful: bool) -> tuple[dict, dict, int]:
    """Losses, state, and how often weights were quantised whole.

    With torch's reference kernels; forgetful: no weights have a version, so that nothing is kept.
    """
    without = patch.object(ExpertTensor, "version", None) if forgetful else nullcontext()
    quantised = patch.object(kernels, "quantise_weights", wraps=kernels.quantise_weights)
    with patch.object(choose, "runs_triton", lambda device: False), without, quantised as counted:
        run = start(recipe, folder)
        train_until(run, 3, save=False)
        return run.recorder.losses(), state_of(run), counted.call_count


@pytest.mark.parametrize("stage", [1, 3])
def test_kept_weights_are_those_that_would_be_quantised_anew(corpus, tmp_path, stage):
    """Accumulated micro-batches and recompute; at ZeRO-3 on two ranks nothing is kept."""
    batch = {"global_size": 4, "micro_size": 1}
    recipe = recipe_of(corpus, stage, batch=batch, parallel={"expert": 1})
    recipe["model"]["activation_checkpointing"] = True
    world = 2 if stage == 3 else 1
    ranks = run_distributed(trained, world, recipe, str(tmp_path), False)
    again = run_distributed(trained, world, recipe, str(tmp_path), True)
    for (losses, state, calls), (other_losses, other_state, other_calls) in zip(ranks, again, strict=True):
        assert losses == other_losses
        assert not differences(state, other_state)
        assert calls == (3 * 2 if stage == 1 else 0), "once per step and layer"
        assert other_calls == 0
    exact = recipe | {"precision": {"compute": "bf16"}}
    (other, *_), *_ = run_distributed(trained, world, exact, str(tmp_path), False)
    assert losses != other, "FP8 is another arithmetic"
    assert all(abs(losses[step] - other[step]) < 0.02 * other[step] for step in losses)


def resumed(rank: int, recipe: dict, folder: str) -> tuple[list[str], str]:
    with patch.object(choose, "runs_triton", lambda device: False):
        whole = start(recipe, f"{folder}/whole")
        train_until(whole, 4, save=False)
        expected = state_of(whole)
        train_until(start(recipe, f"{folder}/parts"), 2)
        second = start(recipe, f"{folder}/parts")
        assert second.trainer.step == 2
        train_until(second, 4, save=False)
        return differences(expected, state_of(second)), _experts_line(second.assembly)


def test_a_resumed_run_is_the_uninterrupted_one(corpus, tmp_path):
    ((different, line),) = run_distributed(resumed, 1, recipe_of(corpus), str(tmp_path))
    assert not different
    assert line == "moe.backend fused, precision.experts fp8: products h y dA dX"


def test_a_loaded_state_is_quantised_anew(corpus, tmp_path):
    """Also where weights were quantised before it came: the version is another one after a load."""
    ((before, after),) = run_distributed(version_after_load, 1, recipe_of(corpus), str(tmp_path))
    assert before != after


def version_after_load(rank: int, recipe: dict, folder: str):
    with patch.object(choose, "runs_triton", lambda device: False):
        run = start(recipe, folder)
        layer = run.assembly.built.layers[0]
        assert isinstance(layer.fp8, Fp8Experts)
        with layer.expert_source.fetch() as weights:
            before = weights.version
        run.assembly.engine.publish()
        with layer.expert_source.fetch() as weights:
            return before, weights.version
