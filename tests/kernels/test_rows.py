"""Spread and gather-sum against indexing in float64."""

import pytest
import torch

from moe_train.kernels import copy_tokens, row_maps, weighted_sum
from moe_train.kernels.choose import implementation
from moe_train.testing import assert_close

SIZES = [(1, 1, 1), (7, 3, 5), (33, 2, 16), (5, 4, 600), (0, 2, 4)]


def maps_of(tokens: int, copies: int, device, padding: float = 0.0):
    generator = torch.Generator().manual_seed(tokens)
    goals = torch.randint(0, 4, (tokens, copies), generator=generator)
    goals[torch.rand(tokens, generator=generator) < padding] = -1
    return row_maps(goals.to(device).reshape(-1), 4)


@pytest.mark.parametrize(("tokens", "copies", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spread_and_its_sum(tokens, copies, hidden, dtype, device):
    rows = implementation("rows", device)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    maps = maps_of(tokens, copies, device, padding=0.3)
    place_TC = maps.place_R.view(tokens, copies)
    spread, size = rows.spread(x, place_TC), int(maps.counts_D.sum())
    assert torch.equal(spread[:size], x[maps.order_R // copies][:size])
    live = (place_TC >= 0).all(dim=1)
    spread = spread.clone()
    spread[size:] = float("nan")  # rows of padding are never computed
    total = rows.gather_sum(spread, place_TC, None)
    assert_close(total, torch.where(live[:, None], x.double() * copies, 0.0), dtype=dtype)


@pytest.mark.parametrize(("tokens", "copies", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_sum_and_its_gradients(tokens, copies, hidden, dtype, device):
    generator = torch.Generator().manual_seed(2)
    maps = maps_of(tokens, copies, device)
    rows = torch.randn(tokens * copies, hidden, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.rand(tokens, copies, generator=generator).to(device).requires_grad_()
    dy = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    y = weighted_sum(rows, weights, maps.place_R)
    y.backward(dy)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (rows, weights)]
    expected = (leaves[0][maps.place_R].view(tokens, copies, hidden) * leaves[1].unsqueeze(-1)).sum(dim=1)
    expected.backward(dy.double())
    assert_close(y.detach(), expected.detach(), "sum", dtype=dtype)
    assert_close(rows.grad, leaves[0].grad, "d rows", dtype=dtype)
    assert_close(weights.grad, leaves[1].grad, "d weights", dtype=torch.float32)


@pytest.mark.parametrize(("tokens", "copies", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_tokens_and_their_gradient(tokens, copies, hidden, dtype, device):
    generator = torch.Generator().manual_seed(4)
    maps = maps_of(tokens, copies, device)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
    drows = torch.randn(tokens * copies, hidden, generator=generator).to(device, dtype)
    rows = copy_tokens(x, maps.place_R.view(tokens, copies))
    assert torch.equal(rows, x[maps.order_R // copies])
    rows.backward(drows)
    expected = drows.double()[maps.place_R].view(tokens, copies, hidden).sum(dim=1)
    assert_close(x.grad, expected, "dx", dtype=dtype)
