"""The parallel MoE layer: route -> dispatch -> experts -> combine.

It takes the place of a Hugging Face MoE block and keeps that block's router and shared experts as its children,
under their own names. The experts themselves come from an `ExpertSource`, so the layer does not know how they are
sharded; groups come in as arguments.

T tokens of this rank, M tokens it works on (see `domain`), E experts, K experts per token, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from moe_train.kernels import Fp8Gemms
from moe_train.moe.balance import (
    AuxLoss,
    micro_batch_aux_loss,
    quantile_sums,
    score_sums,
    sequence_aux_loss,
    z_loss,
)
from moe_train.moe.context import MoEContext, Replay
from moe_train.moe.dispatch import Destinations, DispatchPlan, by_expert, combine, count_ids, dispatch, plan_dispatch
from moe_train.moe.domain import Shares, TokenDomain
from moe_train.moe.experts import (
    BACKENDS,
    KERNEL_BACKENDS,
    Activation,
    ExpertSource,
    ExpertWeights,
    activation_name,
    fused_tokens,
    keep_in_graph,
)
from moe_train.moe.fp8 import Fp8Experts
from moe_train.moe.jitter import jitter
from moe_train.moe.placement import SlotPlan
from moe_train.moe.route import Routing, wanted_experts
from moe_train.moe.router import RawLogitsRouter, Router, ScoreRouter
from moe_train.moe.sequences import Sequences
from moe_train.moe.shared import BorrowedModule, SplitSharedExperts
from moe_train.moe.statistics import Watcher
from moe_train.parallel import Groups


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """What all MoE layers of a model have in common.

    backend: key of `experts.BACKENDS`, or one of `KERNEL_BACKENDS`. aux_loss, z_loss: whether to compute them (their
        weights are the trainer's).
    aux_over: the tokens that an auxiliary loss balances. The layer cannot know those of the whole optimizer step: it
        then leaves `score_sums` in the context, for `global_batch_aux_loss`.
    route_after_dp_transform: route the tokens this rank works on, instead of all it holds; the numbers are the same.
    jitter: half the width of the random factors that training scales the block's input by; jitter_seed: theirs.
    ranks_per_node: rows go to a copy of their expert on the same node where there is one (None: to every copy).
    fp8: products of the experts that run in FP8, with the backend `fused`; None: none.
    """

    backend: str
    aux_loss: bool = False
    z_loss: bool = False
    aux_over: AuxLoss = "sequence"
    route_after_dp_transform: bool = False
    jitter: float = 0.0
    jitter_seed: int = 0
    ranks_per_node: int | None = None
    fp8: Fp8Gemms | None = None


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
        children: the block's own router and shared experts by attribute name; those kept elsewhere are left out.
        names: which child is which.
        router: how the router's outputs become a choice.
        experts: this rank's slots.
        plan: which expert lies in which slot of the EP group; the same on all ranks.
        options: see `LayerOptions`.
        groups: of the whole topology.
        context: shared by all layers of the model.
        index: position among the model's MoE layers.
        external_shared: the shared expert, on a rank that holds nothing else (EP ranks below `plan.shared_ranks`).
        split_shared: shared experts whose width is shared out over the tensor group.

    Shape: hidden states [..., H] -> the same shape and type. The first dimension of [B, S, H] counts sequences.
    """

    def __init__(
        self,
        *,
        children: dict[str, nn.Module],
        names: ChildNames,
        router: Router,
        experts: ExpertSource,
        activation: Activation,
        plan: SlotPlan,
        options: LayerOptions,
        groups: Groups,
        context: MoEContext,
        index: int,
        external_shared: BorrowedModule | None = None,
        split_shared: SplitSharedExperts | None = None,
    ):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.names, self.options, self.context, self.index = names, options, context, index
        self.gate_router = router  # not `router`, which is what many families call their gate
        self.groups, self.group, self.domain = groups, groups.expert, TokenDomain(groups)
        # none of these is a module or parameter: whoever shards the dense part must not see them
        self.expert_source, self.activation = experts, activation
        if self._fused:
            activation_name(activation)  # says so now if the kernels do not compute it
        assert options.fp8 is None or self._fused, f"the backend {options.backend} computes nothing in FP8"
        self.fp8 = None if options.fp8 is None else Fp8Experts(options.fp8, activation)
        self.external_shared, self.split_shared = external_shared, split_shared
        self.set_plan(plan)

    def set_plan(self, plan: SlotPlan) -> None:
        """Send rows by another plan from now on. The weights in the slots are the store's to move."""
        device = self.context.counts_LE.device
        self.plan = plan
        self.destinations = Destinations(plan, self.group.rank_in_group, device, self.options.ranks_per_node)

    def sum_partial_gradients(self) -> None:
        """Let parameters used on a share of the tokens sum their gradients over the ranks that share them.

        Call once, when the parameters are those that will be trained.
        """
        if not self.domain.slices:
            return
        on_shares = [self.names.shared_experts, self.names.shared_experts_gate] if self.split_shared is None else []
        if self.options.route_after_dp_transform:
            on_shares.append(self.names.router)
        for name in on_shares:
            if name is not None and name in self._modules:
                for parameter in self.get_submodule(name).parameters():
                    parameter.register_hook(self._sum_over_shares)

    def _sum_over_shares(self, gradient: torch.Tensor) -> torch.Tensor:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True).contiguous()
        return self.domain.slicing.all_reduce_(wide).to(gradient.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args:
        hidden_states: [..., H].
        input_ids: [...], for routers that hash them; None: those of the context.
        token_mask: [...], False for padding: not routed, not counted, in no loss, output 0.
        """
        if hidden_states.dim() < 2:
            raise ValueError(f"hidden_states must be [..., H], not of shape {list(hidden_states.shape)}")
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        num_sequences = hidden_states.shape[0] if hidden_states.dim() == 3 else 1
        ids_T = self._input_ids(input_ids, x_TH.shape[0])
        if token_mask is None:
            y_TH = self._forward(x_TH, ids_T, num_sequences, None)
        else:
            kept = token_mask.reshape(-1).nonzero().squeeze(1)
            sequence_T = kept // max(x_TH.shape[0] // max(num_sequences, 1), 1)
            ids_T = None if ids_T is None else ids_T[kept]
            y = self._forward(x_TH[kept], ids_T, num_sequences, sequence_T)
            y_TH = torch.zeros_like(x_TH).index_copy(0, kept, y)
        return y_TH.view(hidden_states.shape)

    def _input_ids(self, given: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        if not self.gate_router.uses_input_ids:
            return None
        ids = given if given is not None else self.context.input_ids
        if ids is not None and ids.numel() != num_tokens:
            raise ValueError(f"{ids.numel()} input_ids for {num_tokens} tokens: hash routing needs one id per token")
        return None if ids is None else ids.reshape(-1)

    def _forward(
        self, x_TH: torch.Tensor, ids_T: torch.Tensor | None, num_sequences: int, sequence_T: torch.Tensor | None
    ) -> torch.Tensor:
        sequences = None
        if self.training and (self.gate_router.uses_sequences or self.options.jitter):
            first = self.context.first_sequence
            sequences = Sequences.of(x_TH.shape[0], num_sequences, sequence_T, x_TH.device, first)
        if self.options.jitter and sequences is not None:
            x_TH = jitter(x_TH, self.options.jitter, self.options.jitter_seed + self.index, sequences)
        shares = self.domain.shares(x_TH.shape[0])
        started = self.split_shared.start(x_TH) if self.split_shared else None
        x_MH = self.domain.enter(x_TH, shares)
        weights_MK, plan = self.route(x_TH, x_MH, ids_T, shares, num_sequences, sequence_T, sequences)
        routed = self.run_routed(self.domain.to_experts(x_MH), self.domain.to_experts(weights_MK), plan)
        y_MH = self.domain.from_experts(routed)
        if self.domain.slices:  # shared experts of their own run on the share, else on all tokens of this rank
            y_MH = self._add_local_shared(y_MH, x_MH)
        y_TH = self.domain.leave(y_MH, shares)
        if not self.domain.slices:
            y_TH = self._add_local_shared(y_TH, x_TH)
        if started is not None:
            assert self.split_shared is not None
            y_TH = y_TH + self._gated(self.split_shared.finish(started), x_TH)
        return y_TH

    def route(
        self,
        x_TH: torch.Tensor,
        x_MH: torch.Tensor,
        ids_T: torch.Tensor | None,
        shares: Shares | None,
        num_sequences: int,
        sequence_T: torch.Tensor | None,
        sequences: Sequences | None,
    ) -> tuple[torch.Tensor, DispatchPlan]:
        """Weights [M, K] and where the M tokens go. One decision per micro-batch: made once, replayed in recompute."""
        gate = self.get_submodule(self.names.router)
        replay = self.context.replay(self.index)
        after = self.options.route_after_dp_transform
        if after:
            ids_T = None if ids_T is None else self.domain.enter(ids_T, shares)
        x = x_MH if after else x_TH
        chosen = replay.topk_ids if replay else self._agreed_choice(gate, x, ids_T, sequences)
        alike = num_sequences if sequence_T is None else None
        routing = self._routing(gate, x, ids_T, chosen, sequences, alike, after)
        chosen_MK, weights_MK = routing.topk_ids_TK, routing.topk_weights_TK
        if after:
            weights_MK = self.domain.own_gradient(weights_MK, shares)
        else:
            chosen_MK, weights_MK = self.domain.enter(chosen_MK, shares), self.domain.enter(weights_MK, shares)
        if replay:
            plan = replay.plan
        else:
            partial = self.gate_router.spec.partial
            plan = plan_dispatch(chosen_MK, self.destinations, self.group, partial=partial, fused=self._fused)
            if self.context.watcher is not None:
                self._show(self.context.watcher, routing, shares, plan)
        if self.training:
            if not replay:
                counted = self.domain.own_rows(chosen_MK, shares) if self.domain.counts else chosen_MK[:0]
                counts = self._count(counted, routing if counted is routing.topk_ids_TK else None)
                self.context.record(self.index, Replay(topk_ids=routing.topk_ids_TK, plan=plan), *counts)
            # in recompute too, which must save the same tensors; the context takes no loss then
            if self._has_losses:
                self.add_losses(self._of_own_tokens(routing, shares), num_sequences, sequence_T)
        return weights_MK, plan

    @property
    def _fused(self) -> bool:
        return self.options.backend in KERNEL_BACKENDS

    def _routing(
        self,
        gate: nn.Module,
        x: torch.Tensor,
        ids_T: torch.Tensor | None,
        chosen: torch.Tensor | None,
        sequences: Sequences | None,
        num_sequences: int | None,
        after: bool,
    ) -> Routing:
        """By one operator where this rank routes whole sequences by scores; num_sequences: None if padded."""
        router = self.gate_router
        alone = not after or self.groups.tensor.world_size == self.groups.expert_tensor.world_size == 1
        plain = type(router) in (ScoreRouter, RawLogitsRouter) and self.context.quantiles_LE is None
        if self._fused and alone and num_sequences and plain:
            assert isinstance(router, ScoreRouter)
            return router.route_fused(gate, x, chosen, num_sequences)
        return router.route(gate, x, ids_T, chosen, sequences)

    def _count(self, ids_MK: torch.Tensor, routing: Routing | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """How often each expert is asked for; and how often it has room, where it may have none.

        routing: these ids', which may have counted already.
        """
        size = self.plan.num_experts
        if routing is not None and routing.sums is not None:
            return routing.sums.counts_SE.sum(dim=0), None
        if not self.gate_router.spec.partial:
            return count_ids(ids_MK, size), None
        kept_E = count_ids(torch.where(ids_MK < 0, size, ids_MK), size + 1)[:size]
        return count_ids(wanted_experts(ids_MK), size + 1)[:size], kept_E

    @torch.no_grad()
    def _agreed_choice(
        self, gate: nn.Module, x: torch.Tensor, ids: torch.Tensor | None, sequences: Sequences | None
    ) -> torch.Tensor | None:
        """Where several ranks route the same tokens: the first one's choice, or None where a rank is alone.

        Parts of different experts, added up because of one rounding, would be nobody's output. Rows of any width are
        as wide as the widest of all ranks whose tokens are brought together.
        """
        ragged = self.gate_router.ragged and sequences is not None
        peers = self.groups.expert_tensor if self.options.route_after_dp_transform else self.groups.tensor
        if peers.world_size == 1 and not (ragged and self.domain.gathers):
            return None
        ids_TK = self.gate_router.route(gate, x, ids, None, sequences).topk_ids_TK
        if ragged:
            width = peers.broadcast_(torch.tensor(ids_TK.shape[1], device=ids_TK.device))
            width = int(self.domain.gathering.all_reduce_(width, "max"))
            nobody = ids_TK.new_full((ids_TK.shape[0], width), ~self.gate_router.num_experts)
            kept = min(width, ids_TK.shape[1])  # a peer's own may be wider by one rounding, and is not used
            nobody[:, :kept] = ids_TK[:, :kept]
            ids_TK = nobody
        return peers.broadcast_(ids_TK.contiguous())

    @torch.no_grad()
    def _show(self, watcher: Watcher, routing: Routing, shares: Shares | None, plan: DispatchPlan) -> None:
        """The decision for a watcher: of tokens that several ranks hold, the first one shows them."""
        own = self._of_own_tokens(routing, shares)
        if self.groups.tensor.rank_in_group:
            own = replace(own, topk_ids_TK=own.topk_ids_TK[:0], logits_TE=None)
        watcher.see(self.index, own, self.gate_router.spec.score, plan)

    def _of_own_tokens(self, routing: Routing, shares: Shares | None) -> Routing:
        """The routing of the T tokens, from one of the M: losses look at whole sequences."""
        if shares is None or not self.options.route_after_dp_transform:
            return routing

        def own(x_M: torch.Tensor | None) -> torch.Tensor | None:
            if x_M is None:
                return None
            return self.domain.leave(x_M, shares) if self.domain.slices else x_M[shares.mine]

        ids_TK = own(routing.topk_ids_TK)
        assert ids_TK is not None
        return replace(routing, logits_TE=own(routing.logits_TE), scores_TE=own(routing.scores_TE), topk_ids_TK=ids_TK)

    @property
    def _has_losses(self) -> bool:
        watched = self.context.logit_squares_L is not None or self.context.quantiles_LE is not None
        return self.gate_router.balanced and (self.options.aux_loss or self.options.z_loss or watched)

    def add_losses(self, routing: Routing, num_sequences: int, sequence_T: torch.Tensor | None) -> None:
        assert routing.logits_TE is not None
        self.context.add_logits(self.index, routing.logits_TE)
        if self.context.quantiles_LE is not None:
            self.add_quantiles(routing, num_sequences, sequence_T)
        if self.options.aux_loss:
            spec = self.gate_router.spec
            if self.options.aux_over == "global_batch":
                self.context.add_score_sums(self.index, score_sums(routing, spec))
            elif self.options.aux_over == "micro_batch":
                self.context.add_loss("aux_loss", micro_batch_aux_loss(routing, spec, num_sequences))
            else:
                self.context.add_loss("aux_loss", sequence_aux_loss(routing, spec, num_sequences, sequence_T))
        if self.options.z_loss:
            assert routing.logits_TE is not None
            self.context.add_loss("z_loss", routing.sums.z_sum if routing.sums else z_loss(routing.logits_TE))

    def run_routed(self, x_MH: torch.Tensor, weights_MK: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Tokens through their experts, wherever these are, weighted and summed [M, H]."""
        x_NH, weights_NC = dispatch(x_MH, weights_MK, plan, self.group)
        return combine(self.run_experts(x_NH, weights_NC, plan), plan, self.group)

    def add_quantiles(self, routing: Routing, num_sequences: int, sequence_T: torch.Tensor | None) -> None:
        assert routing.scores_TE is not None
        assert self.names.bias is not None
        scores_TE, bias_E = routing.scores_TE.detach(), getattr(self.get_submodule(self.names.router), self.names.bias)
        sequences = Sequences.of(scores_TE.shape[0], num_sequences, sequence_T, scores_TE.device)
        self.context.add_quantiles(self.index, quantile_sums(scores_TE, bias_E, self.gate_router.top_k, sequences))

    def run_experts(self, x_NH: torch.Tensor, weights_NC: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """What this rank makes of the tokens that come together here, weighted and summed [N, H]."""
        with self.expert_source.fetch() as weights:
            if self.external_shared is not None:
                x_NH = self.external_shared(x_NH)
            if not weights.gate_up_LIH.shape[0]:
                return keep_in_graph(x_NH, weights_NC, weights.gate_up_LIH, weights.down_LHI)
            return self._timed(x_NH, lambda x: self._run_slots(x, weights_NC, plan, weights))

    def _run_slots(
        self, x_NH: torch.Tensor, weights_NC: torch.Tensor, plan: DispatchPlan, weights: ExpertWeights
    ) -> torch.Tensor:
        if self.fp8 is not None:
            return self.fp8.tokens(x_NH, weights_NC, plan.maps, weights)
        if self._fused:
            return fused_tokens(self.options.backend, x_NH, weights_NC, plan.maps, weights, self.activation)
        compute = BACKENDS[self.options.backend]
        return by_expert(x_NH, weights_NC, plan, lambda *rows: compute(*rows, weights, self.activation))

    def _timed(self, x_NH: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        clock = self.context.clock
        return compute(x_NH) if clock is None else clock.measure(self.index, x_NH, compute)

    def _add_local_shared(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Shared experts that are children of this layer, on the tokens given."""
        if self.names.shared_experts is None or self.names.shared_experts not in self._modules:
            return y
        return y + self._gated(self.get_submodule(self.names.shared_experts)(x), x)

    def _gated(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Times the shared experts' sigmoid gate, where the family has one and it is a child of this layer."""
        if self.names.shared_experts_gate is None or self.names.shared_experts_gate not in self._modules:
            return y
        return self.get_submodule(self.names.shared_experts_gate)(x).sigmoid() * y
