"""Rows, weights and activations in FP8 against a table of all e4m3 numbers; the product against loops."""

import pytest
import torch

from moe_train.kernels import Fp8Gemms, choose, quantise_weights, row_maps
from moe_train.kernels.choose import implementation
from moe_train.kernels.fp8 import E4M3, GEMMS, LARGEST, Fp8Rows, grouped_product, quantise_weight
from moe_train.kernels.grouped_gemm import row_groups
from moe_train.testing import assert_close

BF16 = torch.bfloat16


def numbers() -> torch.Tensor:
    """All finite e4m3 numbers by their bits' order of magnitude: exponent * 8 + mantissa, from 0 to 448."""
    return torch.arange(0x7F, dtype=torch.uint8).view(E4M3).double()


def nearest(values: torch.Tensor) -> torch.Tensor:
    """By looking all of them up; of two that are as near, the one with the even mantissa."""
    table = numbers()
    distance = (values.double().abs().unsqueeze(-1) - table).abs()
    least = distance.min(dim=-1, keepdim=True).values
    odd = torch.arange(len(table)) % 2
    place = torch.where(distance == least, odd, 2).argmin(dim=-1)
    return table[place] * values.double().sign()


def assert_quantised(found: Fp8Rows, rows: torch.Tensor) -> None:
    """found: [..., K] and scales of the rows."""
    wide = rows.float()
    largest = wide.abs().amax(dim=-1).clamp(min=1e-30)
    limit = torch.full_like(largest, LARGEST)
    assert torch.equal(found.scales, largest / limit)
    assert torch.equal(found.values.double(), nearest(wide * (limit / largest).unsqueeze(-1)))


def draw(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of zeros among them."""
    generator = torch.Generator().manual_seed(rows + seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-20, 3, rows).unsqueeze(1)
    x[rows // 2] = 0
    return x.to(BF16)


def one_by_one(rows: int) -> torch.Tensor:
    """Places of tokens that have a copy each, in order."""
    return torch.arange(rows).unsqueeze(1)


@pytest.mark.parametrize(("tokens", "hidden", "copies"), [(0, 16, 2), (1, 16, 1), (13, 48, 3), (3, 2064, 2)])
def test_tokens_to_rows(tokens, hidden, copies, device):
    x = draw(tokens, hidden) if tokens else torch.zeros(0, hidden, dtype=BF16)
    ids = torch.randint(0, 4, (tokens * copies,), generator=torch.Generator().manual_seed(1))
    ids[::5] = -1
    maps = row_maps(ids, 4)
    there, place = int(maps.counts_D.sum()), maps.place_R.view(tokens, copies)
    kernel = implementation("quantise", device)
    plain, quantised = kernel.spread(x, place, tokens * copies, plain=True, fp8=True)
    expected = x[maps.order_R[:there] // copies]
    assert plain.shape == (tokens * copies, hidden)
    assert torch.equal(plain[:there], expected)
    assert_quantised(Fp8Rows(quantised.values[:there], quantised.scales[:there]), expected)
    alone = kernel.spread(x, place, there, plain=False, fp8=True)
    assert alone[0] is None
    assert torch.equal(alone[1].values.double(), quantised.values[:there].double())
    assert torch.equal(kernel.spread(x, place, there, plain=True, fp8=False)[0], expected)


def test_what_is_not_finite_stays_so_and_touches_its_own_row_alone(device):
    x = draw(5, 16)
    x[0, 3], x[1, 4], x[4, 5] = float("inf"), float("nan"), -float("inf")
    _, found = implementation("quantise", device).spread(x, one_by_one(5), 5, plain=False, fp8=True)
    assert torch.isfinite(found.scales).tolist() == [False, False, True, True, False]
    weight = quantise_weight(torch.ones(1, 16, 16, dtype=BF16), across=False)
    product = grouped_product(found, weight, row_groups(torch.tensor([5]), 5))
    assert not torch.isfinite(product[[0, 1, 4]]).any()
    assert torch.isfinite(product[2:4]).all()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (144, 80), (16, 2064), (272, 16)])
def test_weights_along_and_across(rows, columns, device):
    weight = torch.stack([draw(rows, columns, seed) for seed in range(3)])
    assert_quantised(quantise_weight(weight, across=False), weight)
    assert_quantised(quantise_weight(weight, across=True), weight.transpose(1, 2))


def test_each_product_has_its_weights_and_no_other(device):
    gate_up, down = torch.randn(2, 64, 48).to(BF16), torch.randn(2, 48, 32).to(BF16)
    shapes = {"h": (2, 64, 48), "y": (2, 48, 32), "dA": (2, 32, 48), "dX": (2, 48, 64)}
    for names in (GEMMS, ("h", "dA"), ()):
        found = quantise_weights(gate_up, down, Fp8Gemms(names))
        for number, name in enumerate(GEMMS):
            values, scales = found[2 * number : 2 * number + 2]
            assert values.shape == (shapes[name] if name in names else (0,))
            assert scales.shape == (shapes[name][:2] if name in names else (0,))
    again = quantise_weights(gate_up * 2, down, Fp8Gemms(names := ("h", "dX")), kept := found_for(gate_up, down, names))
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in kept], "written where they were"
    assert_quantised(Fp8Rows(*again[:2]), gate_up * 2)
    with pytest.raises(AssertionError, match="is not the room for"):
        quantise_weights(gate_up[:1], down[:1], Fp8Gemms(names), kept)


def found_for(gate_up, down, names):
    return quantise_weights(gate_up, down, Fp8Gemms(names))


@pytest.mark.parametrize(("rows", "there", "inner", "held"), [(7, 5, 16, True), (3, 3, 336, True), (5, 4, 144, False)])
def test_activation(rows, there, inner, held, device, monkeypatch):
    kernel, plain = implementation("fp8_activation", device), implementation("activation", device)
    if not held and choose.runs_triton(device):
        for limit in ("HELD_FORWARD", "HELD_BACKWARD", "CHUNK"):
            monkeypatch.setattr(kernel, limit, 64)
    generator = torch.Generator().manual_seed(rows)
    h = (torch.randn(rows, 2 * inner, generator=generator) * 4).to(BF16)
    dout = torch.randn(rows, inner, generator=generator).to(BF16)
    dout[0] = 0
    h[there:], dout[there:] = float("nan"), float("nan")  # rows of padding
    order = torch.randperm(rows, generator=generator)
    weights = torch.rand(rows, generator=generator)
    offsets = torch.tensor([1, there], dtype=torch.int32)
    arguments = (offsets, weights, order, "silu")

    out = kernel.forward(h, *arguments)
    exact = plain.forward(h.float(), *arguments)[:there]
    assert_close_in_fp8(Fp8Rows(out.values[:there], out.scales[:there]), exact)
    dh, quantised, again, dweights = kernel.backward(dout, h, *arguments)
    expected = plain.backward(dout.float(), h.float(), *arguments)
    assert_close_in_fp8(Fp8Rows(quantised.values[:there], quantised.scales[:there]), expected[0][:there])
    assert not quantised.values[0].float().any(), "a row of zeros"
    assert_close(dh[:there], expected[0][:there].to(BF16), "dh")
    assert_close(again[:there], expected[1][:there].to(BF16), "the output again")
    over = kernel.backward(dout.clone(), h, *arguments, in_place=True)
    pairs = ((dh, over[0]), *zip(quantised, over[1], strict=True), (again, over[2]))
    assert all(torch.equal(a[:there].float(), b[:there].float()) for a, b in pairs)
    assert torch.equal(dweights, over[3])
    assert_close(dweights, expected[2], "d weights", dtype=torch.float32)


def assert_close_in_fp8(found: Fp8Rows, exact: torch.Tensor) -> None:
    """Half a step of e4m3 from every element (3 bits behind the point), and float32's rounding."""
    scales = found.scales.double().unsqueeze(-1)
    assert_close(found.scales, exact.abs().amax(dim=-1).clamp(min=1e-30) / LARGEST, "scales", dtype=torch.float32)
    error = (found.values.double() * scales - exact.double()).abs()
    step = torch.maximum(exact.double().abs() * 2.0**-4, scales * 2.0**-10)
    assert (error <= step * (1 + 1e-4)).all(), float((error / step).max())


def test_product_is_that_of_the_numbers_stood_for(device):
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(11, 32, generator=generator), torch.randn(4, 48, 32, generator=generator)
    kernel = implementation("quantise", device)
    rows = kernel.spread(a.to(BF16), one_by_one(11), 11, plain=False, fp8=True)[1]
    weight = quantise_weight(b.to(BF16), across=False)
    found = grouped_product(rows, weight, row_groups(torch.tensor([3, 0, 7, 1]), 11))
    of_row = [0] * 3 + [2] * 7 + [3]
    wide = [part.values.double() * part.scales.double().unsqueeze(-1) for part in (rows, weight)]
    expected = torch.stack([wide[1][e] @ wide[0][r] for r, e in enumerate(of_row)])
    assert_close(found, expected.to(BF16), "product")
