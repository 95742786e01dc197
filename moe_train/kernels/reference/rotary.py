"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the layout of GPT-NeoX: element i turns with i + D / 2.

B sequences, S positions, N heads, D their width; P rows of angles, S or B * S. Computed in float32, rounded once.
"""

import torch


def forward(x_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    """x * cos + (-second half, first half) * sin, row of angles (b * S + s) mod P."""
    first, second, cos, sin = _wide(x_BSND, cos_PD, sin_PD)
    half = x_BSND.shape[-1] // 2
    turned = first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]
    return torch.cat(turned, dim=-1).to(x_BSND.dtype)


def backward(dy_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
    """Gradient of x."""
    first, second, cos, sin = _wide(dy_BSND, cos_PD, sin_PD)
    half = dy_BSND.shape[-1] // 2
    turned = first * cos[..., :half] + second * sin[..., half:], second * cos[..., half:] - first * sin[..., :half]
    return torch.cat(turned, dim=-1).to(dy_BSND.dtype)


def _wide(
    x_BSND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both halves of x, and the angles of every row of heads, in float32 or wider."""
    sequences, length, _, width = x_BSND.shape
    wide = torch.promote_types(x_BSND.dtype, torch.float32)
    first, second = x_BSND.to(wide).chunk(2, dim=-1)
    cos, sin = (angles.to(wide).view(-1, length, 1, width) for angles in (cos_PD, sin_PD))
    return first, second, cos.expand(sequences, -1, -1, -1), sin.expand(sequences, -1, -1, -1)
