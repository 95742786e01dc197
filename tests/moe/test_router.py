"""Every way of reading a gate, against the routers of Hugging Face families and against explicit formulas."""

from dataclasses import replace
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig
from transformers.models.aria.modeling_aria import AriaTextTopKRouter
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.flint.modeling_flint import FlintTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.jamba.modeling_jamba import JambaTopKRouter
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moe_train.errors import ConfigError, RoutingError
from moe_train.moe.config import MoEConfig, MoEFieldNames, Scoring
from moe_train.moe.route import RouterSpec, route_tokens, router_logits
from moe_train.moe.router import (
    CustomRouter,
    GateRouter,
    HashRouter,
    RawLogitsRouter,
    Router,
    ScoreRouter,
    router_of,
)
from moe_train.testing import assert_close

EXPERTS, TOP_K, HIDDEN, TOKENS = 16, 3, 12, 200
BIAS = "e_score_correction_bias"
GROUPS = {"n_group": 8, "topk_group": 3}
IN_GROUPS = {"num_groups": 8, "topk_groups": 3}
DEEPSEEK = {"n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5}

FAMILIES = {
    "mixtral": (MixtralTopKRouter, {"num_local_experts": EXPERTS}, Scoring(score="softmax", normalize=True), None),
    "qwen3_moe": (
        Qwen3MoeTopKRouter,
        {"num_experts": EXPERTS, "norm_topk_prob": True},
        Scoring(score="softmax"),
        None,
    ),
    "jamba": (JambaTopKRouter, {"num_experts": EXPERTS}, Scoring(score="softmax", normalize=False), None),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        {**DEEPSEEK, **GROUPS, "topk_method": "group_limited_greedy", "num_attention_heads": 2},
        Scoring(score="softmax", normalize=False, scale=2.5, group_score="best", **IN_GROUPS),
        None,
    ),
    "ernie4_5_moe": (
        Ernie4_5_MoeTopKRouter,
        {"moe_num_experts": EXPERTS, "moe_norm_min": 0.4},
        Scoring(score="softmax", normalize=True, min_sum=0.4),
        f"moe_statics.{BIAS}",
    ),
    "gpt_oss": (GptOssTopKRouter, {"num_local_experts": EXPERTS}, Scoring(score="softmax_after_topk"), None),
    "aria_text": (
        AriaTextTopKRouter,
        {"moe_num_experts": EXPERTS, "moe_topk": TOP_K, "num_attention_heads": 2},
        Scoring(score="softmax_after_topk"),
        None,
    ),
    "flint": (FlintTopKRouter, {"num_experts": EXPERTS, "norm_topk_prob": True}, Scoring(score="sigmoid"), None),
    "lfm2_moe": (
        Lfm2MoeTopKRouter,
        {"num_experts": EXPERTS, "use_expert_bias": False, "routed_scaling_factor": 1.5, "norm_topk_prob": True},
        Scoring(score="sigmoid", eps=1e-6, scale=1.5),
        None,
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        {**DEEPSEEK, **GROUPS},
        Scoring(score="sigmoid", eps=1e-20, scale=2.5, **IN_GROUPS),
        BIAS,
    ),
    "glm4_moe": (
        Glm4MoeTopkRouter,
        {**DEEPSEEK, **GROUPS, "norm_topk_prob": False},
        Scoring(score="sigmoid", scale=2.5, **IN_GROUPS),
        BIAS,
    ),
    "deepseek_v4": (
        DeepseekV4TopKRouter,
        {**DEEPSEEK, "scoring_func": "sqrtsoftplus"},
        Scoring(score="sqrtsoftplus", normalize=True, eps=1e-20, scale=2.5),
        BIAS,
    ),
}


def hugging_face(family, router_class=None, **more):
    """The family's router with weights and biases far from zero, and its scoring."""
    default_class, fields, scoring, bias = FAMILIES[family]
    config = AutoConfig.for_model(family, **{"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, **fields, **more})
    gate = (router_class or default_class)(config)
    torch.manual_seed(0)
    for name, tensor in [*gate.named_parameters(), *gate.named_buffers()]:
        if tensor.is_floating_point():
            nn.init.normal_(tensor.data, std=0.3 if "bias" in name else 1.0)
    return gate, scoring, bias


def router_for(gate, scoring, bias):
    config = MoEConfig(
        module_name="Block", gate_returns_raw_logits=True, scoring=scoring, field_names=MoEFieldNames(bias=bias)
    )
    return router_of(config, gate, gate.top_k, gate.num_experts, 0)


def tokens(count=TOKENS, dtype=torch.float32):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def dense(ids, weights):
    """[T, E] of weights, and of how often an expert was chosen: the order of the K is nobody's promise."""
    chosen = torch.zeros(ids.shape[0], EXPERTS)
    return chosen.scatter_add(1, ids, weights), chosen.scatter_add(1, ids, torch.ones_like(weights))


def assert_same_choice(routing, weights, ids, bound=1e-6):
    ours, chosen = dense(routing.topk_ids_TK, routing.topk_weights_TK)
    theirs, expected = dense(ids, weights)
    assert torch.equal(chosen, expected)
    assert (ours - theirs).abs().max() <= bound


# ------------------------------------------------------------------------------------------------------- raw logits


class WithoutTuple(nn.Module):
    """A gate that returns the logits alone, with the parts of another."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        for name, tensor in gate.named_buffers(recurse=False):
            self.register_buffer(name, tensor)
        for name, child in gate.named_children():
            self.add_module(name, child)

    def forward(self, x):
        return self.gate(x)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_logits_as_the_family_scores_them(family):
    gate, scoring, bias = hugging_face(family)
    router = router_for(gate, scoring, bias)
    assert type(router) is RawLogitsRouter
    assert (router.top_k, router.num_experts) == (TOP_K, EXPERTS)
    logits, weights, ids = gate(tokens())
    routing = router.route(gate, tokens())  # the gate returns a tuple, its logits first
    assert torch.equal(routing.logits_TE, logits)
    assert_same_choice(routing, weights, ids)
    again = RawLogitsRouter(router.spec, None if bias is None else attrgetter(bias))
    again = again.route(WithoutTuple(gate), tokens())  # and here a tensor
    assert torch.equal(again.topk_weights_TK, routing.topk_weights_TK)


def test_the_families_need_their_options():
    """Each option of a scoring changes what is chosen or weighed, so the comparison above is about it."""
    for family, option in (
        ("deepseek_v2", {"group_score": "best_two"}),
        ("ernie4_5_moe", {"min_sum": 0.0}),
        ("lfm2_moe", {"eps": 0.5}),
        ("deepseek_v3", {"topk_groups": 4}),
        ("glm4_moe", {"normalize": True}),
        ("deepseek_v4", {"score": "sigmoid"}),
        ("gpt_oss", {"score": "softmax", "normalize": False}),
    ):
        gate, scoring, bias = hugging_face(family)
        fields = {name: getattr(scoring, name) for name in scoring.__dataclass_fields__}
        _, weights, ids = gate(tokens())
        with pytest.raises(AssertionError):
            assert_same_choice(
                router_for(gate, Scoring(**{**fields, **option}), bias).route(gate, tokens()), weights, ids, 1e-4
            )


def test_a_bias_of_the_block_comes_through_a_function():
    """minimax_m2 hands the block's bias to its router."""
    config = AutoConfig.for_model(
        "minimax_m2", hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    gate, bias = MiniMaxM2TopKRouter(config), torch.linspace(-0.4, 0.4, EXPERTS)
    nn.init.normal_(gate.weight)
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="sigmoid", normalize=True, has_bias=True)
    routing = RawLogitsRouter(spec, lambda _: bias).route(lambda x: gate(x, bias), tokens())
    assert_same_choice(routing, *gate(tokens(), bias)[1:])


@pytest.mark.parametrize(
    ("scoring", "has_bias"),
    [
        *((scoring, bias is not None) for _, _, scoring, bias in FAMILIES.values()),
        (Scoring(score="sqrtsoftplus", normalize=False), False),
        (Scoring(score="sigmoid", normalize=False, **IN_GROUPS), False),
    ],
    ids=str,
)
def test_gradient_of_every_scoring(scoring, has_bias):
    torch.manual_seed(3)
    spec = scoring.spec(EXPERTS, TOP_K, True, has_bias)
    gate = nn.Linear(HIDDEN, EXPERTS).double()
    shift = torch.randn(EXPERTS).double() / 4
    router = RawLogitsRouter(spec, (lambda _: shift) if has_bias else None)
    ids = router.route(gate, tokens(3, torch.float64)).topk_ids_TK

    def weights(x, weight, bias):
        return router.route(lambda x: F.linear(x, weight, bias), x, None, ids).topk_weights_TK

    inputs = [tokens(3, torch.float64).requires_grad_(), gate.weight.detach().requires_grad_(), gate.bias]
    assert torch.autograd.gradcheck(weights, inputs)
    (weights(*inputs) * torch.randn(3, TOP_K).double()).sum().backward()
    assert gate.bias.grad.abs().max() > 1e-3


def test_router_arithmetic_is_float32_at_least():
    gate = nn.Linear(HIDDEN, EXPERTS).bfloat16()
    router = RawLogitsRouter(RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="softmax", normalize=True))
    routing = router.route(gate, tokens().bfloat16())
    expected = gate(tokens().bfloat16()).float().softmax(dim=-1)
    assert torch.equal(routing.scores_TE, expected)
    assert routing.topk_weights_TK.dtype == torch.float32
    assert router.route(gate.double(), tokens().double()).topk_weights_TK.dtype == torch.float64


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(TOKENS, EXPERTS + 1), rf"\[{TOKENS}, {EXPERTS + 1}\] for {TOKENS} tokens and {EXPERTS} experts"),
        (torch.zeros(TOKENS - 1, EXPERTS), rf"\[{TOKENS - 1}, {EXPERTS}\] for {TOKENS} tokens"),
        (torch.zeros(2, TOKENS // 2, EXPERTS), "of shape"),
        (torch.zeros(TOKENS, EXPERTS, dtype=torch.int64), "a tensor of torch.int64"),
        (None, "not NoneType"),
        ([torch.zeros(TOKENS, EXPERTS)], "not list"),
        ((), "not tuple"),
    ],
)
def test_logits_that_are_refused(output, said):
    router = RawLogitsRouter(RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="softmax", normalize=True))
    with pytest.raises(RoutingError, match=said):
        router.route(lambda x: output, tokens())


def test_no_tokens():
    for family in FAMILIES:
        gate, scoring, bias = hugging_face(family)
        routing = router_for(gate, scoring, bias).route(gate, tokens(0))
        assert (routing.topk_ids_TK.shape, routing.topk_weights_TK.shape) == ((0, TOP_K), (0, TOP_K)), family


# ------------------------------------------------------------------------------------------------- score and replay


class LogitsGate(nn.Module):
    def __init__(self, double=False):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, dtype=torch.float64 if double else torch.float32))
        self.register_buffer(BIAS, torch.randn(EXPERTS))

    def forward(self, x):
        return router_logits(x, self.weight)


SIGMOID = RouterSpec(
    num_experts=EXPERTS, top_k=TOP_K, score="sigmoid", normalize=True, eps=1e-20, scale=2.5, has_bias=True
)


def test_the_score_router_is_route_tokens():
    gate = LogitsGate()
    expected = route_tokens(router_logits(tokens(), gate.weight), SIGMOID, getattr(gate, BIAS))
    routing = ScoreRouter(SIGMOID, BIAS).route(gate, tokens())
    for name in ("logits_TE", "scores_TE", "topk_ids_TK", "topk_weights_TK"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name


def test_a_choice_is_replayed_and_not_made_again():
    gate, router = LogitsGate(), ScoreRouter(SIGMOID, BIAS)
    first = router.route(gate, tokens())
    getattr(gate, BIAS).mul_(-1)  # would choose others now
    assert not torch.equal(router.route(gate, tokens()).topk_ids_TK, first.topk_ids_TK)
    replayed = router.route(gate, tokens(), None, first.topk_ids_TK)
    assert torch.equal(replayed.topk_ids_TK, first.topk_ids_TK)
    assert torch.equal(replayed.topk_weights_TK, first.topk_weights_TK)


def test_the_score_router_wants_plain_logits():
    gate, *_ = hugging_face("deepseek_v3")
    with pytest.raises(RoutingError, match="not tuple"):
        ScoreRouter(SIGMOID, BIAS).route(gate, tokens())


@pytest.mark.parametrize(("name", "found"), [("nowhere", "absent"), ("weight", r"of shape \[16, 12\]")])
def test_a_bias_that_is_not_there(name, found):
    with pytest.raises(RoutingError, match=found):
        ScoreRouter(SIGMOID, name).route(LogitsGate(), tokens())


def test_bias_and_spec_must_agree():
    with pytest.raises(RoutingError, match="has_bias is True was given the bias None"):
        ScoreRouter(SIGMOID)
    with pytest.raises(RoutingError, match="has_bias is False was given the bias shift"):
        ScoreRouter(RouterSpec(num_experts=4, top_k=1, score="softmax", normalize=False), "shift")


def test_the_bias_is_not_trained():
    gate = LogitsGate()
    gate.shift = nn.Parameter(torch.randn(EXPERTS))
    ScoreRouter(SIGMOID, "shift").route(gate, tokens()).topk_weights_TK.sum().backward()
    assert gate.shift.grad is None


def test_all_routers_are_routers():
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="softmax", normalize=True)
    routers = {
        ScoreRouter(spec): (False, True, True),
        RawLogitsRouter(spec): (False, True, True),
        HashRouter(spec, "table"): (True, False, True),
        CustomRouter(print, TOP_K, EXPERTS, 0): (True, True, False),
        CustomRouter(print, TOP_K, EXPERTS, 0, has_scores=True, balanced=False): (True, False, True),
        GateRouter(TOP_K, EXPERTS): (False, True, True),
        GateRouter(TOP_K, EXPERTS, takes_input_ids=True): (True, False, True),
    }
    for router, flags in routers.items():
        assert isinstance(router, Router)
        assert not isinstance(router, nn.Module)
        assert (router.uses_input_ids, router.balanced, router.has_scores) == flags, type(router).__name__
        assert (router.top_k, router.num_experts) == (TOP_K, EXPERTS)


# ----------------------------------------------------------------------------------------------------------- custom


def test_a_gate_router_gets_what_it_was_promised():
    calls = []
    ids, weights = torch.tensor([[0, 5, 2]] * 4), torch.rand(4, TOP_K)

    def gate_router(*args, **kwargs):
        calls.append((args, kwargs))
        return ids, weights

    gate, x, input_ids = nn.Identity(), tokens(4), torch.arange(4)
    routing = CustomRouter(gate_router, TOP_K, EXPERTS, 7).route(gate, x, input_ids)
    ((args, kwargs),) = calls
    assert args[0] is gate
    assert args[1] is x
    assert (args[2], args[4], kwargs) == (TOP_K, 7, {})
    assert args[3] is input_ids
    assert torch.equal(routing.topk_ids_TK, ids)
    assert torch.equal(routing.topk_weights_TK, weights)
    assert routing.logits_TE is None
    assert routing.scores_TE is None


def test_a_gate_router_may_return_its_logits():
    logits = torch.randn(4, EXPERTS, requires_grad=True)

    def gate_router(gate, x, top_k, input_ids, layer):
        weights, ids = logits.sigmoid().topk(top_k)
        return ids.int(), weights, logits

    for has_scores in (False, True):
        routing = CustomRouter(gate_router, TOP_K, EXPERTS, 0, has_scores=has_scores).route(None, tokens(4))
        assert torch.equal(routing.logits_TE, logits)
        assert torch.equal(routing.scores_TE, logits.softmax(dim=-1))
        assert routing.topk_ids_TK.dtype == torch.int64
        assert routing.topk_weights_TK.requires_grad


IDS, WEIGHTS = torch.zeros(4, TOP_K, dtype=torch.int64), torch.rand(4, TOP_K)


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        ((IDS,), TypeError, "returned 1 values"),
        ((IDS, WEIGHTS, None, None), TypeError, "returned 4 values"),
        (IDS, TypeError, "returned Tensor"),
        (None, TypeError, "returned NoneType"),
        ((WEIGHTS, IDS), TypeError, "integers.*check their order"),
        ((IDS.float(), WEIGHTS), TypeError, "torch.float32"),
        ((IDS.bool(), WEIGHTS), TypeError, "torch.bool"),
        ((IDS, IDS), TypeError, "weights floating point"),
        ((IDS, None), TypeError, "NoneType"),
        ((IDS[:3], WEIGHTS[:3]), ValueError, r"\[3, 3\] for 4 tokens and top-k 3"),
        ((IDS[:, :2], WEIGHTS[:, :2]), ValueError, r"\[4, 2\]"),
        ((IDS, WEIGHTS[:, :2]), ValueError, r"routing weights have shape \[4, 2\]"),
        ((IDS, WEIGHTS, torch.zeros(4, EXPERTS + 1)), RoutingError, r"\[4, 17\]"),
    ],
)
def test_what_a_gate_router_may_not_return(output, error, said):
    with pytest.raises(error, match=said):
        CustomRouter(lambda *args: output, TOP_K, EXPERTS, 0).route(None, tokens(4))


def test_a_gate_router_that_promised_logits_returns_them():
    with pytest.raises(TypeError, match=r"returned 2 values: it must return \(indices, weights, logits\)"):
        CustomRouter(lambda *args: (IDS, WEIGHTS), TOP_K, EXPERTS, 0, has_scores=True).route(None, tokens(4))


@pytest.mark.parametrize("kind", ["custom", "gate"])
def test_another_choice_in_recompute_is_refused(kind):
    choices = iter([IDS, IDS, IDS + 1])

    def gate_router(*args):
        return next(choices), WEIGHTS

    router = CustomRouter(gate_router, TOP_K, EXPERTS, 0) if kind == "custom" else GateRouter(TOP_K, EXPERTS)
    first = router.route(gate_router, tokens(4))
    again = router.route(gate_router, tokens(4), None, first.topk_ids_TK)
    assert torch.equal(again.topk_weights_TK, first.topk_weights_TK)
    with pytest.raises(RoutingError, match="other experts in recompute"):
        router.route(gate_router, tokens(4), None, first.topk_ids_TK)


# ------------------------------------------------------------------------------------------------- the gate's choice


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_that_chooses_is_followed(family):
    gate, *_ = hugging_face(family)
    router = router_of(MoEConfig(module_name="Block"), gate, TOP_K, EXPERTS, 0)
    assert type(router) is GateRouter
    routing = router.route(gate, tokens())
    logits, weights, ids = gate(tokens())
    assert torch.equal(routing.topk_ids_TK, ids)
    assert torch.equal(routing.topk_weights_TK, weights)
    assert torch.equal(routing.logits_TE, logits)
    assert torch.equal(routing.scores_TE, logits.softmax(dim=-1))


def test_a_pair_is_indices_and_weights():
    routing = GateRouter(TOP_K, EXPERTS).route(lambda x: (IDS.int(), WEIGHTS.bfloat16()), tokens(4))
    assert torch.equal(routing.topk_ids_TK, IDS)
    assert torch.equal(routing.topk_weights_TK, WEIGHTS.bfloat16().float())
    assert routing.scores_TE is None


def llama4_gate(x):
    gate = Llama4Router(AutoConfig.for_model("llama4_text", hidden_size=HIDDEN, num_local_experts=EXPERTS))
    return gate(x)


def switch_gate(x):
    config = AutoConfig.for_model("switch_transformers", d_model=HIDDEN, num_experts=EXPERTS)
    return SwitchTransformersTop1Router(config)(x)


LOGITS = torch.randn(4, EXPERTS)


@pytest.mark.parametrize(
    ("gate", "error", "said"),
    [
        (lambda x: (WEIGHTS, IDS), TypeError, "check their order"),
        (llama4_gate, TypeError, "check their order"),
        (switch_gate, TypeError, "check their order"),
        (lambda x: (LOGITS, IDS, WEIGHTS), TypeError, "check their order"),
        (lambda x: (IDS, WEIGHTS, None), TypeError, "check their order"),
        (lambda x: (LOGITS, WEIGHTS, IDS, None), TypeError, "returned 4 values"),
        (lambda x: (LOGITS, WEIGHTS, IDS, 1, 2), TypeError, "returned 5 values"),
        (lambda x: LOGITS, RoutingError, "returned one tensor.*MoEConfig.scoring"),
        (lambda x: None, ValueError, "Expected gate to return tuple.*NoneType"),
        (lambda x: [LOGITS, WEIGHTS, IDS], ValueError, "Expected gate to return tuple.*list"),
        (lambda x: (LOGITS,), ValueError, "Expected gate to return tuple with at least 2"),
        (lambda x: {"ids": IDS}, ValueError, "Expected gate to return tuple.*dict"),
        (lambda x: (LOGITS[:, :5], WEIGHTS, IDS), RoutingError, r"\[4, 5\] for 4 tokens and 16 experts"),
        (lambda x: (LOGITS, WEIGHTS[:2], IDS[:2]), ValueError, r"\[2, 3\] for 4 tokens"),
    ],
)
def test_what_a_gate_may_not_return(gate, error, said):
    with pytest.raises(error, match=said):
        GateRouter(TOP_K, EXPERTS).route(gate, tokens(4))


def test_a_plain_tensor_goes_by_the_scoring():
    gate, scoring, bias = hugging_face("deepseek_v3")
    config = MoEConfig(module_name="Block", scoring=scoring, field_names=MoEFieldNames(bias=bias))
    router = router_of(config, gate, TOP_K, EXPERTS, 0)
    assert type(router) is GateRouter
    _, weights, ids = gate(tokens())
    assert_same_choice(router.route(WithoutTuple(gate), tokens()), weights, ids)


# --------------------------------------------------------------------------------------------------------- branches


def test_the_branch_that_a_configuration_takes():
    gate = LogitsGate()
    raw = {"gate_returns_raw_logits": True, "scoring": Scoring(score="softmax", normalize=True)}
    custom = router_of(MoEConfig(module_name="B", gate_router=print), gate, TOP_K, EXPERTS, 4)
    assert (type(custom), custom.layer_idx, custom.has_scores) == (CustomRouter, 4, False)
    # the function comes before anything that is said about the gate
    both = MoEConfig(module_name="B", gate_router=print, gate_router_gives_logits=True, gate_returns_raw_logits=True)
    custom = router_of(both, gate, TOP_K, EXPERTS, None)
    assert (type(custom), custom.has_scores) == (CustomRouter, True)
    assert type(router_of(MoEConfig(module_name="B", **raw), gate, TOP_K, EXPERTS, 4)) is RawLogitsRouter
    assert type(router_of(MoEConfig(module_name="B"), gate, TOP_K, EXPERTS, 4)) is GateRouter


def test_what_the_block_says_goes_into_the_spec():
    config = MoEConfig(module_name="B", gate_returns_raw_logits=True, scoring=Scoring(score="sigmoid"))
    gate = LogitsGate()
    router = router_of(config, gate, TOP_K, EXPERTS, 0, norm_topk_prob=False, scale=2.0)
    assert (router.spec.normalize, router.spec.scale, router.spec.score) == (False, 2.0, "sigmoid")
    expected = 2.0 * gate(tokens()).sigmoid().topk(TOP_K).values
    assert (router.route(gate, tokens()).topk_weights_TK - expected).abs().max() < 1e-6
    with pytest.raises(ValueError, match="norm_topk_prob is on neither the block nor its gate"):
        router_of(config, gate, TOP_K, EXPERTS, 0)
    gate.norm_topk_prob, gate.routed_scaling_factor = True, 3.0
    named = replace(config, field_names=MoEFieldNames(scale="routed_scaling_factor"))
    router = router_of(named, gate, TOP_K, EXPERTS, 0)
    assert (router.spec.normalize, router.spec.scale) == (True, 3.0)
    assert (router.route(gate, tokens()).topk_weights_TK.sum(dim=-1) - 3).abs().max() < 1e-5
    with pytest.raises(ConfigError, match=r"scale \(nowhere\)"):
        router_of(replace(config, field_names=MoEFieldNames(scale="nowhere")), gate, TOP_K, EXPERTS, 0)
    for top_k in (0, EXPERTS + 1):
        with pytest.raises(RoutingError, match=rf"top-k \({top_k}\)"):
            router_of(config, gate, top_k, EXPERTS, 0, norm_topk_prob=False)
        with pytest.raises(RoutingError, match=rf"top-k \({top_k}\)"):
            router_of(MoEConfig(module_name="B"), gate, top_k, EXPERTS, 0)


def test_bf16_factors_give_float32_logits_and_gradients_rounded_once():
    torch.manual_seed(3)
    x, weight = torch.randn(300, 64).bfloat16().requires_grad_(), torch.randn(24, 64).bfloat16().requires_grad_()
    logits, slope = router_logits(x, weight), torch.randn(300, 24)
    assert logits.dtype == torch.float32
    found = torch.autograd.grad(logits, (x, weight), slope)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = wide[0] @ wide[1].t()
    assert_close(logits.detach(), expected.detach(), dtype=torch.float32)
    for gradient, exact in zip(found, torch.autograd.grad(expected, wide, slope.double()), strict=True):
        assert gradient.dtype == torch.bfloat16
        rounded_once = (exact.bfloat16().double() - exact).norm()
        assert (gradient.double() - exact).norm() < 1.01 * rounded_once
