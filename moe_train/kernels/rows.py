"""A token's copies as rows, and the sum over them: between tokens and what goes to ranks, or to experts.

interpret: on a CPU Triton's interpreter, where that is on; else the torch reference, as always for float64.

T tokens, C copies per token, R rows, H hidden size.
"""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.operator import Operator


def copy_tokens(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, interpret: bool = True) -> torch.Tensor:
    """Tokens [T, H] -> a row for each copy, at its place [R, H]. The adjoint adds up a token's rows, as `sum_copies`.

    Args:
        place_TC: int64; -1 for a copy that has no row. Every row must be a copy's place.
    """
    return _copy_tokens(x_TH, place_TC, num_rows, interpret)


def sum_copies(
    rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor | None = None, interpret: bool = True
) -> torch.Tensor:
    """Rows [R, H] -> the sum over a token's rows [T, H], in float32 at least, cast once; 0 for a token without one.

    The adjoint writes each row once: no atomics. Saved are the places, and with weights these and the rows.

    Args:
        weights_TC: of the rows, by copy. None: 1.
    """
    if weights_TC is None:
        return _sum_copies(rows_RH, place_TC, interpret)
    return _weighted_sum(rows_RH, place_TC, weights_TC, interpret)


def copy_forward(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, interpret: bool) -> torch.Tensor:
    return dense_implementation("rows", x_TH, interpret=interpret).spread(x_TH, place_TC, num_rows)


def fake_copy_forward(x_TH, place_TC, num_rows, interpret):
    return x_TH.new_empty(num_rows, x_TH.shape[1])


def _copy_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.interpret = inputs[3]


def _copy_adjoint(ctx, drows_RH):
    return _sum_copies(drows_RH, *ctx.saved_tensors, ctx.interpret), None, None, None


def sum_forward(rows_RH: torch.Tensor, place_TC: torch.Tensor, interpret: bool) -> torch.Tensor:
    return dense_implementation("rows", rows_RH, interpret=interpret).gather_sum(rows_RH, place_TC, None)


def fake_sum_forward(rows_RH, place_TC, *rest):
    return rows_RH.new_empty(place_TC.shape[0], rows_RH.shape[1])


def _sum_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.num_rows, ctx.interpret = inputs[0].shape[0], inputs[2]


def _sum_adjoint(ctx, dy_TH):
    return _copy_tokens(dy_TH, *ctx.saved_tensors, ctx.num_rows, ctx.interpret), None, None


def weighted_forward(
    rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor, interpret: bool
) -> torch.Tensor:
    return dense_implementation("rows", rows_RH, interpret=interpret).gather_sum(rows_RH, place_TC, weights_TC)


def weighted_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor, interpret: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = dense_implementation("rows", rows_RH, interpret=interpret)
    return kernel.weighted_sum_backward(dy_TH, rows_RH, place_TC, weights_TC)


def fake_weighted_backward(dy_TH, rows_RH, place_TC, weights_TC, interpret):
    return rows_RH.new_empty(rows_RH.shape), weights_TC.new_empty(weights_TC.shape)


def _weighted_save(ctx, inputs, output):
    *tensors, ctx.interpret = inputs
    ctx.save_for_backward(*tensors)


def _weighted_adjoint(ctx, dy_TH):
    drows_RH, dweights_TC = _weighted_sum_backward(dy_TH, *ctx.saved_tensors, ctx.interpret)
    return drows_RH, None, dweights_TC, None


_copy_tokens = Operator("copy_tokens", copy_forward, fake_copy_forward, _copy_save, _copy_adjoint)
_sum_copies = Operator("sum_copies", sum_forward, fake_sum_forward, _sum_save, _sum_adjoint)
_weighted_sum_backward = Operator("weighted_sum_backward", weighted_backward, fake_weighted_backward)
_weighted_sum = Operator("weighted_sum", weighted_forward, fake_sum_forward, _weighted_save, _weighted_adjoint)
