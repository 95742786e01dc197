"""What a step's routing looked like, added up on the device: nothing here is read by the host, changes a number, or
takes part in a gradient. A watcher hangs in the `MoEContext` for the steps whose figures are wanted.

L MoE layers, E logical experts, K experts per token, T tokens that this rank answers for, M tokens it works on.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from moe_train.moe.dispatch import Destinations, DispatchPlan, count_ids
from moe_train.moe.route import Routing, wanted_experts
from moe_train.parallel import ParallelGroup

ROUTER_SUMS = ("tokens", "top_share", "chosen_share", "logit_square", "logsumexp")
"""Sums over tokens: how many had logits; the largest score, and the chosen ones together, as shares of all scores of
the token; the mean square of its logits; their logsumexp."""
RANK_ROWS = ("received", "peak", "sent", "returned", "saved")
"""Of one rank: rows received, and most of them in one micro-batch; rows sent to other ranks; rows of others, which it
sends back; and how many fewer rows it would send if a token went to each rank once."""


class Watcher(Protocol):
    """Sees every routing decision when it is made: in training and evaluation forwards, not in recompute."""

    def see(
        self,
        layer: int,
        own: Routing,
        ids_MK: torch.Tensor,
        plan: DispatchPlan,
        destinations: Destinations,
        group: ParallelGroup,
    ) -> None:
        """own: the routing of the T tokens, so that each token is seen on one rank. ids_MK: of the M tokens."""
        ...


class StepStatistics:
    """One optimizer step on this rank.

    sums_LF: `ROUTER_SUMS`. rows_LQ: `RANK_ROWS`. pairs_LEE: tokens that chose both experts, on the diagonal those that
    chose the one; None unless asked for. All float64, in which counts are exact.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device, pairs: bool = False):
        self.sums_LF = torch.zeros(num_layers, len(ROUTER_SUMS), dtype=torch.float64, device=device)
        self.rows_LQ = torch.zeros(num_layers, len(RANK_ROWS), dtype=torch.float64, device=device)
        self.pairs_LEE = None
        if pairs:
            self.pairs_LEE = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(
        self,
        layer: int,
        own: Routing,
        ids_MK: torch.Tensor,
        plan: DispatchPlan,
        destinations: Destinations,
        group: ParallelGroup,
    ) -> None:
        if own.logits_TE is not None and own.scores_TE is not None:
            self.sums_LF[layer] += router_sums(own.logits_TE, own.scores_TE, own.topk_ids_TK)
        if self.pairs_LEE is not None:
            size = self.pairs_LEE.shape[-1]
            chosen_TE = torch.zeros(
                own.topk_ids_TK.shape[0], size + 1, dtype=torch.float32, device=ids_MK.device
            ).scatter_(1, wanted_experts(own.topk_ids_TK), 1.0)[:, :size]
            self.pairs_LEE[layer] += chosen_TE.T @ chosen_TE
        received = plan.rows_per_slot.sum().to(torch.float64)
        rows_Q = self.rows_LQ[layer]
        rows_Q[0] += received
        rows_Q[1] = torch.maximum(rows_Q[1], received)
        if group.world_size > 1:
            rows_Q[2:] += wire_rows(ids_MK, destinations, group, received)


def router_sums(logits_TE: torch.Tensor, scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """`ROUTER_SUMS` of T tokens, float64 [F]. An expert without room counts as chosen."""
    shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    wanted_TK, experts = wanted_experts(ids_TK), scores_TE.shape[1]
    chosen_TK = shares_TE.gather(1, wanted_TK.clamp(max=experts - 1)).masked_fill(wanted_TK == experts, 0.0)
    per_token_FT = torch.stack(
        [
            torch.ones_like(logits_TE[:, 0]),
            shares_TE.amax(dim=-1),
            chosen_TK.sum(dim=-1),
            logits_TE.square().mean(dim=-1),
            logits_TE.logsumexp(dim=-1),
        ]
    )
    return per_token_FT.sum(dim=1, dtype=torch.float64)


def wire_rows(
    ids_MK: torch.Tensor, destinations: Destinations, group: ParallelGroup, received: torch.Tensor
) -> torch.Tensor:
    """`RANK_ROWS` from `sent` on [3], of one exchange that brought `received` rows here."""
    per_rank = torch.tensor(destinations.per_rank)
    rank_of_D = torch.repeat_interleave(
        torch.arange(group.world_size), per_rank, output_size=sum(destinations.per_rank)
    ).to(ids_MK.device)
    place_MC, world = destinations.of(ids_MK), group.world_size
    rank_MC = torch.where(place_MC < 0, world, rank_of_D[place_MC.clamp(min=0)])  # the last column is of no rank
    goes_MR = torch.zeros(rank_MC.shape[0], world + 1, dtype=torch.float64, device=ids_MK.device)
    copies_R = goes_MR.scatter_add(1, rank_MC, torch.ones_like(rank_MC, dtype=torch.float64)).sum(dim=0)[:world]
    once_R = goes_MR.scatter_(1, rank_MC, 1.0).sum(dim=0)[:world]
    kept = copies_R[group.rank_in_group]
    others_R = torch.arange(group.world_size, device=ids_MK.device) != group.rank_in_group
    return torch.stack([copies_R.sum() - kept, received - kept, ((copies_R - once_R) * others_R).sum()])


class ChosenExperts:
    """Held-out tokens: how many each expert got, and which experts the first of them chose.

    valid: of the micro-batch in flight, the first so many tokens are to be counted. keep: and so many to be kept.
    counts_LE: int64. kept: by layer, ids of each micro-batch [tokens, K].
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self.valid = self.keep = 0

    @torch.no_grad()
    def see(
        self,
        layer: int,
        own: Routing,
        ids_MK: torch.Tensor,
        plan: DispatchPlan,
        destinations: Destinations,
        group: ParallelGroup,
    ) -> None:
        size = self.counts_LE.shape[1]
        self.counts_LE[layer] += count_ids(wanted_experts(own.topk_ids_TK[: self.valid]), size + 1)[:size]
        self.kept[layer].append(own.topk_ids_TK[: self.keep].clone())


class ExpertClock:
    """How long the experts of each layer compute on this rank: forward, recompute and backward, without any exchange.

    Marks are CUDA events on a GPU and the wall clock on a CPU. At ZeRO-3 the backward's part includes fetching weights.
    """

    def __init__(self, num_layers: int, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[list[tuple]] = [[] for _ in range(num_layers)]

    def measure(
        self, layer: int, rows_NH: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """`compute(rows_NH)`, timed, and its backward too."""
        spans = self._spans[layer]
        rows_NH = rows_NH.view_as(rows_NH)  # a tensor of its own, whose gradient is the last thing computed
        began = self._mark()
        out_NH = compute(rows_NH)
        spans.append((began, self._mark()))
        if out_NH.requires_grad and rows_NH.requires_grad:
            backward: list = []
            out_NH.register_hook(lambda _: backward.append(self._mark()))
            rows_NH.register_hook(lambda _: spans.append((backward[0], self._mark())))
        return out_NH

    def milliseconds(self) -> list[float]:
        """By layer. On a GPU it waits for the last mark: ask when the step's numbers have been read anyway."""
        if not self._on_gpu:
            return [sum(1e3 * (end - begin) for begin, end in spans) for spans in self._spans]
        for spans in self._spans:
            for _, end in spans:
                end.synchronize()
        return [sum(begin.elapsed_time(end) for begin, end in spans) for spans in self._spans]

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
