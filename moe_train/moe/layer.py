"""The parallel MoE layer: route -> dispatch -> experts -> combine.

It takes the place of a Hugging Face MoE block and keeps that block's router and shared experts as its children,
under their own names. The experts themselves come from an `ExpertSource`, so the layer does not know how they are
sharded; groups come in as arguments.
"""

from dataclasses import dataclass

import torch
from torch import nn

from moe_train.moe.balance import sequence_aux_loss, z_loss
from moe_train.moe.context import MoEContext, Replay
from moe_train.moe.dispatch import combine, dispatch, plan_dispatch
from moe_train.moe.experts import BACKENDS, Activation, ExpertSource
from moe_train.moe.placement import Placement
from moe_train.moe.route import RouterSpec, Routing, route_tokens
from moe_train.parallel import ParallelGroup


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What all MoE layers of a model have in common.

    backend: key of `experts.BACKENDS`. aux_loss, z_loss: whether to compute them (their weights are the trainer's).
    """

    spec: RouterSpec
    placement: Placement
    backend: str
    aux_loss: bool = False
    z_loss: bool = False


@dataclass(frozen=True, kw_only=True)
class ChildNames:
    """Hugging Face attribute names of the block's parts; None: the family has no such part."""

    router: str
    experts: str
    shared_experts: str | None = None
    shared_experts_gate: str | None = None
    bias: str | None = None
    """Buffer of the router that holds the correction bias."""


class ParallelMoELayer(nn.Module):
    """Args:
        children: the block's own router and shared experts by attribute name. The router's `forward` must return
            logits [T, E] for hidden states [T, H].
        names: which child is which.
        experts: this rank's slice.
        options: see `LayerOptions`.
        group: the EP group.
        context: shared by all layers of the model.
        index: position among the model's MoE layers.

    Shape: hidden states [..., H] -> the same shape and type. The first dimension of [B, S, H] counts sequences.
    """

    def __init__(
        self,
        *,
        children: dict[str, nn.Module],
        names: ChildNames,
        experts: ExpertSource,
        activation: Activation,
        options: LayerOptions,
        group: ParallelGroup,
        context: MoEContext,
        index: int,
    ):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.names, self.options, self.group, self.context, self.index = names, options, group, context, index
        # neither is a module or parameter: whoever shards the dense part must not see the experts
        self.expert_source, self.activation = experts, activation

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        num_sequences = hidden_states.shape[0] if hidden_states.dim() == 3 else 1
        routing, plan = self.route(x_TH)
        self.add_losses(routing, num_sequences)
        rows_NH = dispatch(x_TH, plan, self.group)
        with self.expert_source.fetch() as weights:
            rows_NH = BACKENDS[self.options.backend](rows_NH, plan.rows_per_expert, weights, self.activation)
        y_TH = combine(rows_NH, routing.topk_weights_TK, plan, self.group)
        if self.names.shared_experts is not None:
            y_TH = y_TH + self.run_shared_experts(x_TH)
        return y_TH.view(hidden_states.shape)

    def route(self, x_TH: torch.Tensor):
        """One decision per micro-batch: made in the first forward, replayed in recompute."""
        router = self.get_submodule(self.names.router)
        bias_E = getattr(router, self.names.bias) if self.names.bias else None
        replay = self.context.replay(self.index)
        ids = replay.topk_ids_TK if replay else None
        routing = route_tokens(router(x_TH), self.options.spec, bias_E, ids)
        plan = replay.plan if replay else plan_dispatch(routing.topk_ids_TK, self.options.placement, self.group)
        self.context.record(self.index, Replay(topk_ids_TK=routing.topk_ids_TK, plan=plan), self.training)
        return routing, plan

    def add_losses(self, routing: Routing, num_sequences: int) -> None:
        if not self.training:
            return
        if self.options.aux_loss:
            self.context.add_loss("aux_loss", sequence_aux_loss(routing, self.options.spec, num_sequences))
        if self.options.z_loss:
            self.context.add_loss("z_loss", z_loss(routing.logits_TE))

    def run_shared_experts(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Shared experts on the local tokens, times their sigmoid gate where the family has one."""
        assert self.names.shared_experts is not None
        y_TH = self.get_submodule(self.names.shared_experts)(x_TH)
        if self.names.shared_experts_gate is not None:
            y_TH = self.get_submodule(self.names.shared_experts_gate)(x_TH).sigmoid() * y_TH
        return y_TH
