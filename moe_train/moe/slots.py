"""A rank's slots of a block whose experts are parameters of a module: the home slice, and copies fetched from homes.

N rows sorted by slot, L slots (may be 0), H hidden size.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import nn
from torch.func import functional_call

from moe_train.errors import ConfigError
from moe_train.moe.experts import ExpertWeights, keep_in_graph
from moe_train.moe.placement import SlotPlan, replica_routes
from moe_train.moe.resident import fetch_copies
from moe_train.moe.wrapper import ExpertWrapper
from moe_train.parallel import ParallelGroup


class RowsBackend(Protocol):
    """Computes experts on rows that are sorted by expert; a `FusedMoEBase`.

    keeps_in_graph: every expert takes part in backward, with or without rows.
    """

    keeps_in_graph: ClassVar[bool]

    def run_rows(self, rows_NH: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor: ...


class SlotExperts:
    """The home slice stays the module's own parameters; redundant slots are filled from their homes in every forward.

    The adjoint of filling a slot takes its gradient home, so copies are tied without a further step. `run` and `fetch`
    are collective over the group if the plan has redundant experts.

    Args:
        experts: all experts of the block. They are cut to the home slice here, once.
        build: module of L experts -> its backend. With copies the module has no memory: the slots take its place.
    """

    def __init__(
        self,
        experts: ExpertWrapper,
        plan: SlotPlan,
        group: ParallelGroup,
        build: Callable[[nn.Module], RowsBackend],
    ):
        self.experts, self.group, self.plan = experts, group, plan
        slots = len(plan.slots(group.rank_in_group))
        self._one = _one_expert(experts) if plan.num_redundant and experts.layout.code == "list" else None
        shell = _shell(experts, self._one, slots) if plan.num_redundant and slots else None
        if plan.world_size > 1:
            experts.slice_experts(*plan.home(group.rank_in_group))
        module = experts.experts if shell is None else shell
        self.backend = build(module) if slots else None
        self._filled = None if shell is None or self.backend is None else _Filled(self.backend, shell)
        self.set_plan(plan)

    def set_plan(self, plan: SlotPlan) -> None:
        """Other copies in the redundant slots from the next forward on; the same counts as before."""
        rank = self.group.rank_in_group
        if plan.homes != self.plan.homes or len(plan.slots(rank)) != len(self.plan.slots(rank)):
            raise ConfigError("a new plan must have the numbers of the old one: build the layer anew for others")
        self.plan = plan
        self.routes = replica_routes(plan, rank) if plan.num_redundant else None

    @contextmanager
    def fetch(self) -> Iterator[ExpertWeights]:
        """All slots as stacked weights; an `ExpertSource`, for layouts that can be stacked."""
        yield ExpertWeights(*(self._slots_of(weight) for weight in self.experts.stacked()))

    def run(self, rows_NH: torch.Tensor, rows_per_slot: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, H]; on a rank without slots the rows as they are."""
        if self.routes is None:
            weights, tied = {}, list(self.experts.experts.parameters())
        else:
            weights, tied = self._slots(rows_NH.device)
        if self._filled is not None:
            y_NH = self._filled.run(weights, rows_NH, rows_per_slot)
        elif self.backend is not None:
            y_NH = self.backend.run_rows(rows_NH, rows_per_slot)
        else:
            y_NH = rows_NH
        if self._one is None and self.backend is not None and self.backend.keeps_in_graph:
            return y_NH
        trained = [weight for weight in tied if weight.requires_grad]
        return keep_in_graph(y_NH, *trained) if trained else y_NH

    def _slots(self, device: torch.device) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Weights of all slots by the parameter's name in a module of L experts, and what must see a gradient."""
        assert self.routes is not None
        if self._one is None:
            names = self.experts.layout.parameters
            weights = {name: self._slots_of(getattr(self.experts.experts, name)) for name in names}
            return weights, list(weights.values())
        home: list[nn.Module] = list(self.experts.experts)  # type: ignore[call-overload]
        weights, tied = {}, []
        for name, like in self._one.items():
            mine = [expert.get_parameter(name) for expert in home]
            if self.routes.send:
                sent = torch.stack([mine[place] for place in self.routes.send])
            else:
                sent = torch.empty((0, *like.shape), dtype=like.dtype, device=device, requires_grad=like.requires_grad)
            copies = fetch_copies(sent, self.routes, self.group)
            weights |= {f"{slot}.{name}": weight for slot, weight in enumerate([*copies.unbind(), *mine])}
            tied += [copies, *mine]
        return weights, tied

    def _slots_of(self, home: torch.Tensor) -> torch.Tensor:
        if self.routes is None:
            return home
        sent = home[torch.tensor(self.routes.send, dtype=torch.int64, device=home.device)]
        return torch.cat([fetch_copies(sent, self.routes, self.group), home])


class _Filled(nn.Module):
    """A backend over a module without memory, called with the weights that belong there."""

    def __init__(self, backend: RowsBackend, shell: nn.Module):
        super().__init__()
        self.backend = backend
        found = [name for name, module in self.named_modules() if module is shell]
        if not found:
            raise TypeError(
                f"{type(backend).__name__} keeps no reference to the experts it is given, so redundant ones cannot "
                "reach it: let FusedMoEBase.__init__ keep them and call them through self.experts"
            )
        self._prefix = f"{found[0]}."

    def run(self, weights: dict[str, torch.Tensor], rows_NH: torch.Tensor, rows_per_slot: torch.Tensor) -> torch.Tensor:
        named = {f"{self._prefix}{name}": weight for name, weight in weights.items()}
        return functional_call(self, named, (rows_NH, rows_per_slot))

    def forward(self, rows_NH: torch.Tensor, rows_per_slot: torch.Tensor) -> torch.Tensor:
        return self.backend.run_rows(rows_NH, rows_per_slot)


def _one_expert(experts: ExpertWrapper) -> dict[str, torch.Tensor]:
    """Parameters of one expert of a list without memory, by name. They are exchanged, so all experts must be alike."""
    shapes = [{name: (p.shape, p.dtype) for name, p in expert.named_parameters()} for expert in experts.experts]  # type: ignore[union-attr]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError("redundant experts must be alike, and their parameters differ in name, shape or type")
    if next(experts.experts.buffers(), None) is not None:
        raise ConfigError("redundant experts need experts without buffers: only parameters reach their copies")
    one: nn.Module = experts.experts[0]  # type: ignore[index]
    return {name: p.detach().to("meta").requires_grad_(p.requires_grad) for name, p in one.named_parameters()}


def _shell(experts: ExpertWrapper, one: dict[str, torch.Tensor] | None, slots: int) -> nn.Module:
    """The experts' module for another number of experts, without memory for their parameters."""
    module = experts.experts
    if one is not None:
        expert = copy.deepcopy(module[0]).to("meta")  # type: ignore[index]
        return nn.ModuleList(copy.deepcopy(expert) for _ in range(slots))
    shell = copy.copy(module)
    shell._parameters = {}
    for name in experts.layout.parameters:
        old: nn.Parameter = getattr(module, name)
        empty = torch.empty((slots, *old.shape[1:]), dtype=old.dtype, device="meta")
        shell.register_parameter(name, nn.Parameter(empty, requires_grad=old.requires_grad))
    shell.num_experts = slots  # type: ignore[assignment]
    return shell
