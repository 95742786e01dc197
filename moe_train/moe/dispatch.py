"""Tokens to the ranks that hold their experts, and back.

T local tokens, K experts per token, C copies per token (K, and one more for an external shared expert), R = T * C
copies to send, N rows received, H hidden size, E experts, D destinations of the EP group (slots of the slot plan, and
one per rank that holds the shared expert).

A copy is identified by its flat position t * C + c. Sent rows are sorted by destination (stable), so the
blocks for the ranks of the EP group are consecutive; received rows arrive [source][slot] and are put in
[slot][source] order, which is what a grouped GEMM wants. Counts come from the routing and are exchanged
before the rows; a rank may have no tokens, a slot no rows, a rank no slots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moe_train import kernels
from moe_train.moe.placement import SlotPlan
from moe_train.parallel import ParallelGroup, all_to_all_rows, exchange_counts


class Destinations:
    """A slot plan as one rank needs it: where the rows of each expert may go.

    per_rank: number of destinations of each rank. table_EC: destination numbers by expert, the first `copies_E` of a
    row; None where every expert lies in one place, in order. shared: destinations of the shared expert, this rank's
    first choice first; None where there is none.
    """

    def __init__(self, plan: SlotPlan, rank: int, device: torch.device, ranks_per_node: int | None = None):
        self.num_experts, self.per_rank = plan.num_experts, plan.destinations_per_rank
        self.table_EC = self.copies_E = self.shared = None
        if plan.num_redundant or plan.shared_ranks:
            table = plan.expert_destinations(rank, ranks_per_node)
            widest = max(map(len, table))
            self.copies_E = torch.tensor([len(row) for row in table], device=device)
            self.table_EC = torch.tensor([[*row, *[row[0]] * (widest - len(row))] for row in table], device=device)
        if plan.shared_ranks:
            turn = rank % plan.shared_ranks
            numbers = plan.shared_destinations
            self.shared = torch.tensor([*numbers[turn:], *numbers[:turn]], device=device)

    def of(self, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """Destination of every copy [T, C]. A token's index picks one of an expert's places, so they fill evenly.
        A negative id stays negative: it goes nowhere."""
        if self.table_EC is None or self.copies_E is None:
            return topk_ids_TK
        token_T = torch.arange(topk_ids_TK.shape[0], device=topk_ids_TK.device)
        ids_TK = topk_ids_TK.clamp(min=0)
        place_TK = token_T.unsqueeze(1) % self.copies_E[ids_TK]
        chosen_TK = torch.where(topk_ids_TK < 0, topk_ids_TK, self.table_EC[ids_TK, place_TK])
        if self.shared is None:
            return chosen_TK
        return torch.cat([chosen_TK, self.shared[token_T % len(self.shared)].unsqueeze(1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Everything that moving the rows of one routing needs. Holds no gradient; replayed in recompute.

    copies: rows per token. order_R: flat position of the copy that each sent row is. place_R: its inverse, None where
    not every copy is sent.
    send_rows, recv_rows: rows per rank of the EP group (empty lists at EP 1).
    local_order_N, local_place_N: [source][slot] -> [slot][source] and back (None where they are the same).
    rows_per_slot: rows of each local destination, int64 on the device.
    """

    copies: int
    order_R: torch.Tensor
    place_R: torch.Tensor | None
    send_rows: list[int]
    recv_rows: list[int]
    local_order_N: torch.Tensor | None
    local_place_N: torch.Tensor | None
    rows_per_slot: torch.Tensor


@torch.no_grad()
def plan_dispatch(
    topk_ids_TK: torch.Tensor,
    destinations: Destinations,
    group: ParallelGroup,
    *,
    partial: bool = False,
    fused: bool = False,
) -> DispatchPlan:
    """Sort the copies and exchange their counts. Reads the device once when the group has more than one rank.

    Args:
        partial: ids may be negative, and their copies are not sent; reads the device once more.
        fused: sort with the kernels room's `row_maps`, which counts; the same maps.
    """
    row_maps = kernels.row_maps if fused else _sorted_maps
    destination_TC, size = destinations.of(topk_ids_TK), sum(destinations.per_rank)
    flat = destination_TC.reshape(-1)
    if partial:
        maps = row_maps(torch.where(flat < 0, size, flat), size + 1)  # behind all others
        counts_D = maps.counts_D[:size]
        order_R, place_R = maps.order_R[: int(counts_D.sum())], None
    else:
        maps = row_maps(flat, size)
        counts_D, order_R, place_R = maps.counts_D, maps.order_R, maps.place_R
    received = exchange_counts(counts_D, group, destinations.per_rank)
    send_rows: list[int] = []
    recv_rows: list[int] = []
    local_order = local_place = None
    if group.world_size > 1:
        rank_of_D = torch.repeat_interleave(
            torch.arange(group.world_size), torch.tensor(destinations.per_rank), output_size=counts_D.numel()
        ).to(counts_D.device)
        to_rank = counts_D.new_zeros(group.world_size).scatter_add_(0, rank_of_D, counts_D)
        both = torch.stack([to_rank, received.sum(dim=1)]).tolist()
        send_rows, recv_rows = both
        local_order, local_place = _expert_major(received, sum(recv_rows), row_maps)
    return DispatchPlan(
        copies=destination_TC.shape[1],
        order_R=order_R,
        place_R=place_R,
        send_rows=send_rows,
        recv_rows=recv_rows,
        local_order_N=local_order,
        local_place_N=local_place,
        rows_per_slot=received.sum(dim=0),
    )


def count_ids(ids: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0..size-1 occurs, int64 [size]."""
    flat = ids.reshape(-1)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def _expert_major(
    received: torch.Tensor, num_rows: int, row_maps: Callable[[torch.Tensor, int], kernels.RowMaps]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Permutation of received rows from [source][expert] to [expert][source], and its inverse."""
    sources, experts = received.shape
    expert_of_block = torch.arange(experts, device=received.device).repeat(sources)
    expert_of_row = torch.repeat_interleave(expert_of_block, received.reshape(-1), output_size=num_rows)
    maps = row_maps(expert_of_row, experts)
    return maps.order_R, maps.place_R


def _sorted_maps(destination_R: torch.Tensor, num_destinations: int) -> kernels.RowMaps:
    """`kernels.row_maps` by a sort."""
    order_R = torch.argsort(destination_R, stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return kernels.RowMaps(order_R=order_R, place_R=place_R, counts_D=count_ids(destination_R, num_destinations))


class _CopyTokens(torch.autograd.Function):
    """x [T, H] -> the sent rows [R, H]; adjoint: put back in place, sum over the K copies of a token."""

    @staticmethod
    def forward(ctx, x_TH, order_R, place_R, top_k):
        ctx.save_for_backward(order_R, place_R)
        ctx.shape = (x_TH.shape[0], top_k, x_TH.shape[1])
        return x_TH[order_R // top_k]

    @staticmethod
    def backward(ctx, *grads):
        order_R, place_R = ctx.saved_tensors
        copies = spread_rows(grads[0], order_R, ctx.shape[0] * ctx.shape[1]) if place_R is None else grads[0][place_R]
        return copies.view(ctx.shape).sum(dim=1), None, None, None


def spread_rows(rows_RH: torch.Tensor, order_R: torch.Tensor, size: int) -> torch.Tensor:
    """[size, H] with row r at place `order_R[r]` and zeros elsewhere; no place comes twice. Adjoint: take them back."""
    return rows_RH.new_zeros(size, rows_RH.shape[1]).index_copy(0, order_R, rows_RH)


class _PermuteRows(torch.autograd.Function):
    """Rows in another order; adjoint: the inverse permutation (no scatter, so the same bits every time)."""

    @staticmethod
    def forward(ctx, rows, order, place):
        ctx.save_for_backward(place)
        return rows[order]

    @staticmethod
    def backward(ctx, *grads):
        (place,) = ctx.saved_tensors
        return grads[0][place], None, None


def dispatch(x_TH: torch.Tensor, plan: DispatchPlan, group: ParallelGroup, *, fused: bool = False) -> torch.Tensor:
    """Local tokens -> rows for the local experts, sorted by expert [N, H].

    fused: with the kernels room's `copy_tokens`, whose adjoint makes no [T, C, H] in between.
    """
    if fused and plan.place_R is not None:
        rows = kernels.copy_tokens(x_TH, plan.place_R.view(-1, plan.copies))
    else:
        rows = _CopyTokens.apply(x_TH, plan.order_R, plan.place_R, plan.copies)  # type: ignore[assignment]
    if group.world_size == 1:
        return rows
    rows = all_to_all_rows(rows, group, plan.recv_rows, plan.send_rows)
    return _permuted(rows, plan.local_order_N, plan.local_place_N, fused)


def _permuted(
    rows_NH: torch.Tensor, order_N: torch.Tensor | None, place_N: torch.Tensor | None, fused: bool
) -> torch.Tensor:
    assert order_N is not None
    assert place_N is not None
    if fused:
        return kernels.copy_tokens(rows_NH, place_N.unsqueeze(1))
    return _PermuteRows.apply(rows_NH, order_N, place_N)  # type: ignore[return-value]


def combine(
    rows_NH: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    plan: DispatchPlan,
    group: ParallelGroup,
    *,
    fused: bool = False,
) -> torch.Tensor:
    """Expert outputs -> weighted sum per token [T, H], on the rank that holds the token.

    The sum runs in the promoted type of rows and weights (float32 for bf16 rows) and is cast once. Weights are
    applied here and not at the expert, so their gradient needs no exchange. The shared expert's weight is 1.

    fused: with the kernels room's `weighted_sum`, which makes no [T, C, H] in between.
    """
    if group.world_size > 1:
        rows_NH = _permuted(rows_NH, plan.local_place_N, plan.local_order_N, fused)
        rows_NH = all_to_all_rows(rows_NH, group, plan.send_rows, plan.recv_rows)
    num_tokens, top_k = topk_weights_TK.shape
    if fused and plan.place_R is not None:
        return kernels.weighted_sum(rows_NH, F.pad(topk_weights_TK, (0, plan.copies - top_k), value=1.0), plan.place_R)
    if plan.place_R is None:
        copies_RH = spread_rows(rows_NH, plan.order_R, num_tokens * plan.copies)
    else:
        copies_RH: torch.Tensor = _PermuteRows.apply(rows_NH, plan.place_R, plan.order_R)  # type: ignore[assignment]
    copies_TCH = copies_RH.view(num_tokens, plan.copies, rows_NH.shape[1])
    y_TH = (copies_TCH[:, :top_k] * topk_weights_TK.unsqueeze(-1)).sum(dim=1)
    if plan.copies > top_k:
        y_TH = y_TH + copies_TCH[:, top_k]
    return y_TH.to(rows_NH.dtype)
