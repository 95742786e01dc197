"""Root-mean-square norm over the last dimension (RMSNorm, arXiv 1910.07467), computed in float32 and rounded once.

T rows, H their width.
"""

import torch


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight [T, H], and 1 / rms(x) [T] in float32, where rms(x)^2 is the mean square plus eps."""
    wide = _wide(x_TH)
    x = x_TH.to(wide)
    scale_T = torch.rsqrt(x.square().mean(dim=1) + eps)
    return (x * scale_T.unsqueeze(1) * weight_H.to(wide)).to(x_TH.dtype), scale_T


def backward(
    dy_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, scale_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [T, H] and of the weight [H]."""
    wide = _wide(x_TH)
    dy, scale_T1 = dy_TH.to(wide), scale_T.unsqueeze(1)
    normed = x_TH.to(wide) * scale_T1
    dnormed = dy * weight_H.to(wide)
    dx_TH = scale_T1 * (dnormed - normed * (dnormed * normed).mean(dim=1, keepdim=True))
    return dx_TH.to(x_TH.dtype), (dy * normed).sum(dim=0).to(weight_H.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
