"""Rotary position embedding as one operator."""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.operator import Operator


def rotate(x_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [B, N, S, D], turned by the angles [1 or B, S, D] of their positions; same shape and type.

    Each row is computed in float32 and rounded once. In memory the heads of a position are neighbours, as a projection
    leaves them. Saves the angles alone.
    """
    cos_PD, sin_PD = (angles.reshape(-1, angles.shape[-1]).contiguous() for angles in (cos, sin))
    return _rotate(x_BNSD.transpose(1, 2).contiguous(), cos_PD, sin_PD).transpose(1, 2)


def forward(x_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    return dense_implementation("rotary", x_BSND).forward(x_BSND, cos_PD, sin_PD)


def backward(dy_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    return dense_implementation("rotary", dy_BSND).backward(dy_BSND.contiguous(), cos_PD, sin_PD)


def fake(x_BSND, cos_PD, sin_PD):
    return x_BSND.new_empty(x_BSND.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _adjoint(ctx, dy_BSND):
    return _rotate_backward(dy_BSND, *ctx.saved_tensors), None, None


_rotate_backward = Operator("rotate_backward", backward, fake)
_rotate = Operator("rotate", forward, fake, _save, _adjoint)
