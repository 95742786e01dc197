"""The experts as one operator: spread, grouped GEMM, gated activation, grouped GEMM, sum over the copies of a token.

Saved for backward: the tokens it was given, the pre-activation h, the weights and the maps. The permuted
tokens, the activation and the experts' outputs are made again or not needed: a token's weight multiplies the
activation, which is the same as multiplying the output, so its gradient is <dA, A> and not <dY, Y>. h is given up once
its gradient is there.

T tokens, K copies per token, R rows (T * K, or fewer where copies have none), L experts, H hidden size, I expert
intermediate size.
"""

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.grouped_gemm import (
    RowGroups,
    empty_rows,
    gradient_by_tokens,
    row_groups,
    rows_by_weights,
    weight_gradient,
)
from moe_train.kernels.operator import Operator, take_saved
from moe_train.kernels.row_maps import RowMaps


def local_experts(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    maps: RowMaps,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Tokens -> weighted sum of their experts' outputs [T, H]; everything on this device.

    Args:
        weights_TK: float32. maps: of the experts, by copy; padding adds nothing. Its `order_R` may end where the rows
            do, so that nothing is made for padding.
        gate_up_LIH: [L, 2I, H], gate above up. down_LHI: [L, H, I]. In the type of x.
        activation: one of `ACTIVATION_NAMES`.
    """
    place_TK, groups = maps.place_R.view(weights_TK.shape), row_groups(maps.counts_D, len(maps.order_R))
    return _experts(x_TH, weights_TK, maps.order_R, place_TK, *groups, gate_up_LIH, down_LHI, activation)[0]


def forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H], and h [R, 2I]."""
    if not len(order_R):
        return torch.zeros_like(x_TH), empty_rows(0, gate_up_LIH.shape[1], x_TH)
    rows, glue = (implementation(name, x_TH.device) for name in ("rows", "activation"))
    groups = RowGroups(offsets_L, table)
    x_RH = rows.spread(x_TH, place_TK, len(order_R), aligned=True)
    h_R2I = rows_by_weights(x_RH, gate_up_LIH, groups)
    del x_RH
    a_RI = glue.forward(h_R2I, offsets_L, weights_TK.reshape(-1), order_R, activation)
    y_RH = rows_by_weights(a_RI, down_LHI, groups)
    del a_RI
    return rows.gather_sum(y_RH, place_TK, None), h_R2I


def fake_forward(x_TH, weights_TK, order_R, place_TK, offsets_L, table, gate_up_LIH, *rest):
    return torch.empty_like(x_TH), empty_rows(len(order_R), gate_up_LIH.shape[1], x_TH)


def h_backward(
    dy_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h and of the weights; and what the gradient of down is made of, once h is gone: the rows of dy and
    the activation."""
    if not len(h_R2I):
        return no_rows_h_backward(dy_TH, h_R2I, weights_TK)
    rows, glue = (implementation(name, dy_TH.device) for name in ("rows", "activation"))
    dy_RH = rows.spread(dy_TH, place_TK, len(h_R2I), aligned=True)
    da_RI = rows_by_weights(dy_RH, down_LHI, RowGroups(offsets_L, table), across=True)
    given = (da_RI, h_R2I, offsets_L, weights_TK.reshape(-1), order_R, activation)
    dh_R2I, a_RI, dweights_C = glue.backward(*given, in_place=True)
    return dh_R2I, dweights_C.view(weights_TK.shape), dy_RH, a_RI


def fake_h_backward(dy_TH, h_R2I, weights_TK, *rest):
    rows, columns = h_R2I.shape
    dy_RH, a_RI = (empty_rows(rows, width, h_R2I) for width in (dy_TH.shape[1], columns // 2))
    return empty_rows(rows, columns, h_R2I), torch.empty_like(weights_TK), dy_RH, a_RI


def no_rows_h_backward(dy_TH, h_R2I, weights_TK):
    dh_R2I, dweights_TK, dy_RH, a_RI = fake_h_backward(dy_TH, h_R2I, weights_TK)
    return dh_R2I, dweights_TK.zero_(), dy_RH, a_RI


def down_backward(dy_RH: torch.Tensor, a_RI: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """Gradient of down. An operator of its own: h, which nobody needs any more, is gone when it is made."""
    if not len(a_RI):
        return fake_down_backward(dy_RH, a_RI, offsets_L).zero_()
    return weight_gradient(dy_RH, a_RI, offsets_L)


def fake_down_backward(dy_RH, a_RI, offsets_L):
    return dy_RH.new_empty(len(offsets_L), dy_RH.shape[1], a_RI.shape[1])


def x_backward(
    dh_R2I: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Gradient of x."""
    if not len(dh_R2I):
        return fake_x_backward(dh_R2I, gate_up_LIH, place_TK).zero_()
    dx_RH = rows_by_weights(dh_R2I, gate_up_LIH, RowGroups(offsets_L, table), across=True)
    return implementation("rows", dx_RH.device).gather_sum(dx_RH, place_TK, None)


def fake_x_backward(dh_R2I, gate_up_LIH, place_TK, *rest):
    return dh_R2I.new_empty(len(place_TK), gate_up_LIH.shape[2])


def gate_up_backward(
    dh_R2I: torch.Tensor, x_TH: torch.Tensor, place_TK: torch.Tensor, offsets_L: torch.Tensor
) -> torch.Tensor:
    """Gradient of gate_up. An operator of its own: all else of backward is gone when the largest of all is made."""
    if not len(dh_R2I):
        return fake_gate_up_backward(dh_R2I, x_TH, place_TK, offsets_L).zero_()
    return gradient_by_tokens(dh_R2I, x_TH, place_TK, offsets_L)


def fake_gate_up_backward(dh_R2I, x_TH, place_TK, offsets_L):
    return dh_R2I.new_empty(len(offsets_L), dh_R2I.shape[1], x_TH.shape[1])


def _save(ctx, inputs, output):
    x_TH, *rest, activation = inputs
    ctx.save_for_backward(x_TH, output[1], *rest)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation = activation


def _adjoint(ctx, dy_TH, _):
    x_TH, h_R2I, weights_TK, order_R, place_TK, offsets_L, table, gate_up_LIH, down_LHI = take_saved(ctx)
    maps = (order_R, place_TK, offsets_L, table)
    given = (weights_TK, *maps, down_LHI, ctx.activation)
    dh_R2I, dweights_TK, dy_RH, a_RI = _h_backward(dy_TH, h_R2I, *given)
    del h_R2I
    ddown_LHI = DOWN_BACKWARD(dy_RH, a_RI, offsets_L)
    del dy_RH, a_RI
    dx_TH = _x_backward(dh_R2I, gate_up_LIH, *maps[1:])
    dgate_up_LIH = GATE_UP_BACKWARD(dh_R2I, x_TH, place_TK, offsets_L)
    return dx_TH, dweights_TK, *[None] * len(maps), dgate_up_LIH, ddown_LHI, None


_h_backward = Operator("experts_h_backward", h_backward, fake_h_backward)
DOWN_BACKWARD = Operator("experts_down_backward", down_backward, fake_down_backward)
_x_backward = Operator("experts_x_backward", x_backward, fake_x_backward)
GATE_UP_BACKWARD = Operator("experts_gate_up_backward", gate_up_backward, fake_gate_up_backward)
_experts = Operator("experts", forward, fake_forward, _save, _adjoint)
