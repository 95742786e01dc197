"""How experts run on tokens that are routed already: the contract of a backend, and this package's own.

T tokens, H hidden size, E experts, K experts per token, N rows sorted by expert.
"""

import difflib
import inspect
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from moe_train.errors import ConfigError, TopologyError
from moe_train.moe.config import MoEConfig
from moe_train.moe.dispatch import Destinations, by_expert, combine, dispatch, plan_dispatch
from moe_train.moe.experts import BACKENDS, ExpertWeights, resolve_backend
from moe_train.moe.placement import SlotPlan
from moe_train.moe.resident import ResidentParameters
from moe_train.moe.route import check_routing
from moe_train.moe.shared import BorrowedModule, SharedBlock
from moe_train.moe.slots import SlotExperts
from moe_train.moe.wrapper import ExpertLayout, ExpertWrapper
from moe_train.parallel import Groups, ParallelGroup

Checks = Literal["full", "device", "off"]


class FusedMoEBase(nn.Module, ABC):
    """Experts and shared experts of a block. `MoEConfig.fused_moe_cls` names the class, which anyone may write.

    A class of one's own takes these five arguments, hands them on, and computes `forward` with `self.experts`. It
    needs to know of one process only: in the parallel layer it is given the experts of one rank (see `run_rows`).

    Args:
        experts: of the block; None: there are none here.
        shared_experts, shared_experts_gate: of the block, None for none. The gate's sigmoid multiplies their output.
        top_k: experts per token.

    checks: of the inputs. `full` reads the expert ids, which waits for the device; `device` has the device look at
        them by itself, and stop the process if they are wrong; `off` checks nothing, shapes neither.
    keeps_in_graph: every expert takes part in backward, with or without rows.

    Raises `ValueError` for a missing top-k, or one that is no number between 1 and E.
    """

    checks: Checks = "full"
    keeps_in_graph: ClassVar[bool] = False

    def __init__(
        self,
        moe_config: MoEConfig,
        experts: nn.Module | None,
        shared_experts: nn.Module | None,
        shared_experts_gate: nn.Module | None,
        top_k: int | None,
    ):
        super().__init__()
        self.moe_config = moe_config
        self.experts = None if experts is None else ExpertWrapper(experts, moe_config.expert_layout)
        self.shared_experts, self.shared_experts_gate = shared_experts, shared_experts_gate
        self.top_k = _checked_top_k(moe_config, experts, top_k, self.num_experts)

    @property
    def num_experts(self) -> int:
        """E, of all ranks; 0 where there are no routed experts."""
        return 0 if self.experts is None else self.experts.global_num_experts

    @abstractmethod
    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_indices: torch.Tensor,
        topk_weights: torch.Tensor,
        skip_shared_experts: bool = False,
    ) -> torch.Tensor:
        """Every token through its experts, weighted and summed, plus the shared experts.

        Args:
            hidden_states: [T, H] or [..., H]. T may be 0.
            topk_indices, topk_weights: int64 and floating point, [T, K] or with the leading sizes of hidden_states.

        Returns shape and type of `hidden_states`.
        """

    def flatten(
        self, hidden_states: torch.Tensor, topk_indices: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of `forward` as [T, H], [T, K] and [T, K], checked; the weights in float32 at least."""
        if hidden_states.dim() < 2:
            raise ValueError(f"hidden_states must be [..., H], not of shape {list(hidden_states.shape)}")
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        flat = [x_TH.shape[0]]
        if self.checks != "off":
            for what, value in (("topk_indices", topk_indices), ("topk_weights", topk_weights)):
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"{what} must be a tensor, not {type(value).__name__}")
                if list(value.shape[:-1]) not in (flat, list(hidden_states.shape[:-1])):
                    raise ValueError(
                        f"{what} of shape {list(value.shape)} do not fit hidden_states {list(hidden_states.shape)}: "
                        f"one row per token, so {[*flat, self.top_k]} or {[*hidden_states.shape[:-1], self.top_k]}"
                    )
        ids_TK = topk_indices.reshape(-1, topk_indices.shape[-1])
        weights_TK = topk_weights.reshape(-1, topk_weights.shape[-1])
        if self.checks != "off":
            T, E = x_TH.shape[0], self.num_experts
            check_routing(ids_TK, weights_TK, T, self.top_k, E, check_range=self.checks == "full")
            if self.checks == "device":
                legal = ((ids_TK >= 0) & (ids_TK < E)).all()
                torch._assert_async(legal, f"expert ids outside 0..{E - 1}")  # type: ignore[attr-defined]
        return x_TH, ids_TK, weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))

    def run_shared_experts(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared_experts is None:
            raise RuntimeError(f"{type(self).__name__} has no shared experts to run on this rank")
        y = self.shared_experts(x)
        return y if self.shared_experts_gate is None else self.shared_experts_gate(x).sigmoid() * y

    def run_rows(self, rows_NH: torch.Tensor, rows_per_expert: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert [N, H], so many for each -> their outputs. What the parallel layer calls on a rank.

        By way of `forward`: one expert per row, with weight 1. Override it to make use of the order.
        """
        experts = torch.arange(rows_per_expert.numel(), device=rows_NH.device)
        ids_N1 = torch.repeat_interleave(experts, rows_per_expert, output_size=rows_NH.shape[0]).unsqueeze(1)
        ones_N1 = torch.ones_like(ids_N1, dtype=torch.promote_types(rows_NH.dtype, torch.float32))
        return self(rows_NH, ids_N1, ones_N1, skip_shared_experts=True)


class FusedMoE(FusedMoEBase):
    """Dispatch, experts, combine in float32, and the shared experts: in one process, or over an expert group.

    Over a group every rank gives the whole block, keeps its own slots and drops the rest; tokens must be on one rank
    of the group each. Ranks below `plan.shared_ranks` keep the shared experts and nothing else, the others all but
    them. The gradient of an expert is the sum over the group's tokens, wherever copies of it lie; that of shared
    experts on ranks of their own is the sum over all of these.

    Args:
        groups: of the topology; None: one process.
        plan: which rank holds what; None: contiguous.

    backend: of `experts.BACKENDS` or `auto`, for experts that can be stacked; others run one by one.
    """

    backend: ClassVar[str] = "auto"
    keeps_in_graph: ClassVar[bool] = True

    def __init__(
        self,
        moe_config: MoEConfig,
        experts: nn.Module | None,
        shared_experts: nn.Module | None,
        shared_experts_gate: nn.Module | None,
        top_k: int | None,
        *,
        groups: Groups | None = None,
        plan: SlotPlan | None = None,
    ):
        super().__init__(moe_config, experts, shared_experts, shared_experts_gate, top_k)
        if self.experts is None:
            raise ValueError(
                "experts is None: every rank is given the block's experts, also one that keeps the shared experts only"
            )
        if self.backend == "grouped" and not is_stackable(self.experts.layout):
            raise ConfigError(
                f"fused_moe_cls (grouped) needs experts that can be stacked, and {type(experts).__name__} is stored as "
                f"{self.experts.layout.code}: leave fused_moe_cls out"
            )
        self.group = ParallelGroup.single() if groups is None else groups.expert
        self.plan = SlotPlan(self.num_experts, self.group.world_size) if plan is None else plan
        check_plan(self.plan, self.num_experts, self.group.world_size)
        self._destinations: Destinations | None = None
        self._slots: SlotExperts | None = None
        self._external: BorrowedModule | None = None
        if self.group.world_size > 1:
            assert groups is not None
            if groups.expert_tensor.world_size > 1:
                raise TopologyError(
                    f"parallel.expert_tensor ({groups.expert_tensor.world_size}) cuts experts, which FusedMoE does "
                    "not: use parallelize, or set it to 1"
                )
            build = partial(type(self), moe_config, shared_experts=None, shared_experts_gate=None, top_k=1)
            self._slots = SlotExperts(self.experts, self.plan, self.group, build)
            if self.plan.shared_ranks:
                self._external = self._take_role(groups)

    def _take_role(self, groups: Groups) -> BorrowedModule | None:
        """Shared experts are kept on their own ranks alone. Collective."""
        if self.shared_experts is None:
            raise TopologyError(
                f"parallel.shared_expert_ranks ({self.plan.shared_ranks}) are for shared experts, and this block has "
                "none: plan without them"
            )
        holders = groups.shared_holders(self.plan.shared_ranks)
        if holders is None:
            self.shared_experts = self.shared_experts_gate = None
            return None
        parts = {"shared_experts": self.shared_experts, "shared_experts_gate": self.shared_experts_gate}
        return borrowed_shared({name: part for name, part in parts.items() if part is not None}, holders)

    @property
    def num_local_experts(self) -> int:
        """Slots of this rank, copies included; 0 on a rank that keeps shared experts."""
        return len(self.plan.slots(self.group.rank_in_group))

    @property
    def expert_idx_start(self) -> int:
        """The first expert that is at home here; 0 where none is."""
        return self.plan.home(self.group.rank_in_group)[0]

    def forward(self, hidden_states, topk_indices, topk_weights, skip_shared_experts=False):
        x_TH, ids_TK, weights_TK = self.flatten(hidden_states, topk_indices, topk_weights)
        if skip_shared_experts and self.plan.shared_ranks:
            raise ValueError("shared experts on ranks of their own get rows with the routed ones: do not skip them")
        plan = plan_dispatch(ids_TK, self._destinations_on(x_TH.device), self.group)
        x_NH, weights_NC = dispatch(x_TH, weights_TK, plan, self.group)
        if self._external is not None:
            x_NH = self._external(x_NH)
        run = self.run_rows if self._slots is None else self._slots.run
        y_TH = combine(by_expert(x_NH, weights_NC, plan, run), plan, self.group)
        if self.shared_experts is not None and not skip_shared_experts and not self.plan.shared_ranks:
            y_TH = y_TH + self.run_shared_experts(x_TH)
        return y_TH.view(hidden_states.shape).to(hidden_states.dtype)

    def run_rows(self, rows_NH, rows_per_expert):
        experts = self.experts
        assert experts is not None
        if not is_stackable(experts.layout):
            return torch.cat(experts.call_experts(rows_NH.split(rows_per_expert.tolist())))
        weights = ExpertWeights(*experts.stacked())
        hidden, inner = weights.down_LHI.shape[1:]
        backend = resolve_backend(self.backend, rows_NH.device, rows_NH.dtype, hidden, inner)
        return BACKENDS[backend](rows_NH, rows_per_expert, weights, experts.experts.act_fn)

    def _destinations_on(self, device: torch.device) -> Destinations:
        found = self._destinations
        if found is None or found.rank_D.device != device:
            found = self._destinations = Destinations(self.plan, self.group.rank_in_group, device)
        return found


class LoopFusedMoE(FusedMoE):
    """One expert after another: the reference."""

    backend = "loop"


class GroupedFusedMoE(FusedMoE):
    """torch's grouped GEMM; bf16 and fp32."""

    backend = "grouped"


FUSED_MOE: dict[str, type[FusedMoEBase]] = {"auto": FusedMoE, "loop": LoopFusedMoE, "grouped": GroupedFusedMoE}
"""By name, as `MoEConfig.fused_moe_cls` may be given."""


def fused_moe_class(moe_config: MoEConfig) -> type[FusedMoEBase]:
    """The configured class. Raises `ConfigError` for an unknown name, `TypeError` for a class that is no backend."""
    given = moe_config.fused_moe_cls
    if given is None:
        return FusedMoE
    if isinstance(given, str):
        if given not in FUSED_MOE:
            near = difflib.get_close_matches(given, FUSED_MOE, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"MoEConfig.fused_moe_cls ({given}) is none of {', '.join(FUSED_MOE)}{hint}")
        return FUSED_MOE[given]
    start = f"MoEConfig.fused_moe_cls ({given.__name__})"
    if not issubclass(given, FusedMoEBase):
        raise TypeError(f"{start} is no FusedMoEBase: derive it from that class")
    if inspect.isabstract(given):
        raise TypeError(f"{start} does not define {', '.join(sorted(given.__abstractmethods__))}")
    names = list(inspect.signature(FusedMoEBase).parameters)
    wanted = f"{start} must be constructed with ({', '.join(names)}), in this order"
    try:
        taken = inspect.signature(given).bind(*names).arguments
    except TypeError as error:
        raise TypeError(f"{wanted}, and {error}") from None
    for name, value in taken.items():
        if isinstance(value, str) and name != value:  # a tuple is what a class hands on as it is
            raise TypeError(f"{wanted}, and has {name} in the place of {value}")
    return given


def is_stackable(layout: ExpertLayout) -> bool:
    """Whether the backends for stacked weights compute these experts: two projections and a plain gate."""
    return layout.code in ("L0", "L1") and not layout.own_gate


def borrowed_shared(parts: dict[str, nn.Module], group: ParallelGroup | None = None) -> BorrowedModule:
    """Shared experts by the block's attribute names. Gradients are summed over the group, each with rows of its own."""
    block = SharedBlock(parts)
    return BorrowedModule(block, _ParametersOf(block, group))


class _ParametersOf:
    """A `ParameterSource`: what a module's parameters are when it is asked, as it may be moved or converted before."""

    def __init__(self, module: nn.Module, group: ParallelGroup | None = None):
        self.module, self.group = module, group

    def fetch(self) -> AbstractContextManager[dict[str, torch.Tensor]]:
        return ResidentParameters(dict(self.module.named_parameters()), self.group).fetch()


def check_plan(plan: SlotPlan, num_experts: int, world_size: int) -> None:
    """Raise `TopologyError` if a plan is not of these sizes."""
    if plan.num_experts != num_experts or plan.world_size != world_size:
        raise TopologyError(
            f"the plan is for {plan.num_experts} experts on parallel.expert ({plan.world_size}), and the block has "
            f"{num_experts} on {world_size} ranks: plan again for these"
        )


def _checked_top_k(moe_config: MoEConfig, experts: Any, top_k: Any, num_experts: int) -> int:
    names = moe_config.field_names
    if top_k is None:
        raise ValueError(
            f"Missing required parameter 'top_k': no `{names.top_k}` was found on {moe_config.module_name} (with "
            f"{type(experts).__name__}) or its gate: set MoEFieldNames.top_k to the attribute that holds the number "
            "of experts per token"
        )
    most = f"{num_experts}, the number of experts" if experts is not None else "the number of experts"
    if type(top_k) is not int or top_k < 1 or (experts is not None and top_k > num_experts):
        raise ValueError(
            f"top_k ({top_k!r}) must be an integer between 1 and {most}: set `{names.top_k}` of the block or its gate"
        )
    return top_k
