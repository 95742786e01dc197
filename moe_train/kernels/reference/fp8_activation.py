"""`reference/activation.py` with results in FP8, as the products that follow take them."""

import torch

from moe_train.kernels.fp8 import Fp8Rows
from moe_train.kernels.reference import activation
from moe_train.kernels.reference.quantise import rounded


def forward(
    h_R2I: torch.Tensor, offsets_L: torch.Tensor, weights_C: torch.Tensor, order_R: torch.Tensor, name: str
) -> Fp8Rows:
    """[R, 2I] (gate, then up) -> [R, I]. Rounded once: not to bf16 in between."""
    return rounded(activation.forward(h_R2I.float(), offsets_L, weights_C, order_R, name))


def backward(
    dout_RI: torch.Tensor,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_C: torch.Tensor,
    order_R: torch.Tensor,
    name: str,
    in_place: bool = False,
) -> tuple[torch.Tensor, Fp8Rows, torch.Tensor, torch.Tensor]:
    """Gradient of the pre-activation [R, 2I], for the weights' gradient and once more in FP8; the output again [R, I];
    the gradient of the weights [C]. in_place: as in
    `activation.backward`."""
    wide = (dout_RI.float(), h_R2I.float())
    dh_R2I, out_RI, dweights_C = activation.backward(*wide, offsets_L, weights_C, order_R, name)
    return dh_R2I.to(h_R2I.dtype), rounded(dh_R2I), out_RI.to(h_R2I.dtype), dweights_C
