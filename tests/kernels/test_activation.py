"""Gated activations against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from moe_train.kernels import ACTIVATION_NAMES
from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize(("rows", "there", "inner", "dtype"), [(7, 5, 3, torch.float32), (3, 3, 300, torch.bfloat16)])
def test_output_and_gradients(name, rows, there, inner, dtype, device):
    kernel = implementation("activation", device)
    generator = torch.Generator().manual_seed(rows)
    h = (torch.randn(rows, 2 * inner, generator=generator) * 4).to(device, dtype)
    dout = torch.randn(rows, inner, generator=generator).to(device, dtype)
    h[there:], dout[there:] = float("nan"), float("nan")  # rows of padding
    order = torch.randperm(rows, generator=generator).to(device)
    weights = torch.rand(rows, generator=generator).to(device)
    offsets = torch.tensor([1, there], dtype=torch.int32, device=device)
    out = kernel.forward(h, offsets, weights, order, name)
    dh, again, dweights = kernel.backward(dout, h, offsets, weights, order, name)
    over = dout.clone()
    in_place = kernel.backward(over, h, offsets, weights, order, name, in_place=True)
    assert (in_place[1] is over) == ("triton" in kernel.__name__)
    assert all(torch.equal(a[:there], b[:there]) for a, b in zip((dh, again), in_place[:2], strict=True))
    assert torch.equal(dweights, in_place[2])

    wide = h[:there].double().requires_grad_()
    by_copy = weights.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = FUNCTIONS[name](gate) * up * by_copy[order[:there]].unsqueeze(1)
    expected.backward(dout[:there].double())
    assert_close(out[:there], expected.detach(), "output", dtype=dtype)
    assert torch.equal(out[:there], again[:there])
    assert_close(dh[:there], wide.grad, "dh", dtype=dtype)
    assert_close(dweights, by_copy.grad, "d weights", dtype=torch.float32)
    assert not dweights[order[there:]].any()
