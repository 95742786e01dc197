"""Parameters that simply lie in memory: one process, tests, a layer outside of this package's trainer.

The parallel store of a training run is another `ExpertSource`; this one keeps no optimizer state and shards nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_train.moe.experts import ExpertWeights
from moe_train.moe.placement import ReplicaRoutes, SlotPlan, replica_routes
from moe_train.parallel import ParallelGroup, all_to_all_rows, copy_to


class ResidentExperts:
    """One rank's home slice of the experts; redundant slots are filled from their homes in every forward.

    Args:
        gate_up_LIH, down_LHI: the experts at home here (see `ExpertWeights`), as leaves of the graph.
        plan, group: which experts the other slots hold, and where those live. None: home slots alone.

    The adjoint of filling a slot takes its gradient home, so copies are tied without a further step. Collective over
    the group if the plan has redundant experts.
    """

    def __init__(
        self,
        gate_up_LIH: torch.Tensor,
        down_LHI: torch.Tensor,
        plan: SlotPlan | None = None,
        group: ParallelGroup | None = None,
    ):
        self.home = (gate_up_LIH, down_LHI)
        self.plan, self.group = plan, group

    @contextmanager
    def fetch(self) -> Iterator[ExpertWeights]:
        yield ExpertWeights(*map(self._slots, self.home))

    def _slots(self, home: torch.Tensor) -> torch.Tensor:
        if self.plan is None or self.group is None or not self.plan.num_redundant:
            return home
        routes = replica_routes(self.plan, self.group.rank_in_group)
        sent = home[torch.tensor(routes.send, dtype=torch.int64, device=home.device)]
        return torch.cat([fetch_copies(sent, routes, self.group), home])


def fetch_copies(sent: torch.Tensor, routes: ReplicaRoutes, group: ParallelGroup) -> torch.Tensor:
    """What this rank's redundant slots hold, in slot order; its gradient goes home. Collective.

    Args:
        sent: [len(routes.send), ...], of the experts at home here those that other ranks hold copies of.
    """
    received = all_to_all_rows(sent.flatten(1), group, routes.recv_counts, routes.send_counts)
    place = torch.tensor(routes.place, dtype=torch.int64, device=sent.device)
    return received[place].view(len(routes.place), *sent.shape[1:])


class ResidentParameters:
    """A module's parameters, replicated over the ranks of a group whose work on them is partial.

    Args:
        parameters: leaves by name. group: gradients are summed over it (the ranks that hold a shared expert).
    """

    def __init__(self, parameters: dict[str, torch.Tensor], group: ParallelGroup | None = None):
        self.parameters, self.group = parameters, group

    @contextmanager
    def fetch(self) -> Iterator[dict[str, torch.Tensor]]:
        group = self.group
        yield {name: copy_to(p, group) if group else p for name, p in self.parameters.items()}
