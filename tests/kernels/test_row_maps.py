"""Row maps against positions counted one by one in Python."""

import pytest
import torch

from moe_train.kernels import row_maps, runs_triton


def counted(destinations: list[int], size: int) -> tuple[list[int], list[int], list[int]]:
    """order, place, counts: stable by destination, padding last."""
    order = [c for d in [*range(size), -1] for c, goal in enumerate(destinations) if goal == d]
    place = [-1 if goal < 0 else order.index(c) for c, goal in enumerate(destinations)]
    return order, place, [destinations.count(d) for d in range(size)]


@pytest.mark.parametrize(
    ("copies", "size", "padding"),
    [(0, 5, 0.0), (1, 1, 0.0), (127, 3, 0.0), (131, 7, 0.3), (128, 200, 0.1), (389, 8, 0.0), (5, 2, 1.0)],
)
def test_equals_counting_one_by_one(copies, size, padding, device):
    generator = torch.Generator().manual_seed(copies)
    goals = torch.randint(0, size, (copies,), generator=generator)
    goals[torch.rand(copies, generator=generator) < padding] = -1
    maps = row_maps(goals.to(device), size)
    order, place, counts = counted(goals.tolist(), size)
    assert maps.order_R.tolist() == order
    assert maps.place_R.tolist() == place
    assert maps.counts_D.tolist() == counts


def test_all_to_one_destination_keep_their_order(device):
    maps = row_maps(torch.full((300,), 2, device=device), 4)
    assert maps.order_R.tolist() == list(range(300))
    assert maps.place_R.tolist() == list(range(300))
    assert maps.counts_D.tolist() == [0, 0, 300, 0]


def test_more_blocks_and_destinations_than_one_scan_takes(device, monkeypatch):
    if runs_triton(device):
        kernel = pytest.importorskip("moe_train.kernels.triton.row_maps")
        monkeypatch.setattr(kernel, "SCANNED_BLOCKS", 2)
    goals = torch.randint(-1, 37, (128 * 7 + 5,), generator=torch.Generator().manual_seed(0))
    maps = row_maps(goals.to(device), 37)
    order, place, counts = counted(goals.tolist(), 37)
    assert (maps.order_R.tolist(), maps.place_R.tolist(), maps.counts_D.tolist()) == (order, place, counts)
