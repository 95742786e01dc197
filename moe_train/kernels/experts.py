"""The experts as one operator: spread, grouped GEMM, gated activation, grouped GEMM, sum over the copies of a token.

Saved for backward: the tokens (or rows) it was given, the pre-activation h, the weights and the maps. The permuted
tokens, the activation and the experts' outputs are made again or not needed: a token's weight multiplies the
activation, which is the same as multiplying the output, so its gradient is <dA, A> and not <dY, Y>.

T tokens, K copies per token, R = T * K rows, L experts, H hidden size, I expert intermediate size.
"""

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.grouped_gemm import rows_by_weights, weight_gradient
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
    place_TK = maps.place_R.view(weights_TK.shape)
    y_TH, _ = _local_experts(x_TH, weights_TK, maps.order_R, place_TK, maps.counts_D, gate_up_LIH, down_LHI, activation)
    return y_TH


def expert_rows(
    rows_NH: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Rows sorted by expert [N, H] -> their outputs; what a rank computes under expert parallelism. L may not be 0."""
    y_NH, _ = _expert_rows(rows_NH, rows_per_expert, gate_up_LIH, down_LHI, activation)
    return y_NH


# -------------------------------------------------------------------------------------------- tokens of this device


@torch.library.custom_op("moe_train::local_experts", mutates_args=())
def _local_experts(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not order_R.numel():
        return torch.zeros_like(x_TH), x_TH.new_empty(0, gate_up_LIH.shape[1])
    rows, glue = (implementation(name, x_TH.device) for name in ("rows", "activation"))
    offsets = _offsets(rows_per_expert)
    x_RH = rows.spread(x_TH, place_TK)
    h_R2I = rows_by_weights(x_RH, gate_up_LIH, offsets)
    del x_RH
    a_RI = glue.forward(h_R2I, offsets, weights_TK.reshape(-1), order_R, activation)
    y_RH = rows_by_weights(a_RI, down_LHI, offsets)
    del a_RI
    return rows.gather_sum(y_RH, place_TK, None), h_R2I


@_local_experts.register_fake
def _(x_TH, weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI, activation):
    return torch.empty_like(x_TH), x_TH.new_empty(order_R.shape[0], gate_up_LIH.shape[1])


@torch.library.custom_op("moe_train::local_experts_backward", mutates_args=())
def _local_experts_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not order_R.numel():
        zeros = torch.zeros_like
        return zeros(x_TH), zeros(weights_TK), zeros(gate_up_LIH), zeros(down_LHI)
    rows, glue = (implementation(name, x_TH.device) for name in ("rows", "activation"))
    offsets = _offsets(rows_per_expert)
    dy_RH = rows.spread(dy_TH, place_TK)
    da_RI = rows_by_weights(dy_RH, down_LHI, offsets, across=True)
    dh_R2I, a_RI, dweights_R = glue.backward(da_RI, h_R2I, offsets, weights_TK.reshape(-1), order_R, activation)
    del da_RI
    ddown_LHI = weight_gradient(dy_RH, a_RI, offsets)
    del dy_RH, a_RI
    dx_RH = rows_by_weights(dh_R2I, gate_up_LIH, offsets, across=True)
    dx_TH = rows.gather_sum(dx_RH, place_TK, None)
    del dx_RH
    dgate_up_LIH = weight_gradient(dh_R2I, rows.spread(x_TH, place_TK), offsets)
    return dx_TH, dweights_R.view(weights_TK.shape), dgate_up_LIH, ddown_LHI


@_local_experts_backward.register_fake
def _(dy_TH, x_TH, h_R2I, weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI, activation):
    return tuple(map(torch.empty_like, (x_TH, weights_TK, gate_up_LIH, down_LHI)))


def _save_local(ctx, inputs, output):
    x_TH, weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI, activation = inputs
    ctx.save_for_backward(x_TH, output[1], weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation = activation


def _local_adjoint(ctx, dy_TH, _):
    dx_TH, dweights_TK, dgate_up_LIH, ddown_LHI = _local_experts_backward(dy_TH, *ctx.saved_tensors, ctx.activation)
    return dx_TH, dweights_TK, None, None, None, dgate_up_LIH, ddown_LHI, None


_local_experts.register_autograd(_local_adjoint, setup_context=_save_local)


# ---------------------------------------------------------------------------------------------- rows of other ranks


@torch.library.custom_op("moe_train::expert_rows", mutates_args=())
def _expert_rows(
    rows_NH: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not rows_NH.shape[0]:
        return torch.empty_like(rows_NH), rows_NH.new_empty(0, gate_up_LIH.shape[1])
    glue, offsets = implementation("activation", rows_NH.device), _offsets(rows_per_expert)
    h_N2I = rows_by_weights(rows_NH.contiguous(), gate_up_LIH, offsets)
    a_NI = glue.forward(h_N2I, offsets, None, offsets, activation)
    return rows_by_weights(a_NI, down_LHI, offsets), h_N2I


@_expert_rows.register_fake
def _(rows_NH, rows_per_expert, gate_up_LIH, down_LHI, activation):
    return torch.empty_like(rows_NH), rows_NH.new_empty(rows_NH.shape[0], gate_up_LIH.shape[1])


@torch.library.custom_op("moe_train::expert_rows_backward", mutates_args=())
def _expert_rows_backward(
    dy_NH: torch.Tensor,
    rows_NH: torch.Tensor,
    h_N2I: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not rows_NH.shape[0]:
        return torch.zeros_like(rows_NH), torch.zeros_like(gate_up_LIH), torch.zeros_like(down_LHI)
    glue, offsets = implementation("activation", rows_NH.device), _offsets(rows_per_expert)
    dy_NH = dy_NH.contiguous()
    da_NI = rows_by_weights(dy_NH, down_LHI, offsets, across=True)
    dh_N2I, a_NI, _ = glue.backward(da_NI, h_N2I, offsets, None, offsets, activation)
    del da_NI
    ddown_LHI = weight_gradient(dy_NH, a_NI, offsets)
    del a_NI
    dgate_up_LIH = weight_gradient(dh_N2I, rows_NH.contiguous(), offsets)
    return rows_by_weights(dh_N2I, gate_up_LIH, offsets, across=True), dgate_up_LIH, ddown_LHI


@_expert_rows_backward.register_fake
def _(dy_NH, rows_NH, h_N2I, rows_per_expert, gate_up_LIH, down_LHI, activation):
    return tuple(map(torch.empty_like, (rows_NH, gate_up_LIH, down_LHI)))


def _save_rows(ctx, inputs, output):
    rows_NH, rows_per_expert, gate_up_LIH, down_LHI, activation = inputs
    ctx.save_for_backward(rows_NH, output[1], rows_per_expert, gate_up_LIH, down_LHI)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation = activation


def _rows_adjoint(ctx, dy_NH, _):
    drows_NH, dgate_up_LIH, ddown_LHI = _expert_rows_backward(dy_NH, *ctx.saved_tensors, ctx.activation)
    return drows_NH, None, dgate_up_LIH, ddown_LHI, None


_expert_rows.register_autograd(_rows_adjoint, setup_context=_save_rows)


def _offsets(rows_per_expert: torch.Tensor) -> torch.Tensor:
    return rows_per_expert.cumsum(0).to(torch.int32)
