"""One pass of AdamW against torch's own, over several steps."""

import pytest
import torch

from moe_train.kernels import AdamWRule
from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close

RULE = AdamWRule(lr=0.03, beta_1=0.9, beta_2=0.95, eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("used", [None, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 2500])
def test_three_steps(size, given, used, device):
    kernel = implementation("adamw", device)
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator)
    master = start.to(device)
    moments = torch.zeros_like(master), torch.zeros_like(master)
    weights = None if used is None else torch.empty(size, dtype=used, device=device)
    theirs = torch.nn.Parameter(start.double())
    options = {"lr": RULE.lr, "betas": (0.9, 0.95), "eps": RULE.eps, "weight_decay": RULE.weight_decay}
    optimizer = torch.optim.AdamW([theirs], **options)
    for step in range(1, 4):
        gradient = torch.randn(size, generator=generator).to(given)
        corrections = torch.tensor([1 - 0.9**step, (1 - 0.95**step) ** 0.5], device=device)
        factor = torch.tensor([0.25], device=device)
        kernel.step_(master, *moments, gradient.to(device), factor, corrections, weights, RULE)
        theirs.grad = gradient.double() * 0.25
        optimizer.step()
    assert_close(master, theirs.detach(), "weights", dtype=torch.float32)
    if size:
        for mine, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            assert_close(mine, optimizer.state[theirs][name], name, dtype=torch.float32)
    if weights is not None:
        assert_close(weights, master, "weights in use", dtype=used)  # the interpreter cuts off what does not fit
