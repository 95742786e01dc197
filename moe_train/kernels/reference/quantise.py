"""Rows to FP8 with a scale each, on the way from token order to expert order; and weights, once per optimizer step.

T tokens, C copies per token, R rows, H hidden size, L experts. See `kernels.fp8` for what a scale is.
"""

import torch

from moe_train.kernels.fp8 import E4M3, LARGEST, SMALLEST, Fp8Rows
from moe_train.kernels.reference.rows import order_of


def spread(
    x_TH: torch.Tensor, place_TC: torch.Tensor, num_rows: int, *, plain: bool, fp8: bool, aligned: bool = False
) -> tuple[torch.Tensor | None, Fp8Rows | None]:
    """Each token's row at the places of its copies [R, H], as it is and in FP8, whichever are asked for.

    Args:
        place_TC: -1 for padding, which has no row. aligned: see `rows.spread`; of the rows as they are.
    """
    return (
        _placed(x_TH, place_TC, num_rows) if plain else None,
        Fp8Rows(*(_placed(part, place_TC, num_rows) for part in rounded(x_TH))) if fp8 else None,
    )


def _placed(values_T: torch.Tensor, place_TC: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[T, ...] -> [R, ...]; rows that nobody has hold anything."""
    token_R = order_of(place_TC, num_rows) // place_TC.shape[1]
    if values_T.dtype == E4M3:  # torch indexes no e4m3
        return values_T.view(torch.uint8)[token_R].view(E4M3)
    return values_T[token_R]


def along(weight_LNK: torch.Tensor, into: Fp8Rows) -> None:
    """[L, N, K] with scales [L, N]."""
    found = rounded(weight_LNK)
    into.values.copy_(found.values)
    into.scales.copy_(found.scales)


def across(weight_LNK: torch.Tensor, into: Fp8Rows) -> None:
    """Transposed: [L, K, N] with scales [L, K]."""
    along(weight_LNK.transpose(1, 2).contiguous(), into)


def rounded(rows: torch.Tensor) -> Fp8Rows:
    """[..., N, K] -> FP8 with scales [..., N]."""
    wide = rows.float()
    largest = wide.abs().amax(dim=-1).clamp(min=SMALLEST)
    limit = torch.full_like(largest, LARGEST)  # a number would be multiplied by a reciprocal, and rounded twice
    scales, inverse = largest / limit, limit / largest
    return Fp8Rows((wide * inverse.unsqueeze(-1)).to(E4M3), scales)
