"""What a watcher keeps of each token, against the formulas."""

import pytest
import torch

from moe_train.moe.route import score_experts
from moe_train.moe.statistics import token_figures


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_figures_of_tokens(score):
    logits = 4 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    # the second choice of the second token has no room (~3), that of the third is of no expert (~5)
    ids = torch.tensor([[0, 1], [2, ~3], [4, ~5], [1, 0], [3, 4], [0, 2]])
    scores = score_experts(logits, score)
    found, logsumexp = token_figures(logits, None if score == "softmax" else scores, ids)
    shares = scores / scores.sum(dim=1, keepdim=True)
    chosen = shares[torch.arange(6).unsqueeze(1), torch.tensor([[0, 1], [2, 3], [4, 0], [1, 0], [3, 4], [0, 2]])]
    chosen[2, 1] = 0.0
    torch.testing.assert_close(found, torch.cat([shares.max(dim=1, keepdim=True).values, chosen], dim=1))
    torch.testing.assert_close(logsumexp, logits.logsumexp(dim=1))
