"""Routing against Hugging Face's routers, and its gradient."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_train.errors import RoutingError
from moe_train.model.profiles import PROFILES, profile_of
from moe_train.moe import RouterSpec, route_tokens, router_logits

ROUTERS = {
    "mixtral": (MixtralTopKRouter, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (Qwen3MoeTopKRouter, {"num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen2_moe": (Qwen2MoeTopKRouter, {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}),
    "olmoe": (OlmoeTopKRouter, {"num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": False}),
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5},
    ),
}


def test_every_profile_is_compared():
    assert set(ROUTERS) == set(PROFILES)


@pytest.mark.parametrize("family", ROUTERS)
def test_same_experts_and_weights_as_hugging_face(family):
    router_class, fields = ROUTERS[family]
    config = AutoConfig.for_model(family, hidden_size=24, **fields)
    torch.manual_seed(0)
    router = router_class(config)
    torch.nn.init.normal_(router.weight)
    bias = None
    if profile_of(family).names.bias:
        bias = router.e_score_correction_bias
        bias.normal_(std=0.3)
    x = torch.randn(200, 24)
    _, expected_weights, expected_ids = router(x)
    routing = route_tokens(router_logits(x, router.weight), profile_of(family).spec(config), bias)
    ours = torch.zeros(200, routing.scores_TE.shape[1]).scatter_(1, routing.topk_ids_TK, routing.topk_weights_TK)
    theirs = torch.zeros_like(ours).scatter_(1, expected_ids, expected_weights)
    assert torch.equal(ours != 0, theirs != 0)
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(num_experts=6, top_k=2, score="softmax", normalize=True),
        RouterSpec(num_experts=6, top_k=3, score="softmax", normalize=False),
        RouterSpec(num_experts=6, top_k=2, score="sigmoid", normalize=True, eps=1e-20, scale=2.5),
    ],
    ids=lambda spec: f"{spec.score}-{spec.normalize}",
)
def test_gradient_of_the_weights(spec):
    torch.manual_seed(1)
    x, weight = torch.randn(4, 5).double().requires_grad_(), torch.randn(6, 5).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, w: route_tokens(router_logits(x, w), spec).topk_weights_TK, (x, weight))


def test_logits_are_float32_for_bfloat16_tokens():
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(8, 32).bfloat16()
    assert torch.equal(router_logits(x, weight), x.float() @ weight.float().t())


def test_the_bias_moves_the_choice_and_not_the_weights():
    spec = RouterSpec(num_experts=4, top_k=1, score="sigmoid", normalize=False, has_bias=True)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = route_tokens(logits, spec, torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert routing.topk_ids_TK.tolist() == [[3]]
    assert torch.equal(routing.topk_weights_TK, torch.sigmoid(logits[:, 3:]))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_k": 9}, r"top-k \(9\)"),
        ({"top_k": 0}, r"top-k \(0\)"),
        ({"top_k": None}, r"top-k \(None\)"),
        ({"num_groups": 3}, r"n_group \(3\)"),
        ({"num_groups": 4, "topk_groups": 1, "top_k": 3}, "exceeds the 2 experts"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(RoutingError, match=said):
        RouterSpec(**{"num_experts": 8, "top_k": 2, "score": "softmax", "normalize": True, **fields})
