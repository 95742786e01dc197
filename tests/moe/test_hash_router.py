"""Routing by token id: the table chooses, the gate's scores weigh."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter

from moe_train.errors import RoutingError
from moe_train.moe.config import MoEConfig
from moe_train.moe.route import RouterSpec, router_logits
from moe_train.moe.router import HashRouter, router_of

EXPERTS, TOP_K, HIDDEN, TOKENS = 16, 3, 12, 200
VOCABULARY = 50
HASH_SPEC = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, score="sqrtsoftplus", normalize=True, eps=1e-20, scale=2.5)


class HashGate(nn.Module):
    def __init__(self, double=False, table_dtype=torch.int64):
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, dtype=torch.float64 if double else torch.float32))
        table = torch.randint(EXPERTS, (VOCABULARY, TOP_K), generator=torch.Generator().manual_seed(6))
        table[3] = torch.tensor([4, 4, 1])  # an expert twice in a row
        self.register_buffer("tid2eid", table.to(table_dtype))

    def forward(self, x):
        return router_logits(x, self.weight)


def deepseek_v4():
    config = AutoConfig.for_model(
        "deepseek_v4",
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        routed_scaling_factor=2.5,
        scoring_func="sqrtsoftplus",
        vocab_size=VOCABULARY,
    )
    router = DeepseekV4HashRouter(config)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(4))
    return router


def tokens(count=TOKENS, dtype=torch.float32):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype)


def token_ids(count=TOKENS):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(9))


def test_hash_routing_as_hugging_face_does_it():
    theirs = deepseek_v4()
    ours = HashGate()
    theirs.load_state_dict({"weight": ours.weight.detach(), "tid2eid": ours.tid2eid}, strict=False)
    x, expected_x = tokens().requires_grad_(), tokens().requires_grad_()
    routing = HashRouter(HASH_SPEC, "tid2eid").route(ours, x, token_ids())
    _, weights, ids = theirs(expected_x, token_ids())
    assert torch.equal(routing.topk_ids_TK, ids)
    assert torch.equal(ids, ours.tid2eid[token_ids()])
    assert (routing.topk_weights_TK - weights).abs().max() < 1e-6
    out_grad = torch.randn(weights.shape)
    routing.topk_weights_TK.backward(out_grad)
    weights.backward(out_grad)
    assert (ours.weight.grad - theirs.weight.grad).abs().max() < 1e-5
    assert (x.grad - expected_x.grad).abs().max() < 1e-5


def test_hash_routing_by_loops_in_float64():
    gate, ids = HashGate(double=True), torch.tensor([3, 7, 3, 49, 0])
    x = tokens(5, torch.float64)
    routing = HashRouter(HASH_SPEC, "tid2eid").route(gate, x, ids.view(5, 1).to(torch.int32))
    for token in range(5):
        row = gate.tid2eid[ids[token]].tolist()
        scores = [float(torch.log1p(torch.exp(x[token] @ gate.weight[expert].detach())).sqrt()) for expert in row]
        expected = [2.5 * score / sum(scores) for score in scores]
        assert routing.topk_ids_TK[token].tolist() == row
        assert routing.topk_weights_TK[token].tolist() == pytest.approx(expected, rel=1e-12)
    router = HashRouter(HASH_SPEC, lambda gate: gate.tid2eid)
    weight = gate.weight.detach().requires_grad_()

    def weights(x, weight):
        gate.forward = lambda x: router_logits(x, weight)
        return router.route(gate, x, ids).topk_weights_TK

    assert torch.autograd.gradcheck(weights, (x.requires_grad_(), weight))


def test_hash_routing_is_replayed_without_ids():
    gate, router = HashGate(table_dtype=torch.int32), HashRouter(HASH_SPEC, "tid2eid")
    first = router.route(gate, tokens(), token_ids())
    again = router.route(gate, tokens(), None, first.topk_ids_TK)
    assert first.topk_ids_TK.dtype == torch.int64
    assert torch.equal(first.topk_weights_TK, again.topk_weights_TK)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (None, "requires input_ids.*inputs_embeds"),
        (torch.zeros(TOKENS - 1, dtype=torch.int64), f"{TOKENS - 1} input_ids for {TOKENS} tokens"),
        (torch.zeros(TOKENS), "integers, not a tensor of torch.float32"),
        (torch.full((TOKENS,), VOCABULARY), f"between {VOCABULARY} and {VOCABULARY}, .*0..{VOCABULARY - 1}"),
        (torch.full((TOKENS,), -100), "between -100 and -100"),
    ],
)
def test_input_ids_that_are_refused(ids, said):
    with pytest.raises(ValueError, match=said):
        HashRouter(HASH_SPEC, "tid2eid").route(HashGate(), tokens(), ids)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "has no table"),
        (torch.zeros(VOCABULARY, TOP_K), "of torch.float32"),
        (torch.zeros(VOCABULARY, TOP_K, dtype=torch.bool), "of torch.bool"),
        (torch.zeros(VOCABULARY, TOP_K + 1, dtype=torch.int64), r"\[50, 4\].*\[vocabulary, 3\]"),
        (torch.zeros(VOCABULARY, dtype=torch.int64), r"is \[50\]"),
        (torch.zeros(0, TOP_K, dtype=torch.int64), r"\[0, 3\]"),
        (torch.full((VOCABULARY, TOP_K), EXPERTS), "between 16 and 16, and the experts are 0..15"),
        (torch.full((VOCABULARY, TOP_K), -1), "between -1 and -1"),
    ],
)
def test_tables_that_are_refused(table, said):
    with pytest.raises(RoutingError, match=said):
        HashRouter(HASH_SPEC, lambda gate: table).route(HashGate(), tokens(), token_ids())
    if table is None:
        with pytest.raises(RoutingError, match=r"has no table.*\(nowhere\)"):
            HashRouter(HASH_SPEC, "nowhere").route(HashGate(), tokens(), token_ids())


def test_a_gate_that_wants_input_ids_gets_them():
    gate = deepseek_v4()
    gate.tid2eid.copy_(HashGate().tid2eid)
    router = router_of(MoEConfig(module_name="Block"), gate, TOP_K, EXPERTS, 0)
    assert router.uses_input_ids
    routing = router.route(gate, tokens(), token_ids())
    assert torch.equal(routing.topk_ids_TK, gate.tid2eid[token_ids()])
    assert torch.equal(routing.topk_weights_TK, gate(tokens(), token_ids())[1])
    with pytest.raises(ValueError, match="requires input_ids"):
        router.route(gate, tokens())
    with pytest.raises(ValueError, match="3 input_ids for 200 tokens"):
        router.route(gate, tokens(), token_ids(3))
