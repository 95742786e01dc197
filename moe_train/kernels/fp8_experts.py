"""`kernels.experts` with products in FP8: those of `Fp8Gemms`, the others and the weights' gradients in bf16.

Saved for backward: what `kernels.experts` saves, and nothing in FP8. The weights' gradients need x and h in bf16; from
these a row in FP8 is made again by the pass that moves it anyway. What is written in backward besides: dY and dH once
more, in one byte each, by the kernels that write them in two.

T tokens, K copies per token, R rows, L experts, H hidden size, I expert intermediate size. All in bf16.
"""

from collections.abc import Sequence

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.experts import (
    DOWN_BACKWARD,
    GATE_UP_BACKWARD,
    fake_forward,
    fake_x_backward,
    no_rows_h_backward,
)
from moe_train.kernels.experts import fake_h_backward as fake_bf16_h_backward
from moe_train.kernels.fp8 import E4M3, GEMMS, Fp8Gemms, Fp8Rows, grouped_product, quantise_weight
from moe_train.kernels.grouped_gemm import RowGroups, empty_rows, row_groups, rows_by_weights
from moe_train.kernels.operator import Operator, take_saved
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
    place_TK, groups = maps.place_R.view(weights_TK.shape), row_groups(maps.counts_D, len(maps.order_R))
    weights = (gate_up_LIH, down_LHI, list(quantised))
    return _experts(x_TH, weights_TK, maps.order_R, place_TK, *groups, *weights, activation, str(gemms))[0]


class _Product:
    """One of the experts' products with activations, in the type that was decided for it."""

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        quantised: Sequence[torch.Tensor],
        gemms: Fp8Gemms,
        groups: RowGroups,
    ):
        self.name, self.weight, self.quantised, self.groups = name, weight, quantised, groups
        self.fp8 = name in gemms

    def __call__(self, plain: torch.Tensor | None, fp8: Fp8Rows | None) -> torch.Tensor:
        """Of the rows in the type that is wanted; the other may be None."""
        across = self.name in ("dA", "dX")
        if not self.fp8:
            assert plain is not None
            return rows_by_weights(plain, self.weight, self.groups, across=across)
        assert fp8 is not None
        first = 2 * GEMMS.index(self.name)
        kept = self.quantised[first : first + 2]
        return grouped_product(fp8, Fp8Rows(*kept) if kept else quantise_weight(self.weight, across), self.groups)


def forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H], and h [R, 2I]."""
    if not len(order_R):
        return torch.zeros_like(x_TH), empty_rows(0, gate_up_LIH.shape[1], x_TH)
    quantise, chosen, groups = (
        implementation("quantise", x_TH.device),
        Fp8Gemms.parse(gemms),
        RowGroups(offsets_L, table),
    )
    up, down = (
        _Product(name, weight, quantised, chosen, groups) for name, weight in (("h", gate_up_LIH), ("y", down_LHI))
    )
    h_R2I = up(*quantise.spread(x_TH.contiguous(), place_TK, len(order_R), plain=not up.fp8, fp8=up.fp8, aligned=True))
    glue = implementation("fp8_activation" if down.fp8 else "activation", x_TH.device)
    a_RI = glue.forward(h_R2I, offsets_L, weights_TK.reshape(-1), order_R, activation)
    y_RH = down(None, a_RI) if down.fp8 else down(a_RI, None)
    del a_RI
    return implementation("rows", y_RH.device).gather_sum(y_RH, place_TK, None), h_R2I


def h_backward(
    dy_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    down_LHI: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    activation: str,
    gemms: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As in bf16, after the gradient of h that one also in FP8 with its scales (both empty if no product wants it)."""
    fp8 = Fp8Gemms.parse(gemms)
    if not len(h_R2I):
        dh_R2I, dweights_TK, dy_RH, a_RI = no_rows_h_backward(dy_TH, h_R2I, weights_TK)
        dh8, scales = _dh_in_fp8(h_R2I, fp8)
        return dh_R2I, dh8, scales, dweights_TK, dy_RH, a_RI
    product = _Product("dA", down_LHI, quantised, fp8, RowGroups(offsets_L, table))
    quantise = implementation("quantise", dy_TH.device)
    dy_RH, quantised_dy = quantise.spread(
        dy_TH.contiguous(), place_TK, len(h_R2I), plain=True, fp8=product.fp8, aligned=True
    )
    da_RI = product(dy_RH, quantised_dy)
    del quantised_dy
    arguments = (da_RI, h_R2I, offsets_L, weights_TK.reshape(-1), order_R, activation)
    if "dX" in fp8:
        kernel = implementation("fp8_activation", dy_TH.device)
        dh_R2I, (dh8, scales), a_RI, dweights_C = kernel.backward(*arguments, in_place=True)
    else:
        dh_R2I, a_RI, dweights_C = implementation("activation", dy_TH.device).backward(*arguments, in_place=True)
        dh8, scales = _dh_in_fp8(h_R2I, fp8)
    return dh_R2I, dh8, scales, dweights_C.view(weights_TK.shape), dy_RH, a_RI


def fake_h_backward(
    dy_TH, h_R2I, weights_TK, order_R, place_TK, offsets_L, table, down_LHI, quantised, activation, gemms
):
    dh_R2I, *rest = fake_bf16_h_backward(dy_TH, h_R2I, weights_TK)
    return dh_R2I, *_dh_in_fp8(h_R2I, Fp8Gemms.parse(gemms)), *rest


def x_backward(
    dh_R2I: torch.Tensor,
    dh8_R2I: torch.Tensor,
    dh8_scales_R: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    place_TK: torch.Tensor,
    offsets_L: torch.Tensor,
    table: torch.Tensor,
    quantised: Sequence[torch.Tensor],
    gemms: str,
) -> torch.Tensor:
    """Gradient of x."""
    if not len(dh_R2I):
        return fake_x_backward(dh_R2I, gate_up_LIH, place_TK).zero_()
    product = _Product("dX", gate_up_LIH, quantised, Fp8Gemms.parse(gemms), RowGroups(offsets_L, table))
    dx_RH = product(dh_R2I, Fp8Rows(dh8_R2I, dh8_scales_R))
    return implementation("rows", dx_RH.device).gather_sum(dx_RH, place_TK, None)


def _dh_in_fp8(h_R2I: torch.Tensor, gemms: Fp8Gemms) -> Fp8Rows:
    """Without numbers yet; of no rows and columns if no product wants it."""
    rows, columns = h_R2I.shape if "dX" in gemms else (0, 0)
    return Fp8Rows(h_R2I.new_empty(rows, columns, dtype=E4M3), h_R2I.new_empty(rows, dtype=torch.float32))


def _save(ctx, inputs, output):
    x_TH, *rest, quantised, activation, gemms = inputs
    ctx.save_for_backward(x_TH, output[1], *rest, *quantised)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.gemms = activation, gemms


def _adjoint(ctx, dy_TH, _):
    x_TH, h_R2I, weights_TK, order_R, place_TK, offsets_L, table, gate_up_LIH, down_LHI, *quantised = take_saved(ctx)
    maps, rest = (order_R, place_TK, offsets_L, table), (quantised, ctx.activation, ctx.gemms)
    dh_R2I, *dh8, dweights_TK, dy_RH, a_RI = _h_backward(dy_TH, h_R2I, weights_TK, *maps, down_LHI, *rest)
    del h_R2I
    ddown_LHI = DOWN_BACKWARD(dy_RH, a_RI, offsets_L)
    del dy_RH, a_RI
    dx_TH = _x_backward(dh_R2I, *dh8, gate_up_LIH, *maps[1:], quantised, ctx.gemms)
    del dh8
    dgate_up_LIH = GATE_UP_BACKWARD(dh_R2I, x_TH, place_TK, offsets_L)
    none_of_them = [None] * len(quantised)
    return dx_TH, dweights_TK, *[None] * len(maps), dgate_up_LIH, ddown_LHI, none_of_them, None, None


_h_backward = Operator("fp8_experts_h_backward", h_backward, fake_h_backward)
_x_backward = Operator(
    "fp8_experts_x_backward",
    x_backward,
    lambda dh_R2I, dh8_R2I, dh8_scales_R, *rest: fake_x_backward(dh_R2I, *rest),
)
_experts = Operator("fp8_experts", forward, fake_forward, _save, _adjoint)
