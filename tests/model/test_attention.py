"""A forward of a training step never waits for the device: nothing in it reads a tensor's value."""

import copy

import pytest
import torch
from small_configs import FAMILIES, build_alone, small_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from moe_train.model.dense import compile_attention
from moe_train.testing import assert_close

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}


class SeeReads(TorchDispatchMode):
    """Operators that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_read_nothing(family):
    built, _ = build_alone(small_recipe(family, moe={"backend": "grouped"}))
    with SeeReads() as reads, built.context.micro_batch():
        built.model(input_ids=torch.randint(0, 61, (2, 16))).logits.sum().backward()
    assert not reads.seen


def test_sliding_windows_keep_their_mask():
    config = {**FAMILIES["mixtral"], "sliding_window": 4}
    built, held = build_alone(small_recipe("mixtral", model={"config": config}))
    with torch.no_grad():  # initial weights are so small that nobody would see what attention does
        for parameter in built.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    stock = AutoModelForCausalLM.from_config(
        copy.deepcopy(built.model.config), dtype=torch.float32, attn_implementation="eager"
    )  # which writes into the configuration
    stock.load_state_dict(dict(built.model.state_dict()) | {k: v.detach() for k, v in held.items()})
    ids = torch.randint(0, 61, (2, 16))
    with torch.no_grad(), built.context.micro_batch():
        assert_close(built.model(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_attention_of_every_layer_compiles_without_a_break(family):
    built, _ = build_alone(small_recipe(family, model={"kernels": ["rotary"]}))
    ids = torch.randint(0, 61, (2, 16))

    def logits() -> torch.Tensor:
        with torch.no_grad(), built.context.micro_batch():
            return built.model(input_ids=ids).logits

    plain = logits()
    assert len(built.model.model.layers) > 1
    compile_attention(built.model, backend="aot_eager", fullgraph=True)
    assert_close(logits(), plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
def test_compiled_attention_has_the_same_gradients(checkpointing):
    found = []
    for compiled in (False, True):
        recipe = small_recipe("qwen3_moe", model={"kernels": ["rotary"], "activation_checkpointing": checkpointing})
        built, _ = build_alone(recipe)
        if compiled:
            compile_attention(built.model, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        for sequences in (2, 3):  # the second size is compiled anew
            ids = torch.randint(0, 61, (sequences, 16))
            with built.context.micro_batch():
                built.model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in built.model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, name)


def test_attention_is_compiled_where_the_recipe_says_so_and_a_gpu_is(monkeypatch):
    called = []
    monkeypatch.setattr("moe_train.model.build.compile_attention", called.append)
    build_alone(small_recipe("qwen3_moe", model={"compile": True}))
    assert not called, "a CPU's compiler takes a minute"
