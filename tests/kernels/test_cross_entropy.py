"""Cross-entropy and its slope against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (9, 61), (3, 20000), (0, 5)])
def test_losses_and_slope(tokens, vocabulary, dtype, device):
    kernel = implementation("cross_entropy", device)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (30 * torch.randn(tokens, vocabulary, generator=generator)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none")
    expected.sum().backward()
    before = logits.clone()
    assert_close(kernel.cross_entropy_(logits, labels, False), expected.detach(), "losses", torch.float32)
    assert torch.equal(logits, before), "without a slope the logits stay"
    assert_close(kernel.cross_entropy_(logits, labels, True), expected.detach(), "losses", torch.float32)
    assert_close(logits, wide.grad, "slope", dtype)


def test_a_sure_token_keeps_its_slope(device):
    """p is 1 in bf16, p - 1 is not 0."""
    logits = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16, device=device)
    implementation("cross_entropy", device).cross_entropy_(logits, torch.tensor([0], device=device), True)
    assert_close(logits, torch.tensor([[-1.0, 1.0]], device=device) / (1 + torch.e**7), dtype=torch.bfloat16)


def test_what_is_not_a_number_is_a_loss_that_is_none(device):
    logits = torch.zeros(2, 70, device=device)
    logits[1, 33] = float("nan")
    found = implementation("cross_entropy", device).cross_entropy_(logits, torch.tensor([0, 0], device=device), True)
    assert found[0].isfinite()
    assert found[1].isnan()
