"""Root-mean-square norm as one operator, for rows of any width: hidden states, or the heads of queries and keys."""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.operator import Operator


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the type of x; float32 in between.

    Rounded once. Hugging Face's modules round to the type of x before they multiply by the weight, too.
    Saves x, the weight and a float32 per row.
    """
    x_TH = x.reshape(-1, x.shape[-1])
    y_TH, _ = _rms_norm(x_TH if x_TH.stride(1) == 1 else x_TH.contiguous(), weight_H, eps)
    return y_TH.view(x.shape)


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_implementation("norm", x_TH).forward(x_TH, weight_H, eps)


def fake_forward(x_TH, weight_H, eps):
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape[0], dtype=wide)


def backward(
    dy_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, scale_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_implementation("norm", x_TH).backward(dy_TH.contiguous(), x_TH, weight_H, scale_T)


def fake_backward(dy_TH, x_TH, weight_H, scale_T):
    return x_TH.new_empty(x_TH.shape), torch.empty_like(weight_H)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _adjoint(ctx, dy_TH, _):
    if dy_TH is None:
        return None, None, None
    return *_rms_norm_backward(dy_TH, *ctx.saved_tensors), None


_rms_norm_backward = Operator("rms_norm_backward", backward, fake_backward)
_rms_norm = Operator("rms_norm", forward, fake_forward, _save, _adjoint)
