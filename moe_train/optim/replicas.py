"""Redundant copies of experts: their weights come from the home rank, their gradients go back to it.

Both happen once per step, outside forward and backward, as one all_to_all of whole experts over the EP group. Every
rank of the group takes part, with no rows if need be.
"""

import torch

from moe_train.moe import SlotPlan, replica_routes
from moe_train.parallel import ParallelGroup, all_to_all_rows


class Replicas:
    """The redundant copies of one expert parameter under a plan.

    Args:
        plan: the same on every rank, and in every EP group that holds the parameter.
        group: the EP group.
    """

    def __init__(self, plan: SlotPlan, group: ParallelGroup):
        if plan.world_size != group.world_size:
            raise ValueError(f"a slot plan for {plan.world_size} ranks does not fit an EP group of {group.world_size}")
        self.plan, self.group = plan, group
        self.routes = replica_routes(plan, group.rank_in_group)
        slots, (_, count) = plan.slots(group.rank_in_group), plan.home(group.rank_in_group)
        self.experts = slots[: len(slots) - count]
        """Logical experts of the redundant slots here."""
        self.asked = self.routes.send
        """Places in the home slice whose weights go out and whose gradients come in, by rank."""

    def moved_to(self, plan: SlotPlan) -> "Replicas":
        """The copies under another plan. Raises `ValueError` if more than the redundant experts differ."""
        for name in ("num_experts", "world_size", "shared_ranks", "num_redundant"):
            old, new = getattr(self.plan, name), getattr(plan, name)
            if new != old:
                raise ValueError(f"{name} ({new}) of the new slot plan is not that of the old one ({old})")
        return Replicas(plan, self.group)

    def to_copies(self, home_LN: torch.Tensor) -> torch.Tensor:
        """Rows of the home slice -> one row per redundant slot here. Collective over the EP group."""
        arrived = all_to_all_rows(
            home_LN[list(self.asked)], self.group, self.routes.recv_counts, self.routes.send_counts
        )
        return arrived[list(self.routes.place)]

    def to_homes(self, copies_RN: torch.Tensor) -> torch.Tensor:
        """One row per redundant slot here -> rows for this rank's home slice, at the places `asked`. The way back.

        Collective over the EP group.
        """
        rows = torch.empty_like(copies_RN)
        rows[list(self.routes.place)] = copies_RN
        return all_to_all_rows(rows, self.group, self.routes.send_counts, self.routes.recv_counts)
