"""Root-mean-square norm against autograd in float64, and against the modules it stands in for."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from moe_train.kernels import rms_norm
from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close


def expected_of(x, weight, eps, dy):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    y.backward(dy.double())
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (37, 5), (70, 128), (3, 300), (2, 5000), (0, 4)])
def test_output_and_gradients(rows, width, dtype, device):
    kernel = implementation("norm", device)
    generator = torch.Generator().manual_seed(rows + width)
    wider = (3 * torch.randn(rows, width + 2, generator=generator)).to(device, dtype)
    x = wider[:, :width]  # a part of longer rows, as latent keys are
    weight = torch.randn(width, generator=generator).to(device, dtype)
    dy = torch.randn(rows, width, generator=generator).to(device, dtype)
    y, scale = kernel.forward(x, weight, 0.5)
    dx, dweight = kernel.backward(dy, x, weight, scale)
    values, of_x, of_weight = expected_of(x, weight, 0.5, dy)
    assert_close(y, values, "y", dtype=dtype)
    assert_close(dx, of_x, "dx", dtype=dtype)
    assert_close(dweight, of_weight, "d weight", dtype=dtype)
    assert y.dtype == dx.dtype == dweight.dtype == dtype


def test_more_blocks_than_programs(device, monkeypatch):
    kernel = implementation("norm", device)
    if hasattr(kernel, "PROGRAMS"):
        monkeypatch.setattr(kernel, "PROGRAMS", 3)
    x, dy = torch.randn(200, 128, device=device), torch.randn(200, 128, device=device)
    weight = torch.randn(128, device=device)
    dx, dweight = kernel.backward(dy, x, weight, kernel.forward(x, weight, 1e-6)[1])
    _, of_x, of_weight = expected_of(x, weight, 1e-6, dy)
    assert_close(dx, of_x, "dx")
    assert_close(dweight, of_weight, "d weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_family_s_norm(dtype):
    theirs = Qwen3MoeRMSNorm(24, eps=1e-5).to(dtype)
    theirs.weight.data.normal_(1.0, 0.3)
    x = torch.randn(2, 3, 24, dtype=dtype).transpose(0, 1).requires_grad_()
    dy = torch.randn(3, 2, 24, dtype=dtype)
    # theirs computes in float32 whatever it is given
    tolerated = torch.float32 if dtype == torch.float64 else dtype
    assert_close(rms_norm(x, theirs.weight, 1e-5).detach(), theirs(x).detach(), dtype=tolerated)
    ours = torch.autograd.grad(rms_norm(x, theirs.weight, 1e-5), (x, theirs.weight), dy)
    for mine, their in zip(ours, torch.autograd.grad(theirs(x), (x, theirs.weight), dy), strict=True):
        assert_close(mine, their, dtype=tolerated)


def test_float64_is_exact():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (x, weight))


def test_operator_is_registered_soundly():
    from moe_train.kernels.norm import _rms_norm

    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(_rms_norm.registered, (x, weight, 1e-6))
