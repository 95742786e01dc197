"""The part of a tensor that a rank of tensor parallelism holds, element by element."""

import pytest
import torch

from moe_train.parallel.tensor_slice import TensorSlice


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_rows_columns_and_fused_rows():
    full = numbered(6, 4)
    assert torch.equal(TensorSlice.rows((6, 4), 1, 3).take(full), full[1:3])
    assert torch.equal(TensorSlice.columns((6, 4), 1, 3).take(full), full[:, 1:3])
    gate, up = full[:3], full[3:]
    assert torch.equal(TensorSlice.fused((6, 4), 1, 3).take(full), torch.cat([gate[1:3], up[1:3]]))
    thirds = torch.cat([full[0:1], full[2:3], full[4:5]])
    assert torch.equal(TensorSlice.fused((6, 4), 0, 1, blocks=3).take(full), thirds)
    bias = numbered(6)
    assert torch.equal(TensorSlice.rows((6,), 2, 6).take(bias), bias[2:])
    assert torch.equal(TensorSlice.fused((6,), 1, 2).take(bias), bias[[1, 4]])


@pytest.mark.parametrize(("make", "size"), [(TensorSlice.rows, 8), (TensorSlice.columns, 4), (TensorSlice.fused, 4)])
def test_parts_put_back_give_the_whole(make, size):
    full = torch.randn(8, 4)
    again = torch.full_like(full, float("nan"))
    for start, stop in ((0, 1), (1, 1), (1, 3), (3, size)):
        part = make((8, 4), start, stop)
        local = part.take(full)
        assert local.shape == part.local_shape((8, 4))
        assert local.numel() == part.numel
        part.put(again, local.view(-1))
    assert torch.equal(again, full)


def test_a_part_does_not_keep_the_whole_alive():
    full = torch.randn(6, 4)
    for part in (TensorSlice.rows((6, 4), 0, 2), TensorSlice.columns((6, 4), 0, 2), TensorSlice.rows((6, 4), 0, 6)):
        local = part.take(full)
        assert local.is_contiguous()
        assert local.untyped_storage().nbytes() == part.numel * 4
        assert local.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()


def test_whole_and_overlap():
    assert TensorSlice.fused((6, 4), 0, 3).whole
    assert not TensorSlice.fused((6, 4), 0, 2).whole
    low, high, across = (TensorSlice.columns((6, 4), *ends) for ends in ((0, 2), (2, 4), (1, 3)))
    assert not low.overlaps(high)
    assert low.overlaps(across)
    assert across.overlaps(high)
    assert not low.overlaps(TensorSlice.columns((6, 4), 1, 1)), "an empty part shares nothing"


@pytest.mark.parametrize(
    ("view", "box", "complaint"),
    [
        ((4, 4), ((0, 5), (0, 4)), "outside"),
        ((4, 4), ((0, 4), (-1, 4)), "outside"),
        ((4, 4), ((3, 2), (0, 4)), "outside"),
        ((4, 4), ((0, 4),), "each dimension"),
        ((), (), "each dimension"),
        ((4, 4), ((0, 4), (0, 4, 4)), "each dimension"),
        ((4, 4), ((0, 4), (0.0, 4)), "integers"),
        ((4, True), ((0, 4), (0, 1)), "integers"),
    ],
)
def test_boxes_that_are_none(view, box, complaint):
    with pytest.raises(ValueError, match=complaint):
        TensorSlice(view, box)


@pytest.mark.parametrize("shape", [(2, 12), (3, 8), (23,), (), (4, 2, 3), (2, 4, 3, 1)])
def test_tensors_of_another_shape(shape):
    """Only the first dimension of a tensor is ever split up."""
    part = TensorSlice.fused((8, 3), 1, 2)
    assert part.fits((8, 3))
    assert not part.fits(shape)
    for use in (part.take, lambda full: part.put(full, torch.zeros(part.numel))):
        with pytest.raises(ValueError, match="cannot be seen as"):
            use(torch.zeros(shape))


def test_rows_that_are_no_blocks():
    with pytest.raises(ValueError, match="7 rows are no 2 blocks"):
        TensorSlice.fused((7, 3), 0, 1)
