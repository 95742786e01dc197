"""Where every copy of a token goes when rows are sorted by destination, without a sort on a GPU."""

from dataclasses import dataclass

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.operator import Operator


@dataclass(frozen=True, kw_only=True)
class RowMaps:
    """R copies, numbered t * C + c for the C copies of token t; D destinations.

    order_R: the copy that each sorted row is; padding comes last, and may be cut off. place_R: its inverse, -1 for
    padding. counts_D: rows per destination, int64.
    """

    order_R: torch.Tensor
    place_R: torch.Tensor
    counts_D: torch.Tensor


@torch.no_grad()
def row_maps(destination_R: torch.Tensor, num_destinations: int, interpret: bool = True) -> RowMaps:
    """Sort copies by destination, stable. Nothing is read back from the device.

    Args:
        destination_R: int64, 0..D-1, or -1 for padding. interpret: see `kernels.rows`.
    """
    order_R, place_R, counts_D = _row_maps(destination_R.contiguous(), num_destinations, interpret)
    return RowMaps(order_R=order_R, place_R=place_R, counts_D=counts_D)


def forward(
    destination_R: torch.Tensor, num_destinations: int, interpret: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernel = dense_implementation("row_maps", destination_R, interpret=interpret)
    return kernel.row_maps(destination_R, num_destinations)


def fake_forward(destination_R, num_destinations, interpret):
    order_R = torch.empty_like(destination_R)
    return order_R, torch.empty_like(order_R), destination_R.new_empty(num_destinations)


_row_maps = Operator("row_maps", forward, fake_forward)
