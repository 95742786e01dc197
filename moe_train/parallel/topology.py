"""Sizes -> groups of ranks. Pure arithmetic: no process group, no torch.

Two grids over the same ranks. The dense part: [data, tensor], tensor parallelism fastest. The experts:
[expert_data, expert, expert_tensor], expert tensor parallelism fastest, so that an EP group lies on one node where it
fits. With t = tensor and m = expert_tensor: the t ranks of a tensor group hold the same tokens, the m ranks of an
expert-tensor group must work on the same tokens.

t > m: the tokens of a tensor group are shared out over t / m ranks (`token_slice_groups`).
t < m: the tokens of m / t ranks are brought together (`token_gather_groups`).

World 8, EP 4: EP groups [0..3], [4..7]; expert-data groups [0,4], [1,5], [2,6], [3,7].
World 8, EP 2, expert_tensor 2: EP groups [0,2], [1,3], [4,6], [5,7]; expert-tensor groups [0,1], [2,3], [4,5], [6,7].
"""

from dataclasses import dataclass
from typing import Literal

from moe_train.errors import TopologyError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Group sizes of a run. `tensor` divides the world, so does `expert` x `expert_tensor`.

    Raises `TopologyError` for sizes that make no grid.
    """

    world: int
    expert: int
    tensor: int = 1
    expert_tensor: int = 1

    def __post_init__(self):
        self._check_sizes()
        small, large = sorted((self.tensor, self.expert_tensor))
        if large % small:
            raise TopologyError(
                f"parallel.tensor ({self.tensor}) and parallel.expert_tensor ({self.expert_tensor}): one must divide "
                "the other, or the ranks of an expert-tensor group could not hold the same tokens"
            )

    def _check_sizes(self) -> None:
        if self.tensor < 1 or self.world % self.tensor:
            raise TopologyError(
                f"parallel.tensor ({self.tensor}) must divide the number of ranks ({self.world}): use one of "
                f"{divisors(self.world)} or start another number of ranks"
            )
        if self.expert_tensor < 1 or self.world % self.expert_tensor:
            raise TopologyError(
                f"parallel.expert_tensor ({self.expert_tensor}) must divide the number of ranks ({self.world}): use "
                f"one of {divisors(self.world)} or start another number of ranks"
            )
        if self.expert < 1 or self.world // self.expert_tensor % self.expert:
            rest = f" / parallel.expert_tensor ({self.expert_tensor})" if self.expert_tensor > 1 else ""
            raise TopologyError(
                f"parallel.expert ({self.expert}) must divide the number of ranks ({self.world}){rest}: "
                f"use one of {divisors(self.world // self.expert_tensor)} or start another number of ranks"
            )

    @property
    def expert_data(self) -> int:
        """How many ranks hold the same slice of experts."""
        return self.world // (self.expert * self.expert_tensor)

    @property
    def data(self) -> int:
        """How many ranks read different sequences."""
        return self.world // self.tensor

    @property
    def token_slice(self) -> int:
        """Over how many ranks the tokens of a tensor group are shared out."""
        return max(self.tensor // self.expert_tensor, 1)

    @property
    def token_gather(self) -> int:
        """Of how many ranks an expert-tensor group brings the tokens together."""
        return max(self.expert_tensor // self.tensor, 1)

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share every dense layer, and hold the same tokens."""
        return self._blocks(self.tensor)

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same slice of the dense part."""
        return [list(range(slot, self.world, self.tensor)) for slot in range(self.tensor)]

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts, one list per copy of the experts and slice of their width."""
        return self._strided(self.expert, self.expert_tensor)

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts, one list per slice."""
        held = self.expert * self.expert_tensor
        return [list(range(slot, self.world, held)) for slot in range(held)]

    def expert_tensor_groups(self) -> list[list[int]]:
        """Ranks that share every expert."""
        return self._blocks(self.expert_tensor)

    def token_slice_groups(self) -> list[list[int]]:
        """Ranks that share out the tokens of a tensor group."""
        return self._strided(self.token_slice, self.expert_tensor)

    def token_gather_groups(self) -> list[list[int]]:
        """Ranks of an expert-tensor group that hold different tokens."""
        return self._strided(self.token_gather, self.tensor)

    def _blocks(self, size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, self.world, size)]

    def _strided(self, size: int, stride: int) -> list[list[int]]:
        """Lists of `size` ranks, `stride` apart, in blocks of size x stride neighbours."""
        if size == 1:
            return [[rank] for rank in range(self.world)]
        starts = [base + slot for base in range(0, self.world, size * stride) for slot in range(stride)]
        return [list(range(start, start + size * stride, stride)) for start in starts]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def resolve_topology(
    expert: int | Literal["auto"],
    world: int,
    num_experts: int,
    ranks_per_node: int,
    tensor: int = 1,
    expert_tensor: int = 1,
) -> Topology:
    """Fill in `auto`: the largest divisor of the world that fits on one node and gives every rank an expert.

    An explicit size may exceed the number of experts: the ranks left over hold none, and still train.
    """
    if expert != "auto":
        if expert > world:
            raise TopologyError(
                f"parallel.expert ({expert}) exceeds the number of ranks ({world}): lower it or start more"
            )
        return Topology(world=world, expert=expert, tensor=tensor, expert_tensor=expert_tensor)
    Topology(world=world, expert=1, tensor=tensor, expert_tensor=expert_tensor)  # refuses the other two
    limit = min(num_experts, max(ranks_per_node // expert_tensor, 1))
    largest = max(d for d in divisors(world // expert_tensor) if d <= limit)
    return Topology(world=world, expert=largest, tensor=tensor, expert_tensor=expert_tensor)
