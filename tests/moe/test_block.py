"""A wrapped block against the Hugging Face block that it was made from, on one process: output and all gradients."""

import copy

import pytest
import torch
from hf_blocks import EXPERTS, FAMILIES, HIDDEN, TOP_K, VOCAB, ListBlock, call, make_block, make_config, routed, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeSparseMoeBlock
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2SparseMoeBlock
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterMLP
from transformers.models.zaya.modeling_zaya import ZayaSparseMoeBlock
from user_backends import ChosenOnlyMoE, DenseMoE, counted_collectives

from moe_train.errors import ConfigError, RoutingError
from moe_train.moe.block import MoELayer
from moe_train.moe.config import MoEConfig, MoEFieldNames, Scoring
from moe_train.moe.fused import FUSED_MOE, FusedMoE, GroupedFusedMoE, LoopFusedMoE
from moe_train.moe.placement import SlotPlan
from moe_train.parallel import Topology, build_groups
from moe_train.testing import assert_close
from moe_train.verify.float64 import Float64

ALL = [*FAMILIES, "list"]
STACKED = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe", "aria"]


def hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def run(function, module, x, ids, dy):
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = function(module, x, ids)
    y.backward(dy)
    return y.detach(), {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def compare(layer, block, leading, dtype=torch.float64):
    x, ids, dy = tokens(*leading, dtype=dtype)
    with Float64() if dtype == torch.float64 else torch.enable_grad():
        expected, expected_grads = run(call, block, x, ids, dy)
        actual, grads = run(lambda module, x, ids: hidden_of(module(x, ids)), layer, x, ids, dy)
    assert_close(actual, expected, "output")
    assert set(grads) == set(expected_grads)
    for name, grad in expected_grads.items():
        # a list's experts without a token: ours take part, with a gradient of zero
        grad = torch.zeros_like(grads[name]) if grad is None else grad
        assert_close(grads[name], grad, name, floor=1e-2)
    return actual


# ------------------------------------------------------------------------------------------------------ the same block


@pytest.mark.parametrize("family", ALL)
def test_same_output_and_gradients_as_the_block(family):
    layer = MoELayer(make_config(family), make_block(family))
    y = compare(layer, make_block(family), (3, 7))
    assert float(y.abs().mean()) > 0.1


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v4", "list"])
@pytest.mark.parametrize("backend", [LoopFusedMoE, "loop", "auto", DenseMoE, ChosenOnlyMoE])
def test_every_backend(family, backend):
    layer = MoELayer(make_config(family, fused_moe_cls=backend), make_block(family))
    assert type(layer.fused_moe) is FUSED_MOE.get(backend, backend)
    # a class of one's own may leave a list's experts without a token alone; here all have some
    compare(layer, make_block(family), (4, 25))


@pytest.mark.parametrize("family", STACKED)
def test_the_grouped_backend(family):
    layer = MoELayer(make_config(family, fused_moe_cls="grouped"), make_block(family, torch.float32))
    assert type(layer.fused_moe) is GroupedFusedMoE
    compare(layer, make_block(family, torch.float32), (3, 7), torch.float32)


def test_the_backends_differ(monkeypatch):
    """Each name runs its own code."""
    from moe_train.moe import fused

    called = []
    for name, function in list(fused.BACKENDS.items()):
        monkeypatch.setitem(fused.BACKENDS, name, lambda *a, name=name, f=function: called.append(name) or f(*a))
    for name in ("loop", "grouped", None):
        layer = MoELayer(make_config("mixtral", fused_moe_cls=name), make_block("mixtral", torch.float32))
        layer(tokens(2, 3, dtype=torch.float32)[0])
    assert called == ["loop", "grouped", "loop"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v4 hash"])
@pytest.mark.parametrize("leading", [(5,), (2, 3, 4), (1, 1), (0,), (2, 0)])
def test_any_leading_sizes(family, leading):
    layer = MoELayer(make_config(family), make_block(family))
    x, ids, _ = tokens(*leading)
    with Float64():
        y = hidden_of(layer(x, ids))
        flat = hidden_of(layer(x.reshape(-1, HIDDEN), ids.reshape(-1)))
        indices, weights = layer.route(x, ids)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(-1, HIDDEN), flat)
    assert indices.shape == weights.shape == (*leading, TOP_K)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_no_contiguous_input(family):
    layer = MoELayer(make_config(family), make_block(family))
    x, _, _ = tokens(4, 6)
    strided = x.transpose(0, 1)
    assert not strided.is_contiguous()
    with Float64():
        assert torch.equal(hidden_of(layer(strided)), hidden_of(layer(strided.contiguous())))
        assert_close(hidden_of(layer(strided)), call(make_block(family), strided.contiguous(), None))


def test_routing_is_of_tokens_and_not_of_sequences():
    """gpt_oss's router takes its softmax over dimension 1, whatever that is."""
    layer = MoELayer(make_config("gpt_oss"), make_block("gpt_oss"))
    _, weights = layer.route(tokens(2, 5)[0])
    assert_close(weights.sum(dim=-1), torch.ones(2, 5, dtype=weights.dtype))


def test_what_gpt_oss_returns():
    layer, block = MoELayer(make_config("gpt_oss"), make_block("gpt_oss")), make_block("gpt_oss")
    x = tokens(2, 5)[0]
    (y, weights), (expected, expected_weights) = layer(x), block(x)
    assert_close(y, expected)
    assert_close(weights, expected_weights)
    assert weights.dtype == expected_weights.dtype


def test_bfloat16_is_combined_in_float32():
    """Nearer to the float32 block than a sum in bfloat16 is."""
    layer = MoELayer(make_config("mixtral"), make_block("mixtral", torch.bfloat16))
    x = tokens(64, dtype=torch.bfloat16)[0]
    indices, weights = layer.route(x)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    outputs = [layer.fused_moe.experts.call_expert(e, x) for e in range(EXPERTS)]
    rows = torch.stack(outputs, dim=1).gather(1, indices.unsqueeze(-1).expand(-1, -1, HIDDEN))
    assert torch.equal(y, (rows.float() * weights.unsqueeze(-1)).sum(dim=1).bfloat16())
    assert not torch.equal(y, (rows * weights.unsqueeze(-1).bfloat16()).sum(dim=1))


def test_a_whole_model_with_its_blocks_wrapped():
    for family, fields in (("qwen3_moe", {"head_dim": 4}), ("gpt_oss", {"head_dim": 4})):
        entry = FAMILIES[family]
        config = AutoConfig.for_model(
            family,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            num_experts_per_tok=TOP_K,
            **{**entry.fields, **fields},
        )
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
        ids = tokens(2, 6)[1]
        expected = model(ids).logits
        keys = list(model.state_dict())
        for decoder in model.model.layers:
            decoder.mlp = MoELayer(make_config(family), decoder.mlp)
        assert list(model.state_dict()) == keys
        assert_close(model(ids).logits, expected, family)


# --------------------------------------------------------------------------------------------- modules and parameters


@pytest.mark.parametrize("family", ALL)
def test_names_are_the_familys(family):
    block, reference = make_block(family), make_block(family)
    layer = MoELayer(make_config(family), block)
    assert list(layer.state_dict()) == list(reference.state_dict())
    assert [(n, id(p)) for n, p in layer.named_parameters()] == [(n, id(p)) for n, p in block.named_parameters()]
    layer.load_state_dict(reference.state_dict())


def test_a_copy_and_a_move_reach_the_backend():
    layer = MoELayer(make_config("qwen2_moe"), make_block("qwen2_moe", torch.float32))
    other = copy.deepcopy(layer)
    assert other.fused_moe is not layer.fused_moe
    x = tokens(5, dtype=torch.float32)[0]
    with torch.no_grad():
        layer.experts.down_proj.zero_()
    compare(other, make_block("qwen2_moe", torch.float32), (3, 4), torch.float32)
    assert not torch.equal(layer(x), other(x))
    compare(other.double(), make_block("qwen2_moe", torch.float32).double(), (3, 4))
    layer.eval()
    assert not layer.fused_moe.training
    assert layer.train().fused_moe.training


def test_buffers_of_the_block_stay():
    """minimax_m2 keeps its correction bias on the block; a gate_router reads it from there."""
    config = AutoConfig.for_model(
        "minimax_m2", hidden_size=HIDDEN, intermediate_size=8, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    block = MiniMaxM2SparseMoeBlock(config)
    for tensor in [*block.parameters(), *block.buffers()]:
        nn.init.normal_(tensor.data, std=0.6)
    block = block.double()

    def router(gate, x, top_k, input_ids, layer_idx):
        logits, weights, indices = gate(x, block.e_score_correction_bias)
        return indices, weights, logits

    reference = copy.deepcopy(block)
    with pytest.raises(ConfigError, match=r"reads `e_score_correction_bias` \(Tensor\).*gate_router"):
        MoELayer(MoEConfig(module_name="MiniMaxM2SparseMoeBlock"), block)
    layer = MoELayer(MoEConfig(module_name="MiniMaxM2SparseMoeBlock", gate_router=router), block)
    assert layer.e_score_correction_bias is block.e_score_correction_bias
    assert list(layer.state_dict()) == list(reference.state_dict())
    compare(layer, reference, (2, 9))


def test_a_part_that_lies_deeper():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.top_k = nn.Module(), TOP_K
            block = make_block("qwen3_moe")
            self.inner.gate, self.inner.experts = block.gate, block.experts

    names = MoEFieldNames(gate="inner.gate", experts="inner.experts")
    layer = MoELayer(MoEConfig(module_name="Deep", field_names=names), Deep())
    x = tokens(2, 5)[0]
    with Float64():
        assert_close(layer(x), call(make_block("qwen3_moe"), x, None))
    assert list(layer.state_dict()) == ["inner.gate.weight", "inner.experts.gate_up_proj", "inner.experts.down_proj"]


def test_none_is_absent():
    block = make_block("mixtral")
    block.shared_experts, block.shared_experts_gate = None, None
    layer = MoELayer(make_config("mixtral"), block)
    assert layer.fused_moe.shared_experts is None
    compare(layer, make_block("mixtral"), (2, 3))


def test_top_k_of_block_or_gate():
    """qwen3_moe has it on its router alone, mixtral on the block as well."""
    for family in ("qwen3_moe", "mixtral"):
        block = make_block(family)
        assert hasattr(block, "top_k") == (family == "mixtral")
        assert MoELayer(make_config(family), block).top_k == TOP_K


def test_a_gate_router_gets_what_it_was_promised():
    block, seen = make_block("mixtral"), []
    block.moe_layer_idx = 4

    def router(*args):
        seen.append(args)
        return torch.tensor([[3, 1]]).expand(10, 2), torch.tensor([[0.25, 2.0]], dtype=torch.float64).expand(10, 2)

    layer = MoELayer(make_config("mixtral", gate_router=router), block)
    x, ids, _ = tokens(2, 5)
    y = layer(x, ids)
    ((gate, flat, top_k, flat_ids, index),) = seen
    assert gate is block.gate
    assert torch.equal(flat, x.view(10, HIDDEN))
    assert (top_k, index) == (TOP_K, 4)
    assert torch.equal(flat_ids, ids.view(-1))
    call_expert = layer.fused_moe.experts.call_expert
    assert_close(y.view(10, HIDDEN), 0.25 * call_expert(3, flat) + 2 * call_expert(1, flat))


def test_nothing_is_sent_on_one_process():
    with counted_collectives() as called:
        for family in ALL:
            layer = MoELayer(make_config(family), make_block(family))
            x, ids, _ = tokens(2, 5)
            hidden_of(layer(x.requires_grad_(), ids)).sum().backward()
        groups = build_groups(Topology(world=1, expert=1))
        block = make_block("qwen2_moe")
        fused = FusedMoE(
            make_config("qwen2_moe"),
            block.experts,
            block.shared_expert,
            block.shared_expert_gate,
            TOP_K,
            groups=groups,
            plan=SlotPlan(EXPERTS, 1),
        )
        fused(x, *routed(x)).sum().backward()
    assert called == []


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_block_is_wrapped_once():
    layer = MoELayer(make_config("mixtral"), make_block("mixtral"))
    with pytest.raises(RuntimeError, match="is a MoELayer already"):
        MoELayer(make_config("mixtral"), layer)


def test_a_misspelt_part_names_the_candidates():
    for name, wrong, said in (
        ("gate", "gat", "candidates: gate, experts"),
        ("experts", "expert", "did you mean experts"),
    ):
        names = MoEFieldNames(**{name: wrong})
        with pytest.raises(ConfigError, match=rf"MoEFieldNames.{name} \({wrong}\): MixtralSparseMoeBlock.*{said}"):
            MoELayer(MoEConfig(module_name="MixtralSparseMoeBlock", field_names=names), make_block("mixtral"))


def test_parts_that_would_be_lost():
    block = make_block("qwen2_moe")
    with pytest.raises(ConfigError, match=r"would be lost \(shared_expert, shared_expert_gate\)"):
        MoELayer(MoEConfig(module_name="Qwen2MoeSparseMoeBlock"), block)
    names = MoEFieldNames(shared_experts="shared_expert")
    with pytest.raises(ConfigError, match=r"would be lost \(shared_expert_gate\)"):
        MoELayer(MoEConfig(module_name="Qwen2MoeSparseMoeBlock", field_names=names), block)


def small(family, block_class, **fields):
    config = AutoConfig.for_model(family, hidden_size=HIDDEN, num_experts_per_tok=TOP_K, **fields)
    with torch.device("meta"):
        return block_class(config)


def test_formulas_that_are_not_ours():
    scaled = make_block("minimax_m3_vl")
    with pytest.raises(ConfigError, match=r"reads `routed_scaling_factor` \(2.5\)"):
        MoELayer(MoEConfig(module_name="MiniMaxM3VLSparseMoeBlock"), scaled)
    scaled.routed_scaling_factor = 1.0
    MoELayer(MoEConfig(module_name="MiniMaxM3VLSparseMoeBlock"), scaled)
    router = MoEFieldNames(gate="router")
    filtered = small("openai_privacy_filter", OpenAIPrivacyFilterMLP, num_local_experts=EXPERTS, intermediate_size=8)
    with pytest.raises(ConfigError, match=r"reads `num_experts` \(2\)"):
        MoELayer(MoEConfig(module_name="OpenAIPrivacyFilterMLP", field_names=router), filtered)
    cohere = small("cohere2_moe", Cohere2MoeSparseMoeBlock, num_experts=EXPERTS, intermediate_size=8)
    config = MoEConfig(module_name="Cohere2MoeSparseMoeBlock")
    with pytest.raises(ConfigError, match=r"reads `shared_expert_combination_strategy`.*name it in `ignore`"):
        MoELayer(config, cohere)
    MoELayer(config, cohere, ignore=["shared_expert_combination_strategy"])


def test_a_second_result_that_is_not_known():
    zaya = make_block("mixtral")
    zaya.__class__ = type("Zaya", (type(zaya),), {"forward": ZayaSparseMoeBlock.forward})
    with pytest.raises(ConfigError, match="returns more than the hidden states"):
        MoELayer(make_config("mixtral"), zaya)


def test_jitter_is_refused():
    block = make_block("mixtral")
    block.jitter_noise = 0.1
    with pytest.raises(ConfigError, match=r"jitter_noise \(0.1\) is not supported"):
        MoELayer(make_config("mixtral"), block)


def test_a_block_that_something_sliced():
    block = make_block("mixtral")
    FusedMoE(make_config("mixtral"), block.experts, None, None, TOP_K).experts.slice_experts(0, 4)
    with pytest.raises(ConfigError, match="its gate chooses among 6 experts and there are 4"):
        MoELayer(make_config("mixtral"), block)


def layer_with(gate_router):
    return MoELayer(make_config("mixtral", gate_router=gate_router), make_block("mixtral"))


def test_bad_results_of_a_gate_router():
    x = tokens(12)[0]
    ids, weights = routed(x)
    for router, error, said in (
        (lambda *a: (weights, ids), TypeError, "expert indices must be integers.*check their order"),
        (lambda *a: (ids,), TypeError, "gate_router returned 1 values"),
        (lambda *a: ids, TypeError, "gate_router returned Tensor"),
        (lambda gate, x: (ids, weights), TypeError, "positional argument"),
        (lambda *a: (ids + 1, weights), ValueError, "experts are 0..5"),
        (lambda *a: (ids[:-1], weights[:-1]), ValueError, "for 12 tokens"),
    ):
        with pytest.raises(error, match=said):
            layer_with(router)(x)


def test_bad_results_of_a_gate():
    class Gate(nn.Module):
        top_k = TOP_K

        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output

    x = tokens(12)[0]
    ids, weights = routed(x)
    for output, error, said in (
        (None, ValueError, "Expected gate to return tuple with at least 2 elements"),
        ([ids, weights], ValueError, "Expected gate to return tuple"),
        ((weights, ids), TypeError, "check their order"),
        ((ids, weights, ids, ids), TypeError, "returned 4 values"),
        (torch.zeros(12, EXPERTS), RoutingError, "logits or weights: set MoEConfig.scoring"),
    ):
        block = make_block("mixtral")
        block.gate = Gate(output)
        with pytest.raises(error, match=said):
            MoELayer(make_config("mixtral"), block)(x)
    block.gate = Gate((ids, weights))
    assert_close(MoELayer(make_config("mixtral"), block)(x), block.experts(x, ids, weights))


def test_hash_layers_need_their_ids():
    layer = MoELayer(make_config("deepseek_v4 hash"), make_block("deepseek_v4 hash"))
    x, ids, _ = tokens(2, 5)
    with pytest.raises(ValueError, match="requires input_ids"):
        layer(x)
    with pytest.raises(ValueError, match="9 input_ids for 10 tokens"):
        layer(x, ids.view(-1)[:9])
    assert torch.equal(layer.route(x, ids)[0].view(10, TOP_K), layer.gate.tid2eid[ids.view(-1)])


def test_a_vector_is_no_hidden_states():
    layer = MoELayer(make_config("mixtral"), make_block("mixtral"))
    with pytest.raises(ValueError, match=r"must be \[..., H\]"):
        layer(torch.zeros(HIDDEN, dtype=torch.float64))


def test_a_list_block_needs_a_scoring():
    block = ListBlock().double()
    with pytest.raises(RoutingError, match=r"set MoEConfig\.scoring"):
        MoELayer(MoEConfig(module_name="ListBlock"), block)(tokens(3)[0])
    block.norm_topk_prob = None
    with pytest.raises(ValueError, match="norm_topk_prob is on neither"):
        MoELayer(make_config("list"), block)
    scoring = Scoring(score="softmax", normalize=True)
    MoELayer(MoEConfig(module_name="ListBlock", gate_returns_raw_logits=True, scoring=scoring), block)
