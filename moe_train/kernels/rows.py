"""Rows that go to other ranks, and those that come back: a token's copies, and the weighted sum over them."""

import torch

from moe_train.kernels.choose import implementation


def copy_tokens(x_TH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    """Tokens [T, H] -> a row for each copy, at its place [T * C, H]. Every copy must have a place.

    The adjoint adds up a token's rows in float32, once cast.
    """
    return _copy_tokens(x_TH, place_TC)


def weighted_sum(rows_RH: torch.Tensor, weights_TC: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
    """Rows [R, H] -> [T, H] in the type of the rows, added in float32. Every copy must have a place.

    Saves the rows and the weights. The adjoint writes each row once: no atomics.
    """
    return _weighted_sum(rows_RH, weights_TC, place_R.view(weights_TC.shape))


@torch.library.custom_op("moe_train::copy_tokens", mutates_args=())
def _copy_tokens(x_TH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", x_TH.device).spread(x_TH, place_TC)


@_copy_tokens.register_fake
def _(x_TH, place_TC):
    return x_TH.new_empty(place_TC.numel(), x_TH.shape[1])


@torch.library.custom_op("moe_train::copy_tokens_backward", mutates_args=())
def _copy_tokens_backward(drows_RH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", drows_RH.device).gather_sum(drows_RH, place_TC, None)


@_copy_tokens_backward.register_fake
def _(drows_RH, place_TC):
    return drows_RH.new_empty(place_TC.shape[0], drows_RH.shape[1])


_copy_tokens.register_autograd(
    lambda ctx, drows_RH: (_copy_tokens_backward(drows_RH, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@torch.library.custom_op("moe_train::weighted_sum", mutates_args=())
def _weighted_sum(rows_RH: torch.Tensor, weights_TC: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", rows_RH.device).gather_sum(rows_RH, place_TC, weights_TC)


@_weighted_sum.register_fake
def _(rows_RH, weights_TC, place_TC):
    return rows_RH.new_empty(place_TC.shape[0], rows_RH.shape[1])


@torch.library.custom_op("moe_train::weighted_sum_backward", mutates_args=())
def _weighted_sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation("rows", rows_RH.device).weighted_sum_backward(dy_TH, rows_RH, place_TC, weights_TC)


@_weighted_sum_backward.register_fake
def _(dy_TH, rows_RH, place_TC, weights_TC):
    return torch.empty_like(rows_RH), torch.empty_like(weights_TC)


def _save(ctx, inputs, output):
    rows_RH, weights_TC, place_TC = inputs
    ctx.save_for_backward(rows_RH, place_TC, weights_TC)


def _adjoint(ctx, dy_TH):
    drows_RH, dweights_TC = _weighted_sum_backward(dy_TH, *ctx.saved_tensors)
    return drows_RH, dweights_TC, None


_weighted_sum.register_autograd(_adjoint, setup_context=_save)
