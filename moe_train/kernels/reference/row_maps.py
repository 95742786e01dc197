"""Where the rows of a routing go: a stable sort by destination, its inverse, and the counts.

R copies of tokens, D destinations. See `kernels.row_maps`.
"""

import torch


def row_maps(destination_R: torch.Tensor, num_destinations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """order [R], place [R], counts [D]."""
    padded = destination_R < 0
    order = torch.argsort(torch.where(padded, num_destinations, destination_R), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    counts = destination_R.new_zeros(num_destinations + 1)
    counts.scatter_add_(0, destination_R + 1, torch.ones_like(destination_R))
    return order, torch.where(padded, -1, place), counts[1:].clone()
