"""The layer with the kernels' operators against the same layer with plain torch; when the backend is refused."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_train import kernels
from moe_train.errors import ConfigError
from moe_train.kernels.reference.activation import activate
from moe_train.moe import (
    ChildNames,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    RouterSpec,
    ScoreRouter,
    SlotPlan,
    resolve_backend,
    router_logits,
)
from moe_train.moe.experts import activation_name
from moe_train.parallel import Topology, build_groups
from moe_train.testing import assert_close

EXPERTS, HIDDEN, INNER = 8, 16, 8
SPECS = {
    "softmax": RouterSpec(num_experts=EXPERTS, top_k=2, score="softmax", normalize=True),
    "sigmoid": RouterSpec(
        num_experts=EXPERTS, top_k=3, score="sigmoid", normalize=True, eps=1e-20, scale=2.5, num_groups=4, topk_groups=2
    ),
    "after top-k": RouterSpec(num_experts=EXPERTS, top_k=2, score="softmax_after_topk", normalize=False),
    "best group": RouterSpec(
        num_experts=EXPERTS,
        top_k=2,
        score="softmax",
        normalize=False,
        num_groups=2,
        topk_groups=1,
        group_score="best",
    ),
}


class Gate(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return router_logits(x, self.weight)


def make_layer(backend: str, spec: RouterSpec, aux_over: str, draw, bias: torch.Tensor | None = None):
    """The layer, x, gate_up and down."""
    leaves = [draw(3, 5, HIDDEN) * 4, draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)]
    x, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    layer = ParallelMoELayer(
        children={"gate": Gate(draw(EXPERTS, HIDDEN) * 2)},
        names=ChildNames(router="gate", experts="experts"),
        experts=ResidentExperts(gate_up, down),
        activation=F.silu,
        router=ScoreRouter(spec, None if bias is None else lambda gate: bias),
        plan=SlotPlan(EXPERTS, 1),
        options=LayerOptions(backend=backend, aux_loss=True, z_loss=True, aux_over=aux_over),  # type: ignore[arg-type]
        groups=build_groups(Topology(world=1, expert=1)),
        context=MoEContext(1, EXPERTS, torch.device("cpu")),
        index=0,
    )
    return layer, x, gate_up, down


def drawing():
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    return draw


def run(
    backend: str,
    spec: RouterSpec,
    aux_over: str,
    mask: torch.Tensor | None = None,
    recompute: bool = False,
    compiled: bool = False,
):
    """Output, losses, counts, and the gradients of everything."""
    draw = drawing()
    layer, x, gate_up, down = make_layer(backend, spec, aux_over, draw)
    context = layer.context
    if compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    with context.micro_batch():
        if recompute:
            # as the trainer does: the second forward is told that it is one
            y = checkpoint(
                layer, x, None, mask, use_reentrant=False, context_fn=lambda: (nullcontext(), context.recompute())
            )
        else:
            y = layer(x, None, mask)
        losses = dict(context.losses)
        sums = context.score_sums.get(0)
        total = (y * draw(3, 5, HIDDEN)).sum() + sum(0.3 * loss for loss in losses.values())
        if sums is not None:
            total = total + (sums * draw(EXPERTS)).sum()
        total.backward()
    found = {"y": y.detach(), **{name: loss.detach() for name, loss in losses.items()}}
    found |= {
        "dx": x.grad,
        "d gate_up": gate_up.grad,
        "d down": down.grad,
        "d gate": layer.get_parameter("gate.weight").grad,
    }
    return found | ({} if sums is None else {"sums": sums.detach()}), context.take_counts()


@pytest.mark.parametrize("aux_over", ["sequence", "micro_batch", "global_batch"])
@pytest.mark.parametrize("name", SPECS)
def test_equals_plain_torch(name, aux_over):
    found, counts = run("fused", SPECS[name], aux_over)
    expected, expected_counts = run("loop", SPECS[name], aux_over)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert_close(found[what], value, what)
    assert torch.equal(counts, expected_counts)


def test_padding_is_left_out():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:], mask[2, 0] = False, False
    found, counts = run("fused", SPECS["softmax"], "sequence", mask)
    expected, expected_counts = run("loop", SPECS["softmax"], "sequence", mask)
    for what, value in expected.items():
        assert_close(found[what], value, what)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("name", SPECS)
def test_compiles_without_a_break(name):
    """All of the layer where all experts are here: router, maps, experts, losses."""
    torch._dynamo.reset()
    found, counts = run("fused", SPECS[name], "sequence", compiled=True)
    expected, expected_counts = run("fused", SPECS[name], "sequence")
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert_close(found[what], value, what)
    assert torch.equal(counts, expected_counts)


def test_recompute_gives_the_same_bits_and_counts_once():
    found, counts = run("fused", SPECS["sigmoid"], "sequence", recompute=True)
    expected, expected_counts = run("fused", SPECS["sigmoid"], "sequence")
    assert all(torch.equal(found[what], value) for what, value in expected.items())
    assert torch.equal(counts, expected_counts)


def test_recompute_replays_the_choice_though_the_bias_has_moved():
    bias = torch.zeros(EXPERTS)
    layer, x, _, _ = make_layer("fused", replace(SPECS["sigmoid"], has_bias=True), "sequence", drawing(), bias)
    with layer.context.micro_batch():
        first = layer(x)
        bias.copy_(torch.arange(EXPERTS))
        with layer.context.recompute():
            again = layer(x)
        assert torch.equal(first, again)
        assert not torch.equal(first, layer(x)), "the bias matters"


@pytest.mark.parametrize(
    ("device", "dtype", "width", "hidden_act", "chosen"),
    [
        ("cuda", torch.bfloat16, 64, "silu", "fused"),
        ("cuda", torch.bfloat16, 360, "silu", "fused"),
        ("cuda", torch.bfloat16, 64, "gelu_new", "grouped"),
        ("cuda", torch.bfloat16, 60, "silu", "loop"),
        ("cuda", torch.float32, 64, "silu", "loop"),
        ("cpu", torch.bfloat16, 64, "silu", "loop"),
    ],
)
def test_auto_chooses_it_where_it_was_measured(monkeypatch, device, dtype, width, hidden_act, chosen):
    monkeypatch.setattr(kernels, "runs_triton", lambda device: device.type == "cuda")
    found = resolve_backend("auto", torch.device(device), dtype, 64, width, hidden_act=hidden_act)
    assert found == chosen


def test_auto_without_triton_is_grouped(monkeypatch):
    monkeypatch.setattr(kernels, "runs_triton", lambda device: False)
    cuda = torch.device("cuda")
    assert resolve_backend("auto", cuda, torch.bfloat16, 64, 64, hidden_act="silu") == "grouped"


def test_refused_without_triton_or_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "runs_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    with pytest.raises(ConfigError, match=r"moe\.backend \(fused\) .* needs a GPU: set moe\.backend to auto"):
        resolve_backend("fused", torch.device("cpu"), torch.float32, 64, 64)
    cuda = torch.device("cuda")
    assert resolve_backend("fused", cuda, torch.bfloat16, 64, 64) == "fused"
    with pytest.raises(ConfigError, match=r"\(fused\) takes bf16 or fp32, not torch\.float16"):
        resolve_backend("fused", cuda, torch.float16, 64, 64)
    with pytest.raises(ConfigError, match=r"\(fused\) needs hidden \(60\)"):
        resolve_backend("fused", cuda, torch.bfloat16, 60, 64)
    monkeypatch.setattr(kernels, "runs_triton", lambda device: False)
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match="needs the package triton"):
        resolve_backend("fused", cuda, torch.bfloat16, 64, 64)


def test_activations_are_known_by_what_they_are_called():
    from transformers.activations import ACT2FN

    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
    x = torch.randn(50)
    for name, expected in {**names, "relu": "relu"}.items():
        module = ACT2FN[name]
        assert activation_name(module) == activation_name(module.forward) == expected
        assert_close(activate(x, expected)[0], module(x), name)
    assert activation_name(F.silu) == "silu"
    with pytest.raises(ConfigError, match=r"the experts' is QuickGELUActivation: set moe\.backend to grouped"):
        activation_name(ACT2FN["quick_gelu"].forward)
