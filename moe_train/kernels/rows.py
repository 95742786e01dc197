"""Rows that go to other ranks, and those that come back: a token's copies, and the weighted sum over them."""

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.operator import Operator


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


def copy_forward(x_TH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", x_TH.device).spread(x_TH, place_TC)


def fake_copy_forward(x_TH, place_TC):
    return x_TH.new_empty(place_TC.numel(), x_TH.shape[1])


def copy_backward(drows_RH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", drows_RH.device).gather_sum(drows_RH, place_TC, None)


def fake_copy_backward(drows_RH, place_TC):
    return drows_RH.new_empty(place_TC.shape[0], drows_RH.shape[1])


def _copy_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _copy_adjoint(ctx, drows_RH):
    return _copy_tokens_backward(drows_RH, *ctx.saved_tensors), None


_copy_tokens_backward = Operator("copy_tokens_backward", copy_backward, fake_copy_backward)
_copy_tokens = Operator("copy_tokens", copy_forward, fake_copy_forward, _copy_save, _copy_adjoint)


def sum_forward(rows_RH: torch.Tensor, weights_TC: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    return implementation("rows", rows_RH.device).gather_sum(rows_RH, place_TC, weights_TC)


def fake_sum_forward(rows_RH, weights_TC, place_TC):
    return rows_RH.new_empty(place_TC.shape[0], rows_RH.shape[1])


def sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation("rows", rows_RH.device).weighted_sum_backward(dy_TH, rows_RH, place_TC, weights_TC)


def fake_sum_backward(dy_TH, rows_RH, place_TC, weights_TC):
    return torch.empty_like(rows_RH), torch.empty_like(weights_TC)


def _sum_save(ctx, inputs, output):
    rows_RH, weights_TC, place_TC = inputs
    ctx.save_for_backward(rows_RH, place_TC, weights_TC)


def _sum_adjoint(ctx, dy_TH):
    drows_RH, dweights_TC = _weighted_sum_backward(dy_TH, *ctx.saved_tensors)
    return drows_RH, dweights_TC, None


_weighted_sum_backward = Operator("weighted_sum_backward", sum_backward, fake_sum_backward)
_weighted_sum = Operator("weighted_sum", sum_forward, fake_sum_forward, _sum_save, _sum_adjoint)
