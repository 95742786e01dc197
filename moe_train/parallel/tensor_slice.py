"""Which part of a logical tensor a rank of tensor parallelism holds. Arithmetic on shapes: no group, no collective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_train.errors import TopologyError


@dataclass(frozen=True)
class TensorSlice:
    """A box of a logical tensor, seen under a shape of its own.

    view_shape: the logical shape with its first dimension split up, or the logical shape itself.
    box: (start, stop) in each dimension of the view; start == stop is an empty part.

    A fused gate_up [2I, H] is seen as [2, I, H]: rows a to b of gate and of up are the box ((0, 2), (a, b), (0, H)).
    The local tensor is the box with the split dimensions joined again, here [2 * (b - a), H].

    Raises `ValueError` for a box that lies outside its view.
    """

    view_shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]

    def __post_init__(self):
        view, box = tuple(self.view_shape), tuple(tuple(pair) for pair in self.box)
        if not view or len(box) != len(view) or any(len(pair) != 2 for pair in box):
            raise ValueError(f"box {box} has not one (start, stop) for each dimension of the view {view}")
        if any(type(number) is not int for number in (*view, *(end for pair in box for end in pair))):
            raise ValueError(f"view {view} and box {box} must be made of integers")
        if any(not 0 <= start <= stop <= size for (start, stop), size in zip(box, view, strict=True)):
            raise ValueError(f"box {box} lies outside its view {view}")
        object.__setattr__(self, "view_shape", view)
        object.__setattr__(self, "box", box)

    @classmethod
    def rows(cls, shape: Sequence[int], start: int, stop: int) -> "TensorSlice":
        """Rows `start` to `stop` of a tensor [N, ...]."""
        return cls(tuple(shape), ((start, stop), *((0, size) for size in shape[1:])))

    @classmethod
    def columns(cls, shape: Sequence[int], start: int, stop: int) -> "TensorSlice":
        """Columns `start` to `stop` of a tensor [..., N]."""
        return cls(tuple(shape), (*((0, size) for size in shape[:-1]), (start, stop)))

    @classmethod
    def fused(cls, shape: Sequence[int], start: int, stop: int, blocks: int = 2) -> "TensorSlice":
        """Rows `start` to `stop` of each of the `blocks` that a tensor [blocks * N, ...] stacks (gate_up: 2)."""
        rows, rest = divmod(shape[0], blocks)
        if rest:
            raise ValueError(f"{shape[0]} rows are no {blocks} blocks")
        view = (blocks, rows, *shape[1:])
        return cls(view, ((0, blocks), (start, stop), *((0, size) for size in shape[1:])))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def whole(self) -> bool:
        """The part is the whole tensor, in the same order of elements."""
        return self.sizes == self.view_shape

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the view is one of a tensor of this shape: its first dimension split up, the others as they are."""
        extra = len(self.view_shape) - len(shape)
        if not shape or extra < 0:
            return False
        return math.prod(self.view_shape[: extra + 1]) == shape[0] and self.view_shape[extra + 1 :] == tuple(shape[1:])

    def overlaps(self, other: "TensorSlice") -> bool:
        """Whether two parts under the same view share elements."""
        pairs = zip(self.box, other.box, strict=True)
        return all(max(mine[0], theirs[0]) < min(mine[1], theirs[1]) for mine, theirs in pairs)

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a logical tensor of this shape. Raises `ValueError` if the view does not fit it."""
        if not self.fits(shape):
            raise ValueError(f"a tensor of shape {list(shape)} cannot be seen as {list(self.view_shape)}")
        split = len(self.view_shape) - len(shape) + 1
        return math.prod(self.sizes[:split]), *self.sizes[split:]

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """The part of a logical tensor: a copy, so that it does not keep the whole alive."""
        local = self.local_shape(full.shape)
        part = full.reshape(self.view_shape)[self._index]
        return part.clone(memory_format=torch.contiguous_format).view(local)

    def put(self, full: torch.Tensor, local: torch.Tensor) -> None:
        """Write the part into its place in a contiguous logical tensor."""
        self.local_shape(full.shape)
        full.view(self.view_shape)[self._index] = local.reshape(self.sizes)

    @property
    def _index(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.box)


def mlp_part(name: str, shape: Sequence[int], rank: int, size: int) -> TensorSlice:
    """What one of `size` ranks has of a gated MLP's matrix: the width is cut, rows of gate and up, columns of down.

    Raises `TopologyError` for a parameter that is no such matrix, and for a width that does not divide.
    """
    matrix = name.rpartition(".")[2] if not name.endswith(".weight") else name.split(".")[-2]
    blocks = {"gate_up_proj": 2, "gate_proj": 1, "up_proj": 1}.get(matrix)
    if blocks is None and matrix != "down_proj":
        raise TopologyError(
            f"tensor parallelism cannot cut {name}, which is no gate_proj, up_proj, gate_up_proj or down_proj: set "
            "parallel.expert_tensor to 1 and parallel.shared_expert_tensor to false"
        )
    width = shape[0] // blocks if blocks else shape[-1]
    if width % size:
        raise TopologyError(
            f"{name}: its width ({width}) is no multiple of the {size} ranks that share it: change the intermediate "
            "size under model.config, parallel.expert_tensor or parallel.shared_expert_tensor"
        )
    start, stop = rank * (width // size), (rank + 1) * (width // size)
    return TensorSlice.columns(shape, start, stop) if blocks is None else TensorSlice.fused(shape, start, stop, blocks)
