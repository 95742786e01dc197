"""A value that is not finite, on one rank, stops every rank before any weight changes."""

import re
from pathlib import Path

import pytest
import torch
from tiny_run import DEEPSEEK, TinyRun, differences, start, tiny_recipe, train_until, weights_of, write_corpus
from torch import nn

from moe_train.diagnostics.watchdog import first_nonfinite
from moe_train.errors import TrainingError
from moe_train.testing import run_distributed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def plant_nan_in_weight(run: TinyRun, name: str) -> None:
    """One element of the weights that forward uses."""
    for tensor in run.assembly.engine.store.tensors:
        if tensor.name == name:
            tensor.shard.view(-1)[3] = float("nan")
            return
    parameter = dict(run.assembly.built.model.named_parameters())[name]
    parameter.data.view(-1)[3] = float("nan")


def stopped_by_nan(rank: int, recipe: dict, folder: str, name: str) -> tuple[str, list[str], int]:
    """Two good steps, a NaN on rank 1, one bad step: the message, what changed in the bad step, steps done."""
    run = start(recipe, folder)
    train_until(run, 2, save=False)
    if rank == 1:
        plant_nan_in_weight(run, name)
    before = weights_of(run.assembly)
    try:
        train_until(run, 3, save=False)
    except TrainingError as error:
        return str(error), differences(before, weights_of(run.assembly)), run.trainer.step
    return "no error", [], run.trainer.step


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj"),
        ("model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp"),
    ],
    ids=["dense", "expert"],
)
def test_nan_in_a_weight_of_one_rank(tmp_path, corpus, stage, weight, layer):
    recipe = tiny_recipe(corpus, DEEPSEEK, zero={"stage": stage}, moe={"bias_update_rate": 1e-2})
    for message, changed, step in run_distributed(stopped_by_nan, 2, recipe, str(tmp_path), weight):
        assert message.startswith("step 3: the loss is nan")
        assert "sequences 16 to 23." in message
        assert re.search(rf"first in the output of {re.escape(layer)} on rank [01]\.", message)
        assert "o_proj" not in message or "on rank 1." in message
        assert not changed
        assert step == 2


def stopped_by_gradient(rank: int, recipe: dict, folder: str) -> tuple[str, list[str]]:
    """Two good steps, then an infinite element in one expert's gradient, on rank 1, in the step's last micro-batch."""
    run = start(recipe, folder)
    train_until(run, 2, save=False)
    before = weights_of(run.assembly)
    if rank == 1:
        tensor = run.assembly.engine.store.tensors[-1]
        accumulate, seen = tensor.accumulate, []

        def spoiled(grad: torch.Tensor) -> None:
            seen.append(0)
            if len(seen) == run.trainer.run.accumulation:
                grad = grad.clone()
                grad.view(-1)[-1] = float("inf")
            accumulate(grad)

        tensor.accumulate = spoiled
    try:
        train_until(run, 3, save=False)
    except TrainingError as error:
        return str(error), differences(before, weights_of(run.assembly))
    return "no error", []


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_infinite_gradient_of_one_expert(tmp_path, corpus, stage, precision):
    recipe = tiny_recipe(
        corpus,
        DEEPSEEK,
        zero={"stage": stage},
        precision={"compute": precision},
        moe={"bias_update_rate": 1e-2},
        parallel={"expert": 1 if stage == 3 else 2},
    )
    for message, changed in run_distributed(stopped_by_gradient, 2, recipe, str(tmp_path)):
        assert message.startswith("step 3: the gradient norm is not finite")
        assert "sequences 16 to 23." in message
        assert not changed


def stopped_by_loss(rank: int, recipe: dict, folder: str) -> tuple[str, list[str]]:
    """Two good steps, then an infinite loss on rank 1 whose gradients are finite on every rank."""
    run = start(recipe, folder)
    train_until(run, 2, save=False)
    before = weights_of(run.assembly)
    if rank == 1:
        forward = run.trainer.forward_loss
        run.trainer.forward_loss = lambda batch: forward(batch) + float("inf")
    try:
        train_until(run, 3, save=False)
    except TrainingError as error:
        return str(error), differences(before, weights_of(run.assembly))
    return "no error", []


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_infinite_loss_with_finite_gradients_changes_no_weight(tmp_path, corpus, stage, precision):
    recipe = tiny_recipe(corpus, DEEPSEEK, zero={"stage": stage}, precision={"compute": precision})
    for message, changed in run_distributed(stopped_by_loss, 2, recipe, str(tmp_path)):
        assert message.startswith("step 3: the loss is inf")
        assert "in the loss itself." in message
        assert not changed


class Chain(nn.Module):
    """Two paths in one module; `second` runs before `first`, whatever their order of registration."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return {"out": (self.first(self.second(x)), [x])}


def test_first_nonfinite_names_the_module_that_completed_first():
    model, x = Chain(), torch.ones(1, 2)
    assert first_nonfinite(model, lambda: model(x)) is None
    with torch.no_grad():
        model.first.weight[0, 0] = float("inf")
    assert first_nonfinite(model, lambda: model(x)) == (2, "first")
    with torch.no_grad():
        model.second.bias[0] = float("nan")
    assert first_nonfinite(model, lambda: model(x)) == (1, "second")
    assert not any(module._forward_hooks for module in model.modules())


def test_first_nonfinite_looks_into_nested_outputs_and_cleans_up_after_an_error():
    model = Chain()
    assert first_nonfinite(model, lambda: model(torch.full((1, 2), float("nan")))) == (1, "second")

    class Nested(nn.Module):
        def forward(self, x):
            return {"a": [x, (x / 0,)], "ids": torch.zeros(1, dtype=torch.int64)}

    nested = Nested()
    assert first_nonfinite(nested, lambda: nested(torch.ones(1))) == (1, "Nested")
    with pytest.raises(RuntimeError):
        first_nonfinite(model, lambda: model(torch.ones(1, 3)))
    assert not any(module._forward_hooks for module in model.modules())
