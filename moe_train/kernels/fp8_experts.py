"""`kernels.experts` with products in FP8: those of `Fp8Gemms`, the others and the weights' gradients in bf16.

Saved for backward: what `kernels.experts` saves, and nothing in FP8. The weights' gradients need x and h in bf16; from
these a row in FP8 is made again by the pass that moves it anyway. What is written in backward besides: dY and dH once
more, in one byte each, by the kernels that write them in two.

T tokens, K copies per token, R = T * K rows, L experts, H hidden size, I expert intermediate size. All in bf16.
"""

from collections.abc import Sequence

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.experts import _offsets
from moe_train.kernels.fp8 import GEMMS, Fp8Gemms, Fp8Rows, grouped_product, quantise_weight
from moe_train.kernels.grouped_gemm import rows_by_weights, weight_gradient
from moe_train.kernels.row_maps import RowMaps


def fp8_local_experts(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    maps: RowMaps,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
    gemms: Fp8Gemms,
    quantised: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Tokens -> weighted sum of their experts' outputs [T, H], as `local_experts`.

    Args:
        quantised: `quantise_weights` of these weights. Empty: they are quantised where they are used, in forward and in
            backward; for weights that are not kept.
    """
    place_TK = maps.place_R.view(weights_TK.shape)
    weights = (gate_up_LIH, down_LHI, list(quantised))
    y_TH, _ = _fp8_local_experts(
        x_TH, weights_TK, maps.order_R, place_TK, maps.counts_D, *weights, activation, str(gemms)
    )
    return y_TH


def fp8_expert_rows(
    rows_NH: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
    gemms: Fp8Gemms,
    quantised: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Rows sorted by expert [N, H] -> their outputs, as `expert_rows`. Row by row the same on any rank."""
    weights = (gate_up_LIH, down_LHI, list(quantised))
    y_NH, _ = _fp8_expert_rows(rows_NH, rows_per_expert, *weights, activation, str(gemms))
    return y_NH


class _Products:
    """The experts' four products with activations, each in the type that was decided for it."""

    def __init__(
        self,
        gate_up_LIH: torch.Tensor,
        down_LHI: torch.Tensor,
        quantised: Sequence[torch.Tensor],
        gemms: str,
        offsets_L: torch.Tensor,
    ):
        self.gemms, self.offsets_L = Fp8Gemms.parse(gemms), offsets_L
        self.weights = {"h": gate_up_LIH, "y": down_LHI, "dA": down_LHI, "dX": gate_up_LIH}
        self.quantised = quantised

    def __call__(self, name: str, plain: torch.Tensor | None, fp8: Fp8Rows | None) -> torch.Tensor:
        """Of the rows in the type that is wanted; the other may be None."""
        across, weight = name in ("dA", "dX"), self.weights[name]
        if name not in self.gemms:
            assert plain is not None
            return rows_by_weights(plain, weight, self.offsets_L, across=across)
        assert fp8 is not None
        first = 2 * GEMMS.index(name)
        held = Fp8Rows(*self.quantised[first : first + 2]) if self.quantised else quantise_weight(weight, across)
        return grouped_product(fp8, held, self.offsets_L)


def _activated(
    gemms: Fp8Gemms,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_R: torch.Tensor | None,
    order_R: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor | None, Fp8Rows | None]:
    """a, plain or in FP8 as y wants it."""
    arguments = (h_R2I, offsets_L, weights_R, order_R, activation)
    if "y" in gemms:
        return None, implementation("fp8_activation", h_R2I.device).forward(*arguments)
    return implementation("activation", h_R2I.device).forward(*arguments), None


def _activation_backward(
    gemms: Fp8Gemms,
    da_RI: torch.Tensor,
    h_R2I: torch.Tensor,
    offsets_L: torch.Tensor,
    weights_R: torch.Tensor | None,
    order_R: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, Fp8Rows | None, torch.Tensor, torch.Tensor]:
    """dH, dH in FP8 if dX wants it, a again, and the gradient of the weights."""
    arguments = (da_RI, h_R2I, offsets_L, weights_R, order_R, activation)
    if "dX" in gemms:
        return implementation("fp8_activation", h_R2I.device).backward(*arguments)
    dh_R2I, a_RI, dweights_R = implementation("activation", h_R2I.device).backward(*arguments)
    return dh_R2I, None, a_RI, dweights_R


# -------------------------------------------------------------------------------------------- tokens of this device


@torch.library.custom_op("moe_train::fp8_local_experts", mutates_args=())
def _fp8_local_experts(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not order_R.numel():
        return torch.zeros_like(x_TH), x_TH.new_empty(0, gate_up_LIH.shape[1])
    rows, quantise = (implementation(name, x_TH.device) for name in ("rows", "quantise"))
    offsets_L = _offsets(rows_per_expert)
    product = _Products(gate_up_LIH, down_LHI, quantised, gemms, offsets_L)
    fp8 = "h" in product.gemms
    h_R2I = product("h", *quantise.spread(x_TH, place_TK, plain=not fp8, fp8=fp8))
    weights_R = weights_TK.reshape(-1)
    y_RH = product("y", *_activated(product.gemms, h_R2I, offsets_L, weights_R, order_R, activation))
    return rows.gather_sum(y_RH, place_TK, None), h_R2I


@_fp8_local_experts.register_fake
def _(x_TH, weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI, quantised, activation, gemms):
    return torch.empty_like(x_TH), x_TH.new_empty(order_R.shape[0], gate_up_LIH.shape[1])


@torch.library.custom_op("moe_train::fp8_local_experts_backward", mutates_args=())
def _fp8_local_experts_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not order_R.numel():
        zeros = torch.zeros_like
        return zeros(x_TH), zeros(weights_TK), zeros(gate_up_LIH), zeros(down_LHI)
    rows, quantise = (implementation(name, x_TH.device) for name in ("rows", "quantise"))
    offsets_L, weights_R = _offsets(rows_per_expert), weights_TK.reshape(-1)
    product = _Products(gate_up_LIH, down_LHI, quantised, gemms, offsets_L)
    dy_RH, quantised_dy = quantise.spread(dy_TH, place_TK, plain=True, fp8="dA" in product.gemms)
    da_RI = product("dA", dy_RH, quantised_dy)
    del quantised_dy
    dh_R2I, quantised_dh, a_RI, dweights_R = _activation_backward(
        product.gemms, da_RI, h_R2I, offsets_L, weights_R, order_R, activation
    )
    del da_RI
    ddown_LHI = weight_gradient(dy_RH, a_RI, offsets_L)
    del dy_RH, a_RI
    dx_RH = product("dX", dh_R2I, quantised_dh)
    del quantised_dh
    dx_TH = rows.gather_sum(dx_RH, place_TK, None)
    del dx_RH
    x_RH, _ = quantise.spread(x_TH, place_TK, plain=True, fp8=False)
    dgate_up_LIH = weight_gradient(dh_R2I, x_RH, offsets_L)
    return dx_TH, dweights_R.view(weights_TK.shape), dgate_up_LIH, ddown_LHI


@_fp8_local_experts_backward.register_fake
def _(
    dy_TH,
    x_TH,
    h_R2I,
    weights_TK,
    order_R,
    place_TK,
    rows_per_expert,
    gate_up_LIH,
    down_LHI,
    quantised,
    activation,
    gemms,
):
    return tuple(map(torch.empty_like, (x_TH, weights_TK, gate_up_LIH, down_LHI)))


def _save_local(ctx, inputs, output):
    x_TH, weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI, quantised, activation, gemms = inputs
    given = (weights_TK, order_R, place_TK, rows_per_expert, gate_up_LIH, down_LHI)
    ctx.save_for_backward(x_TH, output[1], *given, *quantised)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.quantised = (activation, gemms), len(quantised)


def _local_adjoint(ctx, dy_TH, _):
    saved = ctx.saved_tensors
    dx_TH, dweights_TK, dgate_up_LIH, ddown_LHI = _fp8_local_experts_backward(
        dy_TH, *saved[:8], list(saved[8:]), *ctx.rest
    )
    return dx_TH, dweights_TK, None, None, None, dgate_up_LIH, ddown_LHI, [None] * ctx.quantised, None, None


_fp8_local_experts.register_autograd(_local_adjoint, setup_context=_save_local)


# ---------------------------------------------------------------------------------------------- rows of other ranks


@torch.library.custom_op("moe_train::fp8_expert_rows", mutates_args=())
def _fp8_expert_rows(
    rows_NH: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not rows_NH.shape[0]:
        return torch.empty_like(rows_NH), rows_NH.new_empty(0, gate_up_LIH.shape[1])
    offsets_L = _offsets(rows_per_expert)
    product = _Products(gate_up_LIH, down_LHI, quantised, gemms, offsets_L)
    fp8 = "h" in product.gemms
    quantise = implementation("quantise", rows_NH.device)
    h_N2I = product("h", *quantise.spread(rows_NH.contiguous(), None, plain=not fp8, fp8=fp8))
    return product("y", *_activated(product.gemms, h_N2I, offsets_L, None, offsets_L, activation)), h_N2I


@_fp8_expert_rows.register_fake
def _(rows_NH, rows_per_expert, gate_up_LIH, down_LHI, quantised, activation, gemms):
    return torch.empty_like(rows_NH), rows_NH.new_empty(rows_NH.shape[0], gate_up_LIH.shape[1])


@torch.library.custom_op("moe_train::fp8_expert_rows_backward", mutates_args=())
def _fp8_expert_rows_backward(
    dy_NH: torch.Tensor,
    rows_NH: torch.Tensor,
    h_N2I: torch.Tensor,
    rows_per_expert: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not rows_NH.shape[0]:
        return torch.zeros_like(rows_NH), torch.zeros_like(gate_up_LIH), torch.zeros_like(down_LHI)
    offsets_L = _offsets(rows_per_expert)
    product = _Products(gate_up_LIH, down_LHI, quantised, gemms, offsets_L)
    quantise = implementation("quantise", rows_NH.device)
    dy_NH, quantised_dy = quantise.spread(dy_NH.contiguous(), None, plain=True, fp8="dA" in product.gemms)
    da_NI = product("dA", dy_NH, quantised_dy)
    del quantised_dy
    dh_N2I, quantised_dh, a_NI, _ = _activation_backward(
        product.gemms, da_NI, h_N2I, offsets_L, None, offsets_L, activation
    )
    del da_NI
    ddown_LHI = weight_gradient(dy_NH, a_NI, offsets_L)
    del a_NI
    dgate_up_LIH = weight_gradient(dh_N2I, rows_NH.contiguous(), offsets_L)
    return product("dX", dh_N2I, quantised_dh), dgate_up_LIH, ddown_LHI


@_fp8_expert_rows_backward.register_fake
def _(dy_NH, rows_NH, h_N2I, rows_per_expert, gate_up_LIH, down_LHI, quantised, activation, gemms):
    return tuple(map(torch.empty_like, (rows_NH, gate_up_LIH, down_LHI)))


def _save_rows(ctx, inputs, output):
    rows_NH, rows_per_expert, gate_up_LIH, down_LHI, quantised, activation, gemms = inputs
    ctx.save_for_backward(rows_NH, output[1], rows_per_expert, gate_up_LIH, down_LHI, *quantised)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.rest, ctx.quantised = (activation, gemms), len(quantised)


def _rows_adjoint(ctx, dy_NH, _):
    saved = ctx.saved_tensors
    drows_NH, dgate_up_LIH, ddown_LHI = _fp8_expert_rows_backward(dy_NH, *saved[:5], list(saved[5:]), *ctx.rest)
    return drows_NH, None, dgate_up_LIH, ddown_LHI, [None] * ctx.quantised, None, None


_fp8_expert_rows.register_autograd(_rows_adjoint, setup_context=_save_rows)
