"""Moving rows between token order and expert order.

T tokens, C copies per token, R rows, H hidden size. `order` and `place` are those of `RowMaps`.
"""

import torch
import torch.nn.functional as F


def spread(x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, aligned: bool = False) -> torch.Tensor:
    """Each token at the places of its copies [R, H]; rows that are no copy's place hold anything.

    Args:
        aligned: rows may begin as `grouped_gemm.empty_rows` lays them. Here they never do.
    """
    return x_TH[order_of(place_TC, num_rows) // place_TC.shape[1]]


def gather_sum(rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor | None) -> torch.Tensor:
    """Sum over the copies of a token [T, H], weighted or not, in float32; padding adds nothing."""
    rows, hidden = rows_RH.shape
    if not rows:
        return rows_RH.new_zeros(len(place_TC), hidden)
    wide = rows_RH.new_empty(rows + 1, hidden, dtype=_wide(rows_RH))
    wide[:rows], wide[rows] = rows_RH, 0.0
    if weights_TC is not None:
        wide[:rows] *= weights_TC.reshape(-1)[order_of(place_TC, rows)].to(wide.dtype).unsqueeze(1)
    bags_TC = torch.where(place_TC < 0, rows, place_TC)  # a copy of the rows, but no [T, C, H]
    return F.embedding_bag(bags_TC, wide, mode="sum").to(rows_RH.dtype)


def weighted_sum_backward(
    dy_TH: torch.Tensor, rows_RH: torch.Tensor, place_TC: torch.Tensor, weights_TC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [R, H], each of which must be a copy's place, and of the weights [T, C]; 0 for padding."""
    if not len(rows_RH):
        return torch.empty_like(rows_RH), torch.zeros_like(weights_TC)
    wide, order_R = _wide(rows_RH), order_of(place_TC, len(rows_RH))
    dy_RH = dy_TH[order_R // place_TC.shape[1]].to(wide)
    dots_R = (rows_RH.to(wide) * dy_RH).sum(dim=-1).to(weights_TC.dtype)
    weights_R1 = weights_TC.reshape(-1)[order_R].to(wide).unsqueeze(1)
    return (dy_RH * weights_R1).to(rows_RH.dtype), torch.where(place_TC < 0, 0.0, dots_R[place_TC.clamp(min=0)])


def order_of(place_TC: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The copy that each row is, without a look at the numbers; 0 for rows that are no copy's place. Places are below
    `num_rows`."""
    place_R = place_TC.reshape(-1)
    order = place_R.new_zeros(num_rows + 1)  # padding goes behind the last one
    copies = torch.arange(place_R.numel(), device=place_R.device)
    return order.scatter_(0, torch.where(place_R < 0, num_rows, place_R), copies)[:num_rows]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
