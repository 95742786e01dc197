"""Spread and gather-sum against indexing in float64."""

import pytest
import torch

from moe_train.kernels import copy_tokens, row_maps, sum_copies
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
    spread, size = rows.spread(x, place_TC, tokens * copies), int(maps.counts_D.sum())
    assert torch.equal(spread[:size], x[maps.order_R // copies][:size])
    live = (place_TC >= 0).all(dim=1)
    spread = spread.clone()
    spread[size:] = float("nan")  # rows of padding are never computed
    total = rows.gather_sum(spread, place_TC, None)
    assert_close(total, torch.where(live[:, None], x.double() * copies, 0.0), dtype=dtype)


@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("tokens", "copies", "hidden"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_of_tokens_their_sums_and_every_gradient(tokens, copies, hidden, dtype, dropped, device):
    """Copies without a row have no gradient, and add nothing."""
    generator = torch.Generator().manual_seed(4)
    goals = torch.randint(0, 4, (tokens, copies), generator=generator)
    goals[torch.rand(tokens, copies, generator=generator) < dropped] = -1
    maps = row_maps(goals.to(device).reshape(-1), 4)
    place_TC, size = maps.place_R.view(tokens, copies), int(maps.counts_D.sum())
    order_R = maps.order_R[:size]
    token_R = order_R // copies
    x, dy = (torch.randn(tokens, hidden, generator=generator).to(device, dtype) for _ in range(2))
    rows, drows = (torch.randn(size, hidden, generator=generator).to(device, dtype) for _ in range(2))
    weights = torch.rand(tokens, copies, generator=generator).to(device, torch.promote_types(dtype, torch.float32))
    x.requires_grad_()
    copied = copy_tokens(x, place_TC, size, interpret=True)
    assert torch.equal(copied, x[token_R])
    copied.backward(drows)
    nothing = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    assert_close(x.grad, nothing.index_add(0, token_R, drows.double()), "dx", dtype=dtype)
    rows.requires_grad_()
    y = sum_copies(rows, place_TC, interpret=True)
    assert_close(y.detach(), nothing.index_add(0, token_R, rows.detach().double()), "y", dtype=dtype)
    y.backward(dy)
    assert torch.equal(rows.grad, dy[token_R])
    rows.grad = None
    weights.requires_grad_()
    y = sum_copies(rows, place_TC, weights, interpret=True)
    y.backward(dy)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (rows, weights)]
    expected = nothing.index_add(0, token_R, leaves[0] * leaves[1].view(-1)[order_R].unsqueeze(1))
    expected.backward(dy.double())
    assert_close(y.detach(), expected.detach(), "weighted", dtype=dtype)
    assert_close(rows.grad, leaves[0].grad, "d rows", dtype=dtype)
    found = torch.promote_types(dtype, torch.float32)
    assert_close(weights.grad, leaves[1].grad, "d weights", dtype=found)
