"""Grouped GEMMs against loops over experts in float64: Triton's in float32 under its interpreter, torch's too."""

import types
from typing import Any

import pytest
import torch

from moe_train.kernels import choose, row_maps
from moe_train.kernels.choose import implementation
from moe_train.kernels.grouped_gemm import (
    empty_rows,
    gemm_of,
    gradient_by_tokens,
    row_groups,
    rows_by_weights,
    weight_gradient,
)
from moe_train.kernels.reference import grouped_gemm as torch_gemm
from moe_train.kernels.triton import grouped_gemm as triton_gemm
from moe_train.testing import assert_close

TILE = triton_gemm.Tile(BM=16, BN=32, BK=16, num_warps=4, num_stages=2)
LOADS = [[37, 0, 5, 16, 1], [150, 9], [0, 0, 0], [1], [0, 48, 33, 0], [16, 16, 0]]
SIZES = [(16, 32), (40, 24), (4, 8), (36, 100)]


@pytest.fixture
def loops(monkeypatch):
    """Under the interpreter a loop's bound may be a tensor; with numpy from 2.4 on, one of one element is no int."""
    if not choose.interpreted():
        return
    from triton.runtime import interpreter

    patched = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def draw(loads: list[int], *sizes: int, behind: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of these widths, NaN behind the last expert; offsets."""
    generator = torch.Generator().manual_seed(sum(loads) + sizes[0])
    rows = [torch.randn(sum(loads) + behind, size, generator=generator) for size in sizes]
    for each in rows:
        each[sum(loads) :] = float("nan")
    return rows, torch.tensor(loads).cumsum(0).to(torch.int32)


def slices(offsets: torch.Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def tiles_of(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return triton_gemm.row_groups(offsets.diff(prepend=offsets[:1] * 0), len(rows), TILE.BM)[1]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("sizes", [(16, 32), (40, 24), (4, 8), (48, 100)], ids=str)
@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_rows_times_their_experts_matrix(loads, sizes, across, loops):
    inner, size = sizes
    (rows,), offsets = draw(loads, inner, behind=7)
    weight = torch.randn(len(loads), *((inner, size) if across else (size, inner)))
    found = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), across, tile=TILE)
    for number, part in enumerate(slices(offsets)):
        matrix = weight[number].double() if across else weight[number].double().t()
        assert_close(found[part], rows[part].double() @ matrix, dtype=torch.float32)
    again = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), across, tile=TILE)
    assert torch.equal(found[: sum(loads)], again[: sum(loads)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_gradient_of_the_weights(loads, sizes, loops):
    (left, right), offsets = draw(loads, *sizes, behind=7)
    found = triton_gemm.weight_gradient(left, right, offsets, tile=TILE)
    for number, part in enumerate(slices(offsets)):
        expected = left[part].double().t() @ right[part].double()
        assert_close(found[number], expected, dtype=torch.float32)


@pytest.mark.parametrize("across", [False, True])
def test_neither_rows_behind_nor_the_next_experts_matrix_are_touched(across, loops):
    (rows,), offsets = draw([20, 7, 0], 44, behind=9)  # the last block of K is not whole
    rows[27:] = 1.0
    weight = torch.randn(3, 44, 40) if across else torch.randn(3, 40, 44)
    weight[1:] = float("nan")
    found = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), across, tile=TILE)
    assert found[:20].isfinite().all()
    assert found[20:].isnan().all(), "of an expert of NaN, and never written"


def test_tile_of_a_product():
    """128 x 256, but for few rows of a gradient, and where half of a block of columns would be empty."""
    assert triton_gemm.gradient_tile(1024, 768) == triton_gemm.rows_tile(768) == triton_gemm.Tile()
    assert triton_gemm.gradient_tile(160, 512) == triton_gemm.SMALL
    assert triton_gemm.gradient_tile(6000, 360) == triton_gemm.rows_tile(360) == triton_gemm.SMALL
    assert triton_gemm.rows_tile(1000) == triton_gemm.rows_tile(1408) == triton_gemm.Tile(), "nearly full"


def test_gradient_into_columns_of_a_larger_one(loops):
    (left, right), offsets = draw([20, 0, 7], 24, 48)
    out = torch.full((3, 24, 48), 7.0)
    triton_gemm.weight_gradient(left, right[:, 8:24].contiguous(), offsets, out[:, :, 8:24], tile=TILE)
    for number, part in enumerate(slices(offsets)):
        expected = left[part].double().t() @ right[part, 8:24].double()
        assert_close(out[number, :, 8:24], expected, dtype=torch.float32)
    assert (out[:, :, :8] == 7).all()
    assert (out[:, :, 24:] == 7).all()


@pytest.mark.parametrize(("columns", "parts"), [(64, [32, 32]), (96, [64, 32]), (72, [72]), (32, [32])], ids=str)
@pytest.mark.parametrize("gemm", [triton_gemm, torch_gemm])
def test_gradient_by_tokens(gemm, columns, parts, monkeypatch, loops):
    """Ours in two parts of whole blocks of columns, if neither is less than a quarter."""
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.gemm_of", lambda *operands: gemm)
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.WIDE", 32)
    ids = torch.tensor([[0, 2], [2, -1], [3, 0], [2, 3], [0, 3]])
    maps = row_maps(ids.reshape(-1), 4)
    place, offsets = maps.place_R.view(ids.shape), maps.counts_D.cumsum(0).to(torch.int32)
    x, left = torch.randn(5, columns), torch.randn(10, 12)
    spread = implementation("rows", x.device).spread
    widths: list[int] = []
    module = types.SimpleNamespace(spread=lambda x, **where: widths.append(x.shape[1]) or spread(x, **where))
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.implementation", lambda *args: module)
    found = gradient_by_tokens(left, x, place, offsets)
    assert widths == (parts if gemm is triton_gemm else [columns])
    for number, part in enumerate(slices(offsets)):
        rows = x[maps.order_R[part] // 2]
        assert_close(found[number], left[part].double().t() @ rows.double(), dtype=torch.float32)


def test_groups_of_rows_go_through_each_block_of_columns(monkeypatch, loops):
    """More tiles of rows than a group has, and a last group that is not full."""
    monkeypatch.setattr(triton_gemm, "LARGE", 0)
    (rows, right), offsets = draw([150, 9, 40], 64, 100)
    weight = torch.randn(3, 100, 64)
    found = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), False, tile=TILE)
    gradients = triton_gemm.weight_gradient(rows.repeat(1, 3), right, offsets, tile=TILE)
    for number, part in enumerate(slices(offsets)):
        assert_close(found[part], rows[part].double() @ weight[number].double().t(), dtype=torch.float32)
        expected = rows[part].double().repeat(1, 3).t() @ right[part].double()
        assert_close(gradients[number], expected, dtype=torch.float32)


def test_rows_with_gaps_between_them(gaps, loops):
    """Operands and products; what is in the gaps of operands is NaN."""
    (plain, right), offsets = draw([37, 0, 16], 40, 24)
    rows, right = (empty_rows(*each.shape, each).copy_(each) for each in (plain, right))
    assert rows.stride() == (64, 1)
    weight = torch.randn(3, 24, 40)
    found = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), False, tile=TILE)
    assert found.stride() == (32, 1)
    gradients = triton_gemm.weight_gradient(rows, right, offsets, tile=TILE)
    for number, part in enumerate(slices(offsets)):
        assert_close(found[part], rows[part].double() @ weight[number].double().t(), dtype=torch.float32)
        assert_close(gradients[number], rows[part].double().t() @ right[part].double(), dtype=torch.float32)


def test_where_torchs_product_leaves_no_gaps_a_copy_has_them(gaps):
    (rows,), _ = draw([3, 0, 6], 16)
    found = rows_by_weights(rows, torch.randn(3, 40, 16), row_groups(torch.tensor([3, 0, 6]), 9))
    assert found.stride() == empty_rows(9, 40, rows).stride() == (64, 1)


def test_no_rows():
    nothing, offsets = torch.zeros(0, 16), torch.zeros(2, dtype=torch.int32)
    assert triton_gemm.rows_by_weights(nothing, torch.ones(2, 8, 16), torch.zeros(7), False).shape == (0, 8)
    assert torch.equal(triton_gemm.weight_gradient(nothing, nothing, offsets), torch.zeros(2, 16, 16))


@pytest.mark.parametrize("loads", [*LOADS, [0, 0, 33, 0], [1] * 40], ids=str)
def test_tiles_of_each_expert(loads):
    """More than one program writes them; the rows behind the last expert are in none."""
    offsets, table = triton_gemm.row_groups(torch.tensor(loads), sum(loads) + 7, 16)
    assert offsets.tolist() == torch.tensor(loads).cumsum(0).tolist()
    expected = []
    for expert, (end, load) in enumerate(zip(offsets.tolist(), loads, strict=True)):
        expected += [[expert, first, end] for first in range(end - load, end, 16)]
    assert table[0] == len(expected)
    assert table[1 : 1 + 3 * len(expected)].view(-1, 3).tolist() == expected


def test_counts_may_be_a_column(monkeypatch):
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.is_ours", lambda device: True)
    column = torch.tensor([[3, 9], [4, 9], [2, 9]])[:, 0]
    assert row_groups(column, 9).offsets_L.tolist() == [3, 7, 9]


class OnHopper:
    """An operand on a GPU that is not there."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    def __init__(self, like: torch.Tensor, place: int = 1024):
        self.dim, self.shape = like.dim, like.shape
        self.stride, self.is_contiguous = like.stride, like.is_contiguous
        self.element_size, self.data_ptr = lambda: 2, lambda: place


def test_ours_takes_dense_rows_that_begin_at_multiples_of_16_bytes(monkeypatch):
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.is_hopper", lambda index: True)
    rows, weight = torch.zeros(5, 24), torch.zeros(3, 8, 24)
    good: Any = OnHopper(rows)
    with_gaps: Any = OnHopper(torch.zeros(5, 64)[:, :24])
    one: Any = OnHopper(torch.zeros(24, 1).t())
    assert gemm_of(one, one) is triton_gemm, "of one row no stride counts"
    assert gemm_of(good, OnHopper(weight)) is gemm_of(with_gaps, good) is triton_gemm  # type: ignore[arg-type]
    turned, gaps, odd = rows.t(), torch.zeros(3, 8, 64)[:, :, :24], torch.zeros(5, 28)[:, :24]
    for bad in (OnHopper(turned), OnHopper(gaps), OnHopper(odd), OnHopper(rows, place=1032)):
        assert gemm_of(good, bad) is torch_gemm  # type: ignore[arg-type]
    wide: Any = OnHopper(rows)
    wide.dtype = torch.float32
    assert gemm_of(wide, good) is torch_gemm
    monkeypatch.setattr("moe_train.kernels.grouped_gemm.is_hopper", lambda index: False)
    assert gemm_of(good, good) is torch_gemm


def test_scales_of_both_operands(loops):
    (rows,), offsets = draw([5, 0, 30], 32)
    weight, scales = torch.randn(3, 40, 32), (torch.rand(35), torch.rand(3, 40))
    found = triton_gemm.rows_by_weights(rows, weight, tiles_of(rows, offsets), False, scales, TILE)
    assert found.dtype == torch.bfloat16
    for number, part in enumerate(slices(offsets)):
        expected = (rows[part] * scales[0][part, None]).double() @ (
            weight[number] * scales[1][number, :, None]
        ).double().t()
        # 8 bits, the rest of which the interpreter cuts off where a GPU rounds
        assert (found[part].double() - expected).norm() <= 2**-7 * expected.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_torchs_own(dtype):
    (rows, right), offsets = draw([3, 0, 6], 16, 8)
    rows, right = rows.to(dtype), right.to(dtype)
    weight = torch.randn(3, 8, 16).to(dtype)
    assert gemm_of(rows).__name__.endswith("reference.grouped_gemm")
    groups = row_groups(torch.tensor([3, 0, 6]), len(rows))
    assert groups.offsets_L.tolist() == offsets.tolist()
    found, gradient = rows_by_weights(rows, weight, groups), weight_gradient(rows, right, offsets)
    turned = rows_by_weights(rows, weight.transpose(1, 2), groups, across=True)
    for number, part in enumerate(slices(offsets)):
        wide = rows[part].double()
        assert_close(found[part], wide @ weight[number].double().t(), dtype=dtype)
        assert_close(turned[part], found[part].double(), dtype=dtype)
        assert_close(gradient[number], wide.t() @ right[part].double(), dtype=dtype)
