"""`MoELayer` -> the parallel layer over a topology's groups, with its parameters under the family's own names.

What each gradient has to be summed over, if the loss is a sum over the tokens of all data-parallel ranks:

- router, shared experts kept whole or cut over the tensor group: over `groups.data`;
- routed experts: over `groups.expert_data`. Over the expert group they are summed already, copies included;
- shared experts on ranks of their own: over nothing. They are summed over all their holders already.

If the loss is the mean over data-parallel ranks, divide every one of these sums by `groups.data.world_size`, those of
the experts too. `gradient_groups` says it by parameter name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from moe_train.errors import ConfigError, MoeTrainError, TopologyError
from moe_train.moe.block import MoELayer
from moe_train.moe.config import MoEConfig
from moe_train.moe.context import MoEContext
from moe_train.moe.dispatch import by_expert
from moe_train.moe.experts import Activation, resolve_backend
from moe_train.moe.fused import FusedMoE, FusedMoEBase, borrowed_shared, check_plan, is_stackable
from moe_train.moe.layer import ChildNames, LayerOptions, ParallelMoELayer
from moe_train.moe.placement import SlotPlan, default_counts
from moe_train.moe.planner import plan_slots
from moe_train.moe.shared import BorrowedModule, SplitSharedExperts
from moe_train.moe.slots import SlotExperts
from moe_train.moe.wrapper import ExpertWrapper
from moe_train.parallel import Groups, ParallelGroup, raise_together

Made = TypeVar("Made")


class WrappedMoELayer(ParallelMoELayer):
    """The parallel layer for experts that the stacked backends do not compute: another layout, or a class of one's own.

    returns_weights: the block returns a tuple; this returns (hidden states, None) then.
    """

    returns_weights = False

    def forward(self, *args, **kwargs):
        y = super().forward(*args, **kwargs)
        return (y, None) if self.returns_weights else y

    def run_experts(self, x_NH, weights_NC, plan):
        if self.external_shared is not None:
            x_NH = self.external_shared(x_NH)
        assert isinstance(self.expert_source, SlotExperts)
        return by_expert(x_NH, weights_NC, plan, self.expert_source.run)


def parallelize(
    layer: MoELayer,
    groups: Groups,
    plan: SlotPlan | None = None,
    *,
    context: MoEContext | None = None,
    index: int = 0,
    aux_loss: bool = False,
    z_loss: bool = False,
    ranks_per_node: int | None = None,
) -> ParallelMoELayer:
    """Collective over the world. Every rank gives the whole layer, with the same weights, and keeps its part of it.

    The layer given cannot be used afterwards. Its parameters move over, except the experts, of which the rank's home
    slice is copied, and shared experts that are cut. Do this on the device where the layer is to run, before an
    optimizer or a gradient exists.

    Args:
        plan: which rank of the expert group holds what. None: what the flags of `MoEConfig` ask for, all loads alike.
        context, index: for a model of several layers, which share one; its counts, losses and recompute.
        aux_loss, z_loss: add them to `context.losses`. ranks_per_node: see `LayerOptions`.

    Raises `TopologyError` for sizes that do not fit, `ConfigError` for what the block or its experts rule out; both on
    every rank of the world.
    """
    if not isinstance(layer, MoELayer):
        raise TypeError(f"a {type(layer).__name__} cannot be parallelized: wrap the block in a MoELayer, once")
    if not isinstance(groups, Groups):
        raise ValueError(f"groups ({groups!r}) must be those of a topology: build_groups(Topology(world=1, expert=1))")
    parts = _on_all_ranks(groups, lambda: _Parts.of(layer, groups, plan_for(layer, groups, plan)))
    _same_everywhere(parts, groups)
    device = next(layer.parameters()).device
    options = LayerOptions(
        backend=parts.backend(groups.expert_tensor),
        aux_loss=aux_loss,
        z_loss=z_loss,
        route_after_dp_transform=layer.moe_config.route_after_dp_transform,
        ranks_per_node=ranks_per_node,
    )
    return _build(layer, parts, groups, options, context or MoEContext(1, layer.num_experts, device), index)


def gradient_groups(layer: ParallelMoELayer) -> dict[str, ParallelGroup]:
    """Parameter name -> the group to sum its gradient over (see the top of this file)."""
    external = {name for name, _ in layer.external_shared.module.named_children()} if layer.external_shared else set()
    found = {}
    for name, _ in layer.named_parameters():
        if name.startswith(f"{layer.names.experts}."):
            found[name] = layer.groups.expert_data
        elif name.split(".")[0] in external:
            found[name] = ParallelGroup([layer.groups.rank], layer.groups.rank)
        else:
            found[name] = layer.groups.data
    return found


def replan(layer: ParallelMoELayer, plan: SlotPlan) -> None:
    """Other copies in the redundant slots of a parallelized layer, from the next forward on; the same on all ranks."""
    assert isinstance(layer.expert_source, SlotExperts)
    layer.expert_source.set_plan(plan)
    layer.set_plan(plan)


# ------------------------------------------------------------------------------------------------------------ checks


def plan_for(layer: MoELayer, groups: Groups, plan: SlotPlan | None) -> SlotPlan:
    """The plan given, or the one that the configuration's flags ask for; checked against flags, block and groups."""
    config, world = layer.moe_config, groups.expert.world_size
    has_shared = layer.fused_moe.shared_experts is not None
    for flag in ("enable_external_shared_experts", "enable_shared_expert_tp"):
        if getattr(config, flag) and not has_shared:
            raise ConfigError(
                f"MoEConfig.{flag} (True) needs shared experts, and the block has no "
                f"`{config.field_names.shared_experts}`: name them in MoEFieldNames or leave the flag out"
            )
    if config.enable_shared_expert_tp:
        _check_shared_tensor(groups)
    external, redundant = config.enable_external_shared_experts, config.enable_redundant_experts
    if plan is None:
        shared, copies = default_counts(world, layer.top_k, layer.num_experts, external, redundant)
        plan = plan_slots(layer.num_experts, world, shared, copies)
    else:
        check_plan(plan, layer.num_experts, world)
        _check_flags(plan, config)
    if plan.shared_ranks and groups.expert_tensor.world_size > 1:
        raise TopologyError(
            f"parallel.expert_tensor ({groups.expert_tensor.world_size}) and parallel.shared_expert_ranks "
            f"({plan.shared_ranks}): ranks of their own hold whole shared experts; set one of the two to its default"
        )
    return plan


def _check_flags(plan: SlotPlan, config: MoEConfig) -> None:
    if config.enable_external_shared_experts != (plan.shared_ranks > 0):
        raise TopologyError(
            f"MoEConfig.enable_external_shared_experts ({config.enable_external_shared_experts}) and the plan's "
            f"shared_ranks ({plan.shared_ranks}) must agree: set the flag if and only if ranks are set aside"
        )
    # copies also even the ranks out beside shared ranks (see `default_counts`), without being asked for
    unasked = plan.num_redundant > 0 and not (config.enable_redundant_experts or plan.shared_ranks)
    if unasked or (config.enable_redundant_experts and not plan.num_redundant):
        raise TopologyError(
            f"MoEConfig.enable_redundant_experts ({config.enable_redundant_experts}) and the plan's num_redundant "
            f"({plan.num_redundant}) must agree: set the flag if and only if there are copies"
        )


def _check_shared_tensor(groups: Groups) -> None:
    start = "MoEConfig.enable_shared_expert_tp (True)"
    if groups.expert.world_size == 1:
        raise TopologyError(
            f"{start} needs expert parallelism and parallel.expert is 1: raise it or leave the flag out"
        )
    if groups.tensor.world_size == 1:
        raise TopologyError(
            f"{start} cuts shared experts over ranks that hold the same tokens, and parallel.tensor is 1: raise it or "
            "leave the flag out"
        )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a layer is made of, found and checked before anything is changed.

    shared: parts that the layer does not run itself, by attribute name: external, or cut over the tensor group.
    """

    fused: FusedMoEBase
    names: ChildNames
    plan: SlotPlan
    config: MoEConfig
    shared: dict[str, nn.Module]
    returns_weights: bool

    @classmethod
    def of(cls, layer: MoELayer, groups: Groups, plan: SlotPlan) -> "_Parts":
        config, fused, fields = layer.moe_config, layer.fused_moe, layer.moe_config.field_names
        backend = type(fused)
        if (
            isinstance(fused, FusedMoE)
            and backend.forward is not FusedMoE.forward
            and backend.run_rows is FusedMoE.run_rows
        ):
            raise TypeError(
                f"{backend.__name__} has a forward of its own, which a parallel layer does not call: override "
                "run_rows, or derive it from FusedMoEBase"
            )
        attributes = {
            name: getattr(fields, name) if config.field(layer, name) is not None else None
            for name in ("shared_experts", "shared_experts_gate")
        }
        for name, attribute in attributes.items():
            if attribute is not None and "." in attribute:
                raise ConfigError(f"MoEFieldNames.{name} ({attribute}): a parallel layer needs it on the block itself")
        if plan.shared_ranks:
            outside = [*attributes.values()]
        else:
            outside = [attributes["shared_experts"]] if config.enable_shared_expert_tp else []
        shared = {name: layer.get_submodule(name) for name in outside if name is not None}
        names = ChildNames(
            router=fields.gate,
            experts=fields.experts,
            # the layer runs those that it finds under these names
            shared_experts=None if shared else attributes["shared_experts"],
            shared_experts_gate=None if plan.shared_ranks else attributes["shared_experts_gate"],
        )
        parts = cls(
            fused=fused,
            names=names,
            plan=plan,
            config=config,
            shared=shared,
            returns_weights=layer.returns_weights,
        )
        parts._check_cuts(groups)
        parts.backend(groups.expert_tensor)
        return parts

    @property
    def is_stacked(self) -> bool:
        """Whether the core layer's own backends compute the experts."""
        assert self.fused.experts is not None
        own = isinstance(self.fused, FusedMoE) and type(self.fused).run_rows is FusedMoE.run_rows
        return own and is_stackable(self.fused.experts.layout) and not self.returns_weights

    def backend(self, expert_tensor: ParallelGroup) -> str:
        if not self.is_stacked:
            return "loop"
        assert self.fused.experts is not None
        assert isinstance(self.fused, FusedMoE)
        _, down = self.fused.experts.stacked()
        hidden, inner = down.shape[1:]
        return resolve_backend(self.fused.backend, down.device, down.dtype, hidden, inner // expert_tensor.world_size)

    def _check_cuts(self, groups: Groups) -> None:
        """Everything that is cut can be."""
        experts, m = self.fused.experts, groups.expert_tensor.world_size
        assert experts is not None
        if any(parameter.grad is not None for parameter in self.fused.parameters()):
            raise RuntimeError("the layer has gradients already: parallelize it before training and its optimizer")
        if m > 1:
            if not self.is_stacked:
                raise TopologyError(
                    f"parallel.expert_tensor ({m}) cuts gate_up_proj and down_proj with a plain gate, and "
                    f"{type(experts.experts).__name__} is stored as {experts.layout.code} or computed by "
                    f"{type(self.fused).__name__}: set it to 1"
                )
            _check_width(f"parallel.expert_tensor ({m})", experts.stacked()[1].shape[2], m)
        if self.shared and not self.plan.shared_ranks:
            for module in self.shared.values():
                for name, parameter in module.named_parameters():
                    _cut(name, parameter, groups.tensor)


def _on_all_ranks(groups: Groups, make: Callable[[], Made]) -> Made:
    """What `make` returns. If it raises on any rank, all ranks raise, so that none waits for the others."""
    error, made = None, None
    try:
        made = make()
    except (MoeTrainError, ValueError, RuntimeError, TypeError) as found:
        error = found
    raise_together(groups.world, error)  # type: ignore[arg-type]
    return made  # type: ignore[return-value]


def _same_everywhere(parts: _Parts, groups: Groups) -> None:
    experts = parts.fused.experts
    assert experts is not None
    shapes = [(name, tuple(p.shape)) for name, p in experts.named_parameters()]
    mine = (parts.plan.digest(), parts.fused.top_k, experts.layout.code, type(parts.fused).__name__, shapes)
    for rank, theirs in enumerate(groups.world.gather_objects(mine)):
        if theirs != mine:
            raise TopologyError(
                f"rank {rank} parallelizes {theirs} and rank {groups.rank} {mine}: plan, top-k and experts must be the "
                "same on all ranks"
            )


# ---------------------------------------------------------------------------------------------------------- assembly


def _build(
    layer: MoELayer, parts: _Parts, groups: Groups, options: LayerOptions, context: MoEContext, index: int
) -> ParallelMoELayer:
    children = dict(layer.named_children())
    fused = layer.give_up()
    experts = fused.experts
    assert experts is not None
    was_list = experts.layout.code == "list"
    if parts.is_stacked:
        _cut_experts(experts, groups.expert_tensor)

    def build(module: nn.Module) -> FusedMoEBase:
        local = type(fused)(parts.config, module, None, None, 1)
        local.checks = "off"
        return local.train(fused.training)

    slots = _on_all_ranks(groups, lambda: SlotExperts(experts, parts.plan, groups.expert, build))
    if was_list:
        _name_by_number(children, parts.names.experts, experts.experts, parts.plan.home(groups.expert.rank_in_group)[0])
    external, split = _shared(parts, groups, children)
    layer_class = ParallelMoELayer if parts.is_stacked else WrappedMoELayer
    made = layer_class(
        children=children,
        names=parts.names,
        router=layer.gate_router,
        experts=slots,
        activation=_function(experts.experts),
        plan=parts.plan,
        options=options,
        groups=groups,
        context=context,
        index=index,
        external_shared=external,
        split_shared=split,
    )
    for name, parameter in layer.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    kept = layer.state_dict(keep_vars=True)
    for name, buffer in layer.named_buffers(recurse=False):
        made.register_buffer(name, buffer, persistent=name in kept)
    if isinstance(made, WrappedMoELayer):
        made.returns_weights = parts.returns_weights
    made.sum_partial_gradients()
    return made.train(layer.training)


def _shared(
    parts: _Parts, groups: Groups, children: dict[str, nn.Module]
) -> tuple[BorrowedModule | None, SplitSharedExperts | None]:
    """Shared experts that the layer does not run as a child of its own: on ranks of their own, or cut."""
    if parts.plan.shared_ranks:
        holders = groups.shared_holders(parts.plan.shared_ranks)
        if holders is not None:
            return borrowed_shared(parts.shared, holders), None
        for name in parts.shared:
            del children[name]
    elif parts.shared:
        for module in parts.shared.values():
            for name, parameter in list(module.named_parameters()):
                _replace(module, name, _cut(name, parameter, groups.tensor))
        return None, SplitSharedExperts(borrowed_shared(parts.shared), groups.tensor)
    return None, None


def _name_by_number(children: dict[str, nn.Module], name: str, experts: nn.Module, first: int) -> None:
    """A slice of a list keeps its experts' own numbers, and with them the family's names."""
    numbered = nn.ModuleDict({str(first + place): expert for place, expert in enumerate(experts.children())})
    top, _, below = name.partition(".")
    if below:
        parent, _, attribute = below.rpartition(".")
        setattr(children[top].get_submodule(parent), attribute, numbered)
    else:
        children[top] = numbered


def _cut_experts(experts: ExpertWrapper, group: ParallelGroup) -> None:
    """This rank's part of the intermediate size of all experts."""
    if group.world_size == 1:
        return
    up_dim, down_dim = (2, 1) if experts.layout.transposed else (1, 2)
    for name, dim, blocks in (("gate_up_proj", up_dim, 2), ("down_proj", down_dim, 1)):
        _replace(experts.experts, name, _narrow(getattr(experts.experts, name), dim, blocks, group))


def _function(experts: nn.Module) -> Activation:
    """The experts' activation; a module would become a child of the layer."""
    activation = getattr(experts, "act_fn", None)
    return activation.forward if isinstance(activation, nn.Module) else activation  # type: ignore[return-value]


def _cut(name: str, parameter: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """This rank's part of a shared expert's matrix: rows of gate and up, columns of down."""
    matrix = name.removesuffix(".weight")
    blocks = {"gate_up_proj": 2, "gate_proj": 1, "up_proj": 1, "down_proj": 1}.get(matrix)
    if blocks is None:
        raise TopologyError(
            f"MoEConfig.enable_shared_expert_tp (True) cannot cut {name} of the shared experts, which is the weight of "
            "no gate_proj, up_proj, gate_up_proj or down_proj: leave the flag out"
        )
    dim = 1 if matrix == "down_proj" else 0
    _check_width(f"parallel.tensor ({group.world_size})", parameter.shape[dim] // blocks, group.world_size)
    return _narrow(parameter, dim, blocks, group)


def _narrow(parameter: torch.Tensor, dim: int, blocks: int, group: ParallelGroup) -> torch.Tensor:
    """A dimension of so many blocks; this rank's part of each."""
    parts = [block.chunk(group.world_size, dim)[group.rank_in_group] for block in parameter.detach().chunk(blocks, dim)]
    return torch.cat(parts, dim)


def _check_width(what: str, width: int, ranks: int) -> None:
    if width % ranks:
        raise TopologyError(f"{what} must divide the intermediate size ({width}) that it cuts: use one that does")


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Another tensor in a parameter's place, with its flags and tags."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old: nn.Parameter = getattr(owner, leaf)
    new = nn.Parameter(value.contiguous().clone(), requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    setattr(owner, leaf, new)
