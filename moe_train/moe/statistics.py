"""What a step's routing looked like, added up on the device: nothing here is read by the host, changes a number, or
takes part in a gradient. A watcher hangs in the `MoEContext` for the steps whose figures are wanted.

L MoE layers, E logical experts, K experts per token, T tokens that this rank answers for.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from moe_train import kernels
from moe_train.moe.dispatch import DispatchPlan, Travel, count_ids
from moe_train.moe.route import Routing, wanted_experts

ROUTER_SUMS = ("tokens", *kernels.FIGURES)
"""Sums over tokens: how many had logits, and their figures, with the mean square of the logits."""
RANK_ROWS = ("received", "peak", "sent", "returned", "saved")
"""Of one rank: rows that its experts compute, and most of them in one micro-batch; rows sent to other ranks; rows of
others, which it sends back; and how many more it would send if a token did not go to each rank once."""


class Watcher(Protocol):
    """Sees every routing decision when it is made: in training and evaluation forwards, not in recompute.

    routing: it looks at the scores too.
    """

    routing: bool

    def see(
        self,
        layer: int,
        own: Routing,
        score: str,
        plan: DispatchPlan,
    ) -> None:
        """own: the routing of the T tokens, so that each token is seen on one rank. score: see `RouterSpec`."""
        ...


class StepStatistics:
    """One optimizer step on this rank. What each forward shows is kept, and put together once: every launch that a
    forward has more is one for each layer and micro-batch, and slows down a model that the host can hardly keep up
    with.

    routing: keep more than the rows that are received here. pairs_LEE: tokens that chose both experts, on the diagonal
    those that chose the one; None unless asked for. Float64, as all figures are: counts are exact in it.
    """

    def __init__(
        self, num_layers: int, num_experts: int, device: torch.device, routing: bool = True, pairs: bool = False
    ):
        self.device, self.routing, self._tokens = device, routing, [0] * num_layers
        # by layer, of each forward
        self._figures, self._received = ([list[torch.Tensor]() for _ in range(num_layers)] for _ in range(2))
        self._wire = [[0] * (len(RANK_ROWS) - 2) for _ in range(num_layers)]  # the host knows it
        self.pairs_LEE = None
        if pairs:
            self.pairs_LEE = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(
        self,
        layer: int,
        own: Routing,
        score: str,
        plan: DispatchPlan,
    ) -> None:
        self._received[layer].append(plan.rows_per_slot)
        if not self.routing:
            return
        if own.logits_TE is not None and len(own.logits_TE):
            self._tokens[layer] += len(own.logits_TE)
            self._figures[layer].append(kernels.router_figures(own.logits_TE, own.topk_ids_TK, score, own.scores_TE))
        if self.pairs_LEE is not None:
            size = self.pairs_LEE.shape[-1]
            chosen_TE = torch.zeros(
                own.topk_ids_TK.shape[0], size + 1, dtype=torch.float32, device=self.device
            ).scatter_(1, wanted_experts(own.topk_ids_TK), 1.0)[:, :size]
            self.pairs_LEE[layer] += chosen_TE.T @ chosen_TE
        if plan.travel is not None:
            self._wire[layer] = [sum(both) for both in zip(self._wire[layer], wire_rows(plan.travel), strict=True)]

    def sums_LF(self, num_experts: int) -> torch.Tensor:
        """`ROUTER_SUMS`."""
        tokens_L = on_device(torch.tensor(self._tokens, dtype=torch.float64), self.device)
        if not any(self._figures):
            return F.pad(tokens_L.unsqueeze(1), (0, len(kernels.FIGURES)))
        figures_LF = self._stacked(self._figures).sum(dim=(1, 2))
        figures_LF[:, kernels.FIGURES.index("logit_square")] /= num_experts
        return torch.cat([tokens_L.unsqueeze(1), figures_LF], dim=1)

    def rows_LQ(self) -> torch.Tensor:
        """`RANK_ROWS`."""
        rows_LB = self._stacked(self._received)
        rows_LB = rows_LB.sum(dim=2) if rows_LB.dim() == 3 else rows_LB
        rows_LQ = torch.zeros(len(rows_LB), len(RANK_ROWS), dtype=torch.float64, device=self.device)
        rows_LQ[:, 0], rows_LQ[:, 1] = rows_LB.sum(dim=1), rows_LB.amax(dim=1)
        if any(map(any, self._wire)):
            rows_LQ[:, 2:] = on_device(torch.tensor(self._wire, dtype=torch.float64), self.device)
        return rows_LQ

    def _stacked(self, parts: list[list[torch.Tensor]]) -> torch.Tensor:
        """[L, B, ...] of B forwards, float64; zeros where a layer has shown fewer than others, and where a forward has
        fewer blocks of tokens than another. Of none: [L, 1]."""
        most = max(map(len, parts))
        if not most:
            return torch.zeros(len(parts), 1, dtype=torch.float64, device=self.device)
        nothing = torch.zeros_like(next(part[0] for part in parts if part))
        every = [each for part in parts for each in (*part, *[nothing] * (most - len(part)))]
        ragged = len({each.shape for each in every}) > 1
        stacked = pad_sequence(every, batch_first=True) if ragged else torch.stack(every)
        return stacked.to(torch.float64).view(len(parts), most, *stacked.shape[1:])


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copied there without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def wire_rows(travel: Travel) -> list[int]:
    """`RANK_ROWS` from `sent` on, of one exchange."""
    others = [rank for rank in range(len(travel.send_rows)) if rank != travel.rank]
    sent, returned, copies = (
        sum(rows[rank] for rank in others) for rows in (travel.send_rows, travel.recv_rows, travel.copies_sent)
    )
    return [sent, returned, copies - sent]


class ChosenExperts:
    """Held-out tokens: how many each expert got, and which experts the first of them chose.

    valid: of the micro-batch in flight, the first so many tokens are to be counted. keep: and so many to be kept.
    counts_LE: int64. kept: by layer, ids of each micro-batch [tokens, K].
    """

    routing = False

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self.valid = self.keep = 0

    @torch.no_grad()
    def see(
        self,
        layer: int,
        own: Routing,
        score: str,
        plan: DispatchPlan,
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

    def measure(self, layer: int, x_NH: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`compute(x_NH)`, timed, and its backward too."""
        spans = self._spans[layer]
        x_NH = x_NH.view_as(x_NH)  # a tensor of its own, whose gradient is the last thing computed
        began = self._mark()
        y_NH = compute(x_NH)
        spans.append((began, self._mark()))
        if y_NH.requires_grad and x_NH.requires_grad:
            backward: list = []
            y_NH.register_hook(lambda _: backward.append(self._mark()))
            x_NH.register_hook(lambda _: spans.append((backward[0], self._mark())))
        return y_NH

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
