"""Sizes -> groups of ranks. Pure arithmetic: no process group, no torch.

One grid of shape [expert_data, expert]: the EP axis runs fastest, so the ranks of an EP group are
neighbours (one node, where it fits). Tensor parallelism is 1 in this version, so data parallelism
is the whole world: every rank reads its own sequences, whatever the EP size.

World 8, EP 4: EP groups [0..3], [4..7]; expert-data groups [0,4], [1,5], [2,6], [3,7].
"""

from dataclasses import dataclass
from typing import Literal

from moe_train.errors import TopologyError


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Group sizes of a run; the product of `expert` and `expert_data` is the world size."""

    world: int
    expert: int

    def __post_init__(self):
        if self.world < 1 or self.expert < 1 or self.world % self.expert:
            raise TopologyError(
                f"parallel.expert ({self.expert}) must divide the number of ranks ({self.world}): "
                f"use one of {divisors(self.world)} or start another number of ranks"
            )

    @property
    def expert_data(self) -> int:
        """How many ranks hold the same slice of experts."""
        return self.world // self.expert

    @property
    def data(self) -> int:
        """How many ranks read different sequences."""
        return self.world

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts, one list per copy of the experts."""
        return [list(range(start, start + self.expert)) for start in range(0, self.world, self.expert)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts, one list per slice."""
        return [list(range(slot, self.world, self.expert)) for slot in range(self.expert)]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def resolve_topology(expert: int | Literal["auto"], world: int, num_experts: int, ranks_per_node: int) -> Topology:
    """Fill in `auto`: the largest divisor of the world that fits on one node and gives every rank an expert.

    An explicit size may exceed the number of experts: the ranks left over hold none, and still train.
    """
    if expert != "auto":
        if expert > world:
            raise TopologyError(
                f"parallel.expert ({expert}) exceeds the number of ranks ({world}): lower it or start more"
            )
        return Topology(world=world, expert=expert)
    limit = min(num_experts, max(ranks_per_node, 1))
    return Topology(world=world, expert=max(d for d in divisors(world) if d <= limit))
