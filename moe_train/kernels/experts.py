"""The experts as one operator: spread, grouped GEMM, gated activation, grouped GEMM, sum over the copies of a token.

Saved for backward: the tokens (or rows) it was given, the pre-activation h, the weights and the maps. The permuted
tokens, the activation and the experts' outputs are made again or not needed: a token's weight multiplies the
activation, which is the same as multiplying the output, so its gradient is <dA, A> and not <dY, Y>. h is given up once
its gradient is there.

T tokens, K copies per token, R = T * K rows, L experts, H hidden size, I expert intermediate size.
"""

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.grouped_gemm import RowGroups, gradient_by_tokens, row_groups, rows_by_weights, weight_gradient
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
        weights_TK: float32. maps: of the experts, by copy; padding adds nothing.
        gate_up_LIH: [L, 2I, H], gate above up. down_LHI: [L, H, I]. In the type of x.
        activation: one of `ACTIVATION_NAMES`.
    """
    place_TK, groups = maps.place_R.view(weights_TK.shape), row_groups(maps.counts_D, len(maps.order_R))
    return _experts(x_TH, weights_TK, maps.order_R, place_TK, *groups, gate_up_LIH, down_LHI, activation)[0]


def expert_rows(
    rows_NH: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Rows sorted by expert [N, H] -> their outputs; what a rank computes under expert parallelism. L may not be 0."""
    groups = row_groups(rows_per_expert, len(rows_NH))
    return _experts(rows_NH, None, None, None, *groups, gate_up_LIH, down_LHI, activation)[0]


# Below, without maps x are rows: R of them, one for each token, with the weight 1.


def forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor | None,
    order_R: torch.Tensor | None,
    place_TK: torch.Tensor | None,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H], and h [R, 2I]."""
    if not num_rows(x_TH, order_R):
        return torch.zeros_like(x_TH), x_TH.new_empty(0, gate_up_LIH.shape[1])
    rows, glue = (implementation(name, x_TH.device) for name in ("rows", "activation"))
    groups = RowGroups(offsets_L, table)
    x_RH = x_TH.contiguous() if place_TK is None else rows.spread(x_TH, place_TK)
    h_R2I = rows_by_weights(x_RH, gate_up_LIH, groups)
    del x_RH
    a_RI = glue.forward(h_R2I, offsets_L, *weights_of(weights_TK, order_R, offsets_L), activation)
    y_RH = rows_by_weights(a_RI, down_LHI, groups)
    del a_RI
    return y_RH if place_TK is None else rows.gather_sum(y_RH, place_TK, None), h_R2I


def fake_forward(x_TH, weights_TK, order_R, place_TK, offsets_L, table, gate_up_LIH, *rest):
    return torch.empty_like(x_TH), x_TH.new_empty(num_rows(x_TH, order_R), gate_up_LIH.shape[1])


def h_backward(
    dy_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor | None,
    order_R: torch.Tensor | None,
    place_TK: torch.Tensor | None,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h and of the weights (empty without them); and what the gradient of down is made of, once h is gone:
    the rows of dy (empty without maps: dy itself) and the activation."""
    if not len(h_R2I):
        return fake_h_backward(dy_TH, h_R2I, weights_TK, order_R, place_TK)
    rows, glue = (implementation(name, dy_TH.device) for name in ("rows", "activation"))
    dy_RH = dy_TH.contiguous() if place_TK is None else rows.spread(dy_TH, place_TK)
    da_RI = rows_by_weights(dy_RH, down_LHI, RowGroups(offsets_L, table), across=True)
    weights = weights_of(weights_TK, order_R, offsets_L)
    dh_R2I, a_RI, dweights_R = glue.backward(da_RI, h_R2I, offsets_L, *weights, activation, in_place=True)
    return dh_R2I, like_weights(dweights_R, weights_TK), own_rows(dy_RH, place_TK), a_RI


def fake_h_backward(dy_TH, h_R2I, weights_TK, order_R, place_TK, *rest):
    dy_RH = dy_TH.new_empty(0 if place_TK is None else len(h_R2I), dy_TH.shape[1])
    a_RI = h_R2I.new_empty(len(h_R2I), h_R2I.shape[1] // 2)
    return torch.empty_like(h_R2I), no_gradient(weights_TK, dy_TH), dy_RH, a_RI


def down_backward(dy_RH: torch.Tensor, a_RI: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """Gradient of down. An operator of its own: h, which nobody needs any more, is gone when it is made."""
    if not len(a_RI):
        return fake_down_backward(dy_RH, a_RI, offsets_L).zero_()
    return weight_gradient(dy_RH.contiguous(), a_RI, offsets_L)


def fake_down_backward(dy_RH, a_RI, offsets_L):
    return dy_RH.new_empty(len(offsets_L), dy_RH.shape[1], a_RI.shape[1])


def x_backward(
    dh_R2I: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    place_TK: torch.Tensor | None,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """Gradient of x."""
    if not len(dh_R2I):
        return fake_x_backward(dh_R2I, gate_up_LIH, place_TK).zero_()
    return summed(rows_by_weights(dh_R2I, gate_up_LIH, RowGroups(offsets_L, table), across=True), place_TK)


def fake_x_backward(dh_R2I, gate_up_LIH, place_TK, *rest):
    return dh_R2I.new_empty(len(dh_R2I if place_TK is None else place_TK), gate_up_LIH.shape[2])


def gate_up_backward(
    dh_R2I: torch.Tensor, x_TH: torch.Tensor, place_TK: torch.Tensor | None, offsets_L: torch.Tensor
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
    ddown_LHI = DOWN_BACKWARD(dy_TH if place_TK is None else dy_RH, a_RI, offsets_L)
    del dy_RH, a_RI
    dx_TH = _x_backward(dh_R2I, gate_up_LIH, *maps[1:])
    dgate_up_LIH = GATE_UP_BACKWARD(dh_R2I, x_TH, place_TK, offsets_L)
    return dx_TH, None if weights_TK is None else dweights_TK, *[None] * len(maps), dgate_up_LIH, ddown_LHI, None


_h_backward = Operator("experts_h_backward", h_backward, fake_h_backward)
DOWN_BACKWARD = Operator("experts_down_backward", down_backward, fake_down_backward)
_x_backward = Operator("experts_x_backward", x_backward, fake_x_backward)
GATE_UP_BACKWARD = Operator("experts_gate_up_backward", gate_up_backward, fake_gate_up_backward)
_experts = Operator("experts", forward, fake_forward, _save, _adjoint)


# ------------------------------------------------------------------------------------------ for all kinds of experts


def num_rows(x_TH: torch.Tensor, order_R: torch.Tensor | None) -> int:
    return x_TH.shape[0] if order_R is None else order_R.shape[0]


def weights_of(
    weights_TK: torch.Tensor | None, order_R: torch.Tensor | None, offsets_L: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Weights by copy, and the copy that each row is, as activations take them."""
    return (None, offsets_L) if weights_TK is None or order_R is None else (weights_TK.reshape(-1), order_R)


def no_gradient(weights_TK: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.float32) if weights_TK is None else torch.zeros_like(weights_TK)


def own_rows(dy_RH: torch.Tensor, place_TK: torch.Tensor | None) -> torch.Tensor:
    """Nothing in place of what an operator was given: it must not return that."""
    return dy_RH.new_empty(0, dy_RH.shape[1]) if place_TK is None else dy_RH


def like_weights(dweights_R: torch.Tensor, weights_TK: torch.Tensor | None) -> torch.Tensor:
    return dweights_R if weights_TK is None else dweights_R.view(weights_TK.shape)


def summed(rows_RH: torch.Tensor, place_TK: torch.Tensor | None) -> torch.Tensor:
    """Over the copies of a token, if rows are copies."""
    return rows_RH if place_TK is None else implementation("rows", rows_RH.device).gather_sum(rows_RH, place_TK, None)
