"""What a launch needs of the host, in place of Triton's own functions, which check and wrap.

That was a fifth of the host's time in a profile of the experts' operators, and a model of thin layers waits for the
host.
"""

from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

BILLION = 0x40000000
"""Rows of a ragged descriptor; they are counted from the end of what may be touched."""


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The smallest one that is not below."""
    return 1 << (size - 1).bit_length()


def dense_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Its rows without gaps in them; between them there may be some."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Of a tensor that begins at a multiple of 16 bytes, as do its rows, and whose last dimension is dense."""
    return _descriptor(tensor, tensor.shape, tensor.stride(), block)


def ragged_descriptor(tensor: torch.Tensor, block: list[int], *, whole: bool = False) -> TensorDescriptor:
    """`triton.tools.ragged_tma.create_ragged_descriptor` of such a matrix: blocks of rows that end where they shall.

    whole: with what is between the rows.
    """
    (_, columns), (row, column) = tensor.shape, tensor.stride()
    columns = row if whole else columns
    shape = [0x7FFF0000, 0x7FFF0000, BILLION, columns]
    return _descriptor(tensor, shape, [2**34 - row, row, row, column], [1, 1, *block])


def _descriptor(
    tensor: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]
) -> TensorDescriptor:
    assert strides[-2] * tensor.element_size() % 16 == 0, f"rows of {strides[-2]} elements of {tensor.dtype}"
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.padding = tensor, shape, strides, block, "zero"
    return made
