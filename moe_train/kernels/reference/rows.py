"""Moving rows between token order and expert order.

T tokens, C copies per token, R rows, H hidden size. `order` and `place` are those of `RowMaps`.
"""

import torch


def spread(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each token at the places of its copies [R, H]; rows that are no copy's place hold anything."""
    copies_TCH = x_TH.unsqueeze(1).expand(*place_TC.shape, -1)
    there = place_TC >= 0
    rows_RH = x_TH.new_empty(num_rows, x_TH.shape[1])
    rows_RH[place_TC[there]] = copies_TCH[there]
    return rows_RH


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
    wide, there = _wide(rows_RH), place_TC >= 0
    drows_RH, dweights_TC = torch.empty_like(rows_RH), torch.zeros_like(weights_TC)
    place_R = place_TC[there]
    dy_RH = dy_TH.to(wide)[there.nonzero()[:, 0]]
    dweights_TC[there] = (rows_RH[place_R].to(wide) * dy_RH).sum(dim=-1).to(weights_TC.dtype)
    drows_RH[place_R] = (dy_RH * weights_TC[there].to(wide).unsqueeze(-1)).to(rows_RH.dtype)
    return drows_RH, dweights_TC


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
