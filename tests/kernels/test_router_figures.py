"""Sums of what diagnostics show of a routing decision, against the formulas in float64."""

import pytest
import torch

from moe_train.kernels import router_figures
from moe_train.kernels.choose import implementation
from moe_train.kernels.reference.router_figures import ROWS
from moe_train.moe.route import score_experts


def expected(logits: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    out = torch.zeros(-(-len(logits) // ROWS), 4, dtype=torch.float64)
    for token, (x, row, score) in enumerate(zip(logits.double(), ids.tolist(), scores.double(), strict=True)):
        share = score / score.sum()
        wanted = [~expert if expert < 0 else expert for expert in row]
        chosen = sum(float(share[expert]) for expert in wanted if expert < len(x))
        out[token // ROWS] += torch.tensor(
            [float(share.max()), chosen, float(x @ x), float(x.logsumexp(0))], dtype=torch.float64
        )
    return out


@pytest.mark.parametrize("given", [False, True], ids=["scores from logits", "scores given"])
@pytest.mark.parametrize("score", ["softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(("tokens", "experts"), [(6, 5), (ROWS + 1, 64), (2 * ROWS, 3), (5, 1024), (0, 4)])
def test_sums(tokens, experts, score, given, device):
    generator = torch.Generator().manual_seed(tokens + experts)
    logits = 4 * torch.randn(tokens, experts, generator=generator)
    if tokens:
        logits[0, 0] = 90.0  # one expert has all the share
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :3].contiguous()
    if tokens:
        ids[1, 1], ids[2, 0] = ~ids[1, 1], ~experts  # no room there; of no expert
    scores = score_experts(logits, score)
    if given:
        scores = scores + 0.25
    arguments = (logits.to(device), ids.to(device), score)
    if given:
        found = router_figures(*arguments, scores.to(device)).cpu()
    else:
        found = implementation("router_figures", device).forward(*arguments).cpu()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(logits, ids, scores), rtol=2e-6, atol=1e-6)


def test_of_float64_logits_nothing_is_rounded():
    logits = torch.randn(70, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ids = logits.detach().topk(2, dim=1).indices
    found = router_figures(logits, ids, "sigmoid")
    assert not found.requires_grad
    logits = logits.detach()
    torch.testing.assert_close(found, expected(logits, ids, logits.sigmoid()), rtol=1e-13, atol=1e-12)
