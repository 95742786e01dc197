"""Moving rows between token order and expert order.

T tokens, C copies per token, R = T * C rows, H hidden size. `order` and `place` are those of `RowMaps`.
"""

import torch


def spread(x_TH: torch.Tensor, place_TC: torch.Tensor) -> torch.Tensor:
    """Each token at the places of its copies [R, H]; rows that are no copy's place, those of padding, hold anything."""
    copies_TCH = x_TH.unsqueeze(1).expand(*place_TC.shape, -1)
    there = place_TC >= 0
    rows_RH = x_TH.new_empty(place_TC.numel(), x_TH.shape[1])
    rows_RH[place_TC[there]] = copies_TCH[there]
    return rows_RH


def gather_sum(rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor | None) -> torch.Tensor:
    """Sum over the copies of a token [T, H], weighted or not, in float32; padding adds nothing."""
    copies_TCH = rows_RH[place_TC.clamp(min=0)].to(_wide(rows_RH))
    if weights_TC is not None:
        copies_TCH = copies_TCH * weights_TC.to(copies_TCH.dtype).unsqueeze(-1)
    copies_TCH = copies_TCH.masked_fill((place_TC < 0).unsqueeze(-1), 0.0)
    return copies_TCH.sum(dim=1).to(rows_RH.dtype)


def weighted_sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [R, H] and of the weights [T, C]; every copy must have a place."""
    wide = _wide(rows_RH)
    dy_T1H = dy_TH.to(wide).unsqueeze(1)
    dweights_TC = (rows_RH[place_TC].to(wide) * dy_T1H).sum(dim=-1)
    drows_RH = torch.empty_like(rows_RH)
    weighted_TCH = dy_T1H * weights_TC.to(wide).unsqueeze(-1)
    drows_RH[place_TC.reshape(-1)] = weighted_TCH.reshape(rows_RH.shape).to(rows_RH.dtype)
    return drows_RH, dweights_TC.to(weights_TC.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
