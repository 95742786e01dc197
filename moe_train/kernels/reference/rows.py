"""Moving rows between token order and expert order.

T tokens, C copies per token, R rows, H hidden size. `order` and `place` are those of `RowMaps`.
"""

import torch


def spread(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, aligned: bool = False) -> torch.Tensor:
    """Each token at the places of its copies [R, H]; rows that are no copy's place hold anything.

    Args:
        aligned: where rows begin may be as `grouped_gemm.empty_rows` has it.
    """
    return x_TH[order_of(place_TC, num_rows) // place_TC.shape[1]]


def gather_sum(rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor | None) -> torch.Tensor:
    """Sum over the copies of a token [T, H], weighted or not, in float32; padding adds nothing."""
    if not len(rows_RH):
        return rows_RH.new_zeros(len(place_TC), rows_RH.shape[1])
    copies_TCH = rows_RH[place_TC.clamp(min=0)].to(_wide(rows_RH))
    if weights_TC is not None:
        copies_TCH = copies_TCH * weights_TC.to(copies_TCH.dtype).unsqueeze(-1)
    copies_TCH = copies_TCH.masked_fill((place_TC < 0).unsqueeze(-1), 0.0)
    return copies_TCH.sum(dim=1).to(rows_RH.dtype)


def weighted_sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [R, H], each of which must be a copy's place, and of the weights [T, C]; 0 for padding."""
    if not len(rows_RH):
        return torch.empty_like(rows_RH), torch.zeros_like(weights_TC)
    wide, order_R = _wide(rows_RH), order_of(place_TC, len(rows_RH))
    dy_TH = dy_TH.to(wide)
    dots_TC = (rows_RH[place_TC.clamp(min=0)].to(wide) * dy_TH.unsqueeze(1)).sum(dim=-1)
    dweights_TC = dots_TC.masked_fill(place_TC < 0, 0.0).to(weights_TC.dtype)
    weights_R1 = weights_TC.reshape(-1)[order_R].to(wide).unsqueeze(1)
    return (dy_TH[order_R // place_TC.shape[1]] * weights_R1).to(rows_RH.dtype), dweights_TC


def order_of(place_TC: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The copy that each row is, without a look at the numbers: padding is sorted behind all rows."""
    place_R = place_TC.reshape(-1)
    return torch.argsort(torch.where(place_R < 0, place_R.numel(), place_R), stable=True)[:num_rows]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
