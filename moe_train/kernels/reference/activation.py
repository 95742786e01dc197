"""Gated activations: act(gate) * up, times a row's weight, and their adjoint from the pre-activation alone.

R rows of which the first `offsets[-1]` are there, C copies, I expert intermediate size, L experts. Computed in float32.
"""

import math

import torch
import torch.nn.functional as F

ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def forward(
    h_R2I: torch.Tensor, offsets_L: torch.Tensor, weights_C: torch.Tensor, order_R: torch.Tensor, name: str
) -> torch.Tensor:
    """[R, 2I] (gate, then up) -> [R, I]. order_R: the copy that each row is."""
    gate, up = h_R2I.to(_wide(h_R2I)).chunk(2, dim=-1)
    out_RI = activate(gate, name)[0] * up
    return (out_RI * weights_C[order_R].to(out_RI.dtype).unsqueeze(1)).to(h_R2I.dtype)


def backward(
    dout_RI: torch.Tensor,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_C: torch.Tensor,
    order_R: torch.Tensor,
    name: str,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of the pre-activation [R, 2I], the output again [R, I], and the gradient of the weights [C].

    Copies without a row have the gradient 0.

    Args:
        in_place: the output may be written over `dout_RI`; here it is not.
    """
    wide = _wide(h_R2I)
    gate, up = h_R2I.to(wide).chunk(2, dim=-1)
    dout_RI = dout_RI.to(wide)
    activated, slope = activate(gate, name)
    plain_RI = activated * up
    weight_R1 = weights_C[order_R].to(wide).unsqueeze(1)
    there_R = torch.arange(len(h_R2I), device=h_R2I.device) < offsets_L[-1]
    dplain_RI, out_RI = dout_RI * weight_R1, plain_RI * weight_R1
    dweights_C = torch.zeros_like(weights_C)
    dweights_C[order_R] = torch.where(there_R, (dout_RI * plain_RI).sum(dim=1), 0.0).to(weights_C.dtype)
    dh_R2I = torch.cat([dplain_RI * up * slope, dplain_RI * activated], dim=1)
    return dh_R2I.to(h_R2I.dtype), out_RI.to(h_R2I.dtype), dweights_C


def activate(gate: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(gate) and its slope."""
    if name == "silu":
        sigmoid = gate.sigmoid()
        return F.silu(gate), sigmoid * (1 + gate * (1 - sigmoid))
    if name == "gelu":
        cdf, pdf = 0.5 * (1 + torch.erf(gate / math.sqrt(2))), torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        return F.gelu(gate), cdf + gate * pdf
    if name == "gelu_tanh":
        factor = math.sqrt(2 / math.pi)
        tanh = torch.tanh(factor * (gate + 0.044715 * gate**3))
        rise = factor * (1 + 3 * 0.044715 * gate * gate)
        return F.gelu(gate, approximate="tanh"), 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * rise
    positive = F.relu(gate)
    return (positive, (gate > 0).to(gate.dtype)) if name == "relu" else (positive.square(), 2 * positive)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
