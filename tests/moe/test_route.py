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
from moe_train.moe.route import check_routing, sqrt_softplus

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
        RouterSpec(num_experts=6, top_k=2, score="sqrtsoftplus", normalize=True, eps=1e-20, scale=2.5),
        RouterSpec(num_experts=6, top_k=2, score="sqrtsoftplus", normalize=False),
        RouterSpec(num_experts=6, top_k=3, score="softmax_after_topk", normalize=False, scale=0.5),
        RouterSpec(num_experts=6, top_k=2, score="softmax", normalize=True, min_sum=0.7),
    ],
    ids=lambda spec: f"{spec.score}-{spec.normalize}-{spec.min_sum}",
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
        ({"score": "sparsemixer"}, r"score \(sparsemixer\) must be one of softmax, softmax_after_topk, sigmoid"),
        ({"group_score": "sum"}, r"group_score \(sum\) must be one of best_two, best"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(RoutingError, match=said):
        RouterSpec(**{"num_experts": 8, "top_k": 2, "score": "softmax", "normalize": True, **fields})


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_and_weights_to_the_last_bit(score, normalize):
    """The formulas written out, as runs so far computed them: no option may change a bit of the others."""
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    bias = torch.linspace(-0.2, 0.2, 16)
    scores = logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()
    groups = (scores + bias).view(50, 4, 4)
    best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(2, dim=-1).indices
    kept = torch.zeros(50, 4, dtype=torch.bool).scatter_(1, best, True)
    ids = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(50, 16).topk(3, dim=-1).indices
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    spec = RouterSpec(
        num_experts=16,
        top_k=3,
        score=score,
        normalize=normalize,
        eps=1e-20,
        scale=2.5,
        num_groups=4,
        topk_groups=2,
        has_bias=True,
    )
    routing = route_tokens(logits, spec, bias)
    assert torch.equal(routing.scores_TE, scores)
    assert torch.equal(routing.topk_ids_TK, ids)
    assert torch.equal(routing.topk_weights_TK, weights * 2.5)


def test_softmax_after_the_choice():
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.0]], dtype=torch.float64)
    spec = RouterSpec(num_experts=4, top_k=2, score="softmax_after_topk", normalize=True, has_bias=True)
    routing = route_tokens(logits, spec, torch.tensor([2.5, 0.0, 0.0, 0.0]))
    assert routing.topk_ids_TK.tolist() == [[0, 1]], "3.5 and 3.0: the bias is in the choice"
    e = torch.exp(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert (routing.topk_weights_TK - e / e.sum()).abs().max() < 1e-15, "and in no weight"
    assert torch.equal(routing.scores_TE, logits.softmax(dim=-1))
    replayed = route_tokens(logits, spec, topk_ids_TK=routing.topk_ids_TK)
    assert torch.equal(replayed.topk_weights_TK, routing.topk_weights_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sqrt_softplus_far_from_zero(dtype):
    """Its gradient stays finite where softplus itself vanishes: a token with such a logit must not end the run."""
    x = torch.tensor([-1000.0, -150.0, -90.0, -41.0, -39.0, -1.0, 0.0, 30.0, 1000.0], dtype=dtype, requires_grad=True)
    y = sqrt_softplus(x)
    y.sum().backward()
    exact = x.detach().double()
    root = torch.where(exact < -30, (exact / 2).exp(), torch.nn.functional.softplus(exact, threshold=700).sqrt())
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    representable = root > torch.finfo(dtype).tiny
    assert ((y.double() - root).abs() <= bound * root)[representable].all()
    slope = exact.sigmoid() / (2 * root.clamp(min=1e-300))
    assert torch.isfinite(x.grad).all()
    assert (x.grad.double() - slope).abs().max() < 1e-6


def test_the_best_expert_of_a_group_or_its_best_two():
    logits = torch.tensor([[0.9, 0.0, 0.6, 0.6]]).logit(eps=1e-6)
    fields = {"num_experts": 4, "top_k": 1, "score": "sigmoid", "normalize": False, "num_groups": 2}
    chosen = {
        kind: route_tokens(logits, RouterSpec(**fields, group_score=kind)).topk_ids_TK.item()
        for kind in ("best", "best_two")
    }
    assert chosen["best"] == 0
    assert chosen["best_two"] in (2, 3)


def test_a_sum_is_not_divided_by_less_than_its_bound():
    spec = RouterSpec(num_experts=3, top_k=2, score="sigmoid", normalize=True, min_sum=1.0)
    logits = torch.tensor([[0.1, 0.2, 0.05], [0.9, 0.8, 0.1]]).logit()
    weights = route_tokens(logits, spec).topk_weights_TK
    expected = torch.tensor([[0.2, 0.1], [0.9 / 1.7, 0.8 / 1.7]])
    assert (weights - expected).abs().max() < 1e-6


IDS, WEIGHTS = torch.tensor([[0, 3], [2, 1], [3, 3]]), torch.rand(3, 2)


def test_a_routing_that_is_right():
    check_routing(IDS, WEIGHTS, 3, 2, 4)
    check_routing(IDS[:0], WEIGHTS[:0].bfloat16(), 0, 2, 4)
    check_routing(IDS + 9, WEIGHTS, 3, 2, 4, check_range=False)


@pytest.mark.parametrize(
    ("ids", "weights", "said"),
    [
        (IDS.int(), WEIGHTS, "int64 tensor, not a tensor of torch.int32"),
        (IDS.float(), WEIGHTS, "int64 tensor, not a tensor of torch.float32"),
        (IDS.tolist(), WEIGHTS, "int64 tensor, not list"),
        (IDS, IDS, "floating-point tensor, not a tensor of torch.int64"),
        (IDS, None, "floating-point tensor, not NoneType"),
        (IDS[:2], WEIGHTS, r"expert ids have shape \[2, 2\] for 3 tokens and top-k 2"),
        (IDS, WEIGHTS[:, :1], r"routing weights have shape \[3, 1\]"),
        (IDS.view(1, 3, 2), WEIGHTS, r"shape \[1, 3, 2\]"),
        (IDS - 1, WEIGHTS, r"between -1 and 2, and the experts are 0..3"),
        (IDS + 1, WEIGHTS, r"between 1 and 4, and the experts are 0..3"),
    ],
)
@pytest.mark.parametrize("check_range", [True, False])
def test_a_routing_that_is_refused(ids, weights, said, check_range):
    if not check_range and "between" in said:
        return check_routing(ids, weights, 3, 2, 4, check_range=False)  # it was not asked to look
    with pytest.raises(ValueError, match=said):
        check_routing(ids, weights, 3, 2, 4, check_range=check_range)
