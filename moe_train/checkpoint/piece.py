"""One slice of a logical tensor in memory: what a save writes and a load fills."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moe_train.parallel.tensor_slice import TensorSlice

SLICE_BYTES = 1 << 10
"""About what one piece takes in its file's header and in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One slice to write or read: 1-D `data` are the elements from `start` on of the flattened logical tensor.

    part: where tensor parallelism has cut the tensor, the piece of it whose flattened elements are counted instead;
    `shape` is that of the whole tensor all the same.
    """

    name: str
    expert: int | None
    kind: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor
    part: TensorSlice | None = None

    @property
    def stop(self) -> int:
        return self.start + self.data.numel()

    @property
    def tensor(self) -> tuple[str, str, int | None]:
        return (self.kind, self.name, self.expert)

    @property
    def dtype(self) -> str:
        """In torch's words."""
        return str(self.data.dtype).removeprefix("torch.")


def size_of(pieces: Iterable[Piece]) -> int:
    """About the bytes that they take on the disk."""
    return sum(piece.data.nbytes + SLICE_BYTES for piece in pieces)
