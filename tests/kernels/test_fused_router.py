"""The router's kernel against `moe.route` and `moe.balance` in float64, values and gradients."""

import pytest
import torch

from moe_train.kernels import RouterRule, route, runs_triton
from moe_train.moe import RouterSpec, route_tokens
from moe_train.moe.balance import score_sums, z_loss
from moe_train.testing import assert_close

CASES = {  # tokens, sequences, experts; a spec
    "softmax": (13, 1, 7, {"score": "softmax", "top_k": 3, "normalize": True}),
    "softmax, several tiles and sequences": (142, 2, 16, {"score": "softmax", "top_k": 2, "normalize": False}),
    "softmax, five programs": (260, 1, 16, {"score": "softmax", "top_k": 2, "normalize": True}),
    "softmax, best group": (
        10,
        1,
        12,
        {"score": "softmax", "top_k": 3, "normalize": False, "num_groups": 3, "topk_groups": 1, "group_score": "best"},
    ),
    "softmax after top-k": (9, 3, 8, {"score": "softmax_after_topk", "top_k": 2, "normalize": False}),
    "softmax, 1024 experts": (2, 1, 1024, {"score": "softmax", "top_k": 32, "normalize": True}),
    "sigmoid, bias, groups": (
        12,
        2,
        60,
        {
            "score": "sigmoid",
            "top_k": 4,
            "normalize": True,
            "eps": 1e-20,
            "scale": 2.5,
            "num_groups": 5,
            "topk_groups": 2,
            "has_bias": True,
        },
    ),
    "sigmoid, groups of one": (
        5,
        1,
        4,
        {"score": "sigmoid", "top_k": 2, "normalize": False, "num_groups": 4, "topk_groups": 3},
    ),
    "sqrtsoftplus, bias, smallest sum": (
        6,
        3,
        16,
        {"score": "sqrtsoftplus", "top_k": 4, "normalize": True, "min_sum": 8.0, "scale": 1.5, "has_bias": True},
    ),
    "one of one": (1, 1, 1, {"score": "softmax", "top_k": 1, "normalize": True}),
    "no tokens": (0, 1, 6, {"score": "sigmoid", "top_k": 2, "normalize": True, "num_groups": 3, "topk_groups": 2}),
}


def rule_of(spec: RouterSpec) -> RouterRule:
    kept = ("score", "top_k", "normalize", "eps", "min_sum", "scale", "num_groups", "topk_groups")
    return RouterRule(**{name: getattr(spec, name) for name in kept}, best_two=spec.group_score == "best_two")


def draw(tokens: int, experts: int, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator) * 3
    return logits.to(device), (torch.randn(experts, generator=generator) * 0.1).to(device)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient(name, device, monkeypatch):
    if runs_triton(device):  # so that adding up takes more than one step and program here, too
        kernel = pytest.importorskip("moe_train.kernels.triton.router")
        monkeypatch.setattr(kernel, "SUMMED_PROGRAMS", 2)
        monkeypatch.setattr(kernel, "SUMMED_EXPERTS", 8)
    tokens, sequences, experts, fields = CASES[name]
    spec = RouterSpec(num_experts=experts, **fields)
    logits, bias = draw(tokens, experts, device)
    if fields["score"] == "sqrtsoftplus":
        logits[0, :3] = torch.tensor([-45.0, 25.0, -90.0])
    bias_E = bias if spec.has_bias else None
    leaf = logits.clone().requires_grad_()
    out = route(leaf, rule_of(spec), bias_E=bias_E, num_sequences=sequences)
    wide = logits.double().requires_grad_()
    expected = route_tokens(wide, spec, None if bias_E is None else bias_E.double())
    sums = list(wide.new_zeros(sequences, experts))
    for sequence in range(sequences):
        part = slice(sequence * tokens // sequences, (sequence + 1) * tokens // sequences)
        routing = route_tokens(wide[part], spec, None, expected.topk_ids_TK[part])
        sums[sequence] = score_sums(routing, spec)
        counted = torch.bincount(expected.topk_ids_TK[part].reshape(-1), minlength=experts)
        assert torch.equal(out.counts_SE[sequence], counted)
    assert torch.equal(out.ids_TK, expected.topk_ids_TK)
    if spec.min_sum:
        small = expected.scores_TE.gather(1, expected.topk_ids_TK).sum(dim=1) < spec.min_sum  # type: ignore[union-attr]
        assert 0 < int(small.sum()) < tokens, "the case shows both sides of the smallest sum"
    values = [
        (out.weights_TK, expected.topk_weights_TK),
        (out.share_sums_SE, torch.stack(sums)),
        (out.z_sum, z_loss(wide)),
    ]
    directions = [torch.randn(b.shape, generator=torch.Generator().manual_seed(3)).to(device) for _, b in values]
    for (actual, wanted), what in zip(values, ("weights", "sums of shares", "z"), strict=True):
        assert_close(actual, wanted, what, dtype=torch.float32)
    torch.autograd.backward([a for a, _ in values], directions)
    torch.autograd.backward([b for _, b in values], [d.double() for d in directions])
    assert_close(leaf.grad, wide.grad, "gradient", dtype=torch.float32)


def test_equal_scores_go_by_the_lowest_index(device):
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0], [0.0, -0.0, 0.0, -1.0, -0.0]], device=device)
    for score in ("softmax", "softmax_after_topk", "sigmoid"):
        ids = route(logits, RouterRule(score=score, top_k=2)).ids_TK
        assert ids.tolist() == [[1, 2], [0, 1]], score
    grouped = RouterRule(score="sigmoid", top_k=2, num_groups=2, topk_groups=1)
    assert route(logits[:, [1, 2, 3, 1, 2, 3]], grouped).ids_TK.tolist() == [[0, 1], [0, 1]]


def test_padding_is_in_no_sum_and_has_no_gradient(device):
    rule = RouterRule(score="sigmoid", top_k=2, normalize=True)
    logits, _ = draw(11, 6, device)
    valid = torch.ones(11, dtype=torch.bool, device=device)
    valid[[0, 4, 10]] = False
    logits[~valid] = float("nan")
    leaf, kept = logits.clone().requires_grad_(), logits[valid].clone().requires_grad_()
    out, expected = route(leaf, rule, valid_T=valid), route(kept, rule)
    assert torch.equal(out.ids_TK[valid], expected.ids_TK)
    assert bool((out.ids_TK[~valid] == -1).all())
    assert torch.equal(out.counts_SE, expected.counts_SE)
    for o in (out, expected):
        (o.weights_TK[:, 0].sum() + o.share_sums_SE[0, 1] + o.z_sum).backward()
    assert_close(out.weights_TK[valid], expected.weights_TK)
    assert not out.weights_TK[~valid].any()
    assert_close(out.share_sums_SE, expected.share_sums_SE)
    assert_close(out.z_sum, expected.z_sum)
    assert leaf.grad is not None
    assert_close(leaf.grad[valid], kept.grad)
    assert not leaf.grad[~valid].any()


def test_a_replayed_choice_is_weighed_and_not_made_again(device):
    rule = RouterRule(score="softmax", top_k=2, normalize=True)
    logits, _ = draw(7, 5, device)
    first = route(logits, rule)
    again = route(logits, rule, chosen_TK=first.ids_TK)
    assert torch.equal(first.weights_TK, again.weights_TK)
    assert torch.equal(first.counts_SE, again.counts_SE)
    other = torch.stack([torch.arange(7) % 5, (torch.arange(7) + 2) % 5], dim=1).to(device)
    told = route(logits, rule, chosen_TK=other)
    chosen = logits.double().softmax(-1).gather(1, other)
    assert torch.equal(told.ids_TK, other)
    assert_close(told.weights_TK, chosen / chosen.sum(-1, keepdim=True), dtype=torch.float32)


def test_nan_and_infinity_choose_legal_experts(device):
    logits, _ = draw(6, 6, device)
    logits[0], logits[1, 3], logits[2], logits[3, :4] = float("nan"), float("nan"), float("-inf"), float("-inf")
    logits[4, 2], logits[5] = float("inf"), float("inf")
    for rule in (
        RouterRule(score="softmax_after_topk", top_k=4),
        RouterRule(score="sigmoid", top_k=3, num_groups=3, topk_groups=2),
    ):
        ids = route(logits, rule).ids_TK
        assert bool(((ids >= 0) & (ids < 6)).all())
        assert all(len(set(row)) == rule.top_k for row in ids.tolist())
    first = route(logits, RouterRule(score="softmax_after_topk", top_k=1)).ids_TK.squeeze(1).tolist()
    assert first[1] == 3, "NaN counts as largest, as in torch.topk"
    assert first[4] == 2


def test_the_same_bits_twice(device):
    rule = RouterRule(score="softmax", top_k=3, normalize=True)
    logits, _ = draw(150, 12, device)
    passes = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        out = route(leaf, rule, num_sequences=3)
        (out.weights_TK.square().sum() + out.share_sums_SE.square().sum() + out.z_sum).backward()
        passes.append([out.weights_TK, out.share_sums_SE, out.z_sum, leaf.grad])
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
