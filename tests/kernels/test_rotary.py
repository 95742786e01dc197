"""Rotary embedding against the family's own in float64."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb

from moe_train.kernels import rotate
from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close


def drawn(sequences, length, heads, width, own_angles, dtype):
    generator = torch.Generator().manual_seed(length + width)
    x = torch.randn(sequences, length, heads, width, generator=generator).to(dtype)
    dy = torch.randn(sequences, length, heads, width, generator=generator).to(dtype)
    # the two halves have other angles here, so that none can be taken for the other
    cos, sin = (torch.randn(sequences if own_angles else 1, length, width, generator=generator).to(dtype) for _ in "12")
    return x, dy, cos, sin


def expected_of(x, dy, cos, sin):
    x = x.detach().double().requires_grad_()
    y, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos.double(), sin.double())
    y = y.transpose(1, 2)
    y.backward(dy.double())
    return y.detach(), x.grad


@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 5, 3, 8), (1, 33, 1, 6), (3, 7, 4, 128), (2, 1, 2, 2), (0, 3, 2, 4)])
def test_output_and_gradient(size, dtype, own_angles, device):
    kernel = implementation("rotary", device)
    x, dy, cos, sin = (t.to(device) for t in drawn(*size, own_angles, dtype))
    angles = [t.reshape(-1, t.shape[-1]) for t in (cos, sin)]
    values, of_x = expected_of(x, dy, cos, sin)
    assert_close(kernel.forward(x, *angles), values, "y", dtype=dtype)
    assert_close(kernel.backward(dy, *angles), of_x, "dx", dtype=dtype)


def test_heads_first_as_attention_has_them():
    x, dy, cos, sin = drawn(2, 9, 3, 8, True, torch.float64)
    values, of_x = expected_of(x, dy, cos, sin)
    leaf = x.requires_grad_()
    y = rotate(leaf.transpose(1, 2), cos, sin)
    y.transpose(1, 2).backward(dy)
    assert_close(y.detach(), values.transpose(1, 2))
    assert_close(leaf.grad, of_x)
    assert y.transpose(1, 2).is_contiguous(), "no copy before attention"


def test_operator_is_registered_soundly():
    from moe_train.kernels.rotary import _rotate

    x, _, cos, sin = drawn(2, 3, 2, 4, False, torch.float32)
    torch.library.opcheck(_rotate.registered, (x.requires_grad_(), cos.view(-1, 4), sin.view(-1, 4)))
