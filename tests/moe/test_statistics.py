"""What a watcher keeps of a step, against the formulas."""

from types import SimpleNamespace

import torch

from moe_train.moe.statistics import StepStatistics


def test_forwards_whose_tokens_have_up_to_two_and_three_experts():
    """As expert choice has them; a layer without logits shows nothing."""
    step = StepStatistics(2, 5, torch.device("cpu"))
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    rows = SimpleNamespace(travel=None, rows_per_slot=torch.tensor([3, 1, 0, 0, 2]))
    shares, expected = logits.softmax(dim=1), 0.0
    for ids in (torch.tensor([[0, 1]] * 4), torch.tensor([[0, 1, 2], [3, ~5, ~5], [4, 1, ~5], [2, 3, 4]])):
        own = SimpleNamespace(logits_TE=logits, scores_TE=None, topk_ids_TK=ids)
        step.see(1, own, "softmax", rows)
        step.see(0, SimpleNamespace(logits_TE=None, topk_ids_TK=ids), "softmax", rows)
        expected += sum(float(shares[t, e]) for t, row in enumerate(ids.tolist()) for e in row if e >= 0)
    sums = step.sums_LF(5)
    assert sums[0].tolist() == [0.0] * 5
    assert sums[1, 0] == 8
    assert abs(float(sums[1, 2]) - expected) < 1e-5
    assert abs(float(sums[1, 1]) - 2 * float(shares.amax(dim=1).sum())) < 1e-5
    assert step.rows_LQ()[:, :2].tolist() == [[12.0, 6.0], [12.0, 6.0]]
