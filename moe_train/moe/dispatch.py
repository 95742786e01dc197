"""Tokens to the ranks that hold their experts, and back.

T local tokens, K experts per token, R = T * K copies ("assignments"), N rows received, H hidden size, E experts.

A copy is identified by its flat position t * K + k. Sent rows are sorted by logical expert (stable), so the
blocks for the ranks of the EP group are consecutive; received rows arrive [source][expert] and are put in
[expert][source] order, which is what a grouped GEMM wants. Counts come from the routing and are exchanged
before the rows; a rank may have no tokens, an expert no rows, a rank no experts.
"""

from dataclasses import dataclass

import torch

from moe_train.moe.placement import Placement
from moe_train.parallel import ParallelGroup, all_to_all_rows, exchange_counts


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Everything that moving the rows of one routing needs. Holds no gradient; replayed in recompute.

    order_R: flat position of the copy that each sent row is. place_R: its inverse.
    send_rows, recv_rows: rows per rank of the EP group (empty lists at EP 1).
    local_order_N, local_place_N: [source][expert] -> [expert][source] and back (None where they are the same).
    counts_E: rows of this rank's tokens per logical expert, int64.
    rows_per_expert: rows of each local expert, int64 on the device.
    """

    top_k: int
    order_R: torch.Tensor
    place_R: torch.Tensor
    send_rows: list[int]
    recv_rows: list[int]
    local_order_N: torch.Tensor | None
    local_place_N: torch.Tensor | None
    counts_E: torch.Tensor
    rows_per_expert: torch.Tensor


@torch.no_grad()
def plan_dispatch(topk_ids_TK: torch.Tensor, placement: Placement, group: ParallelGroup) -> DispatchPlan:
    """Sort the copies and exchange their counts. Reads the device once when the group has more than one rank."""
    flat_ids = topk_ids_TK.reshape(-1)
    order_R = torch.argsort(flat_ids, stable=True)
    place_R = _inverse(order_R)
    counts_E = flat_ids.new_zeros(placement.num_experts).scatter_add_(0, flat_ids, torch.ones_like(flat_ids))
    experts_per_rank = placement.experts_per_rank
    received = exchange_counts(counts_E, group, experts_per_rank)
    send_rows: list[int] = []
    recv_rows: list[int] = []
    local_order = local_place = None
    if group.world_size > 1:
        owner_E = torch.repeat_interleave(
            torch.arange(group.world_size), torch.tensor(experts_per_rank), output_size=placement.num_experts
        ).to(counts_E.device)
        to_rank = counts_E.new_zeros(group.world_size).scatter_add_(0, owner_E, counts_E)
        both = torch.stack([to_rank, received.sum(dim=1)]).tolist()
        send_rows, recv_rows = both
        local_order, local_place = _expert_major(received, sum(recv_rows))
    return DispatchPlan(
        top_k=topk_ids_TK.shape[1],
        order_R=order_R,
        place_R=place_R,
        send_rows=send_rows,
        recv_rows=recv_rows,
        local_order_N=local_order,
        local_place_N=local_place,
        counts_E=counts_E,
        rows_per_expert=received.sum(dim=0),
    )


def _expert_major(received: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Permutation of received rows from [source][expert] to [expert][source], and its inverse."""
    sources, experts = received.shape
    expert_of_block = torch.arange(experts, device=received.device).repeat(sources)
    expert_of_row = torch.repeat_interleave(expert_of_block, received.reshape(-1), output_size=num_rows)
    order = torch.argsort(expert_of_row, stable=True)
    return order, _inverse(order)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return place


class _CopyTokens(torch.autograd.Function):
    """x [T, H] -> the sent rows [R, H]; adjoint: put back in place, sum over the K copies of a token."""

    @staticmethod
    def forward(ctx, x_TH, order_R, place_R, top_k):
        ctx.save_for_backward(place_R)
        ctx.shape = (x_TH.shape[0], top_k, x_TH.shape[1])
        return x_TH[order_R // top_k]

    @staticmethod
    def backward(ctx, *grads):
        (place_R,) = ctx.saved_tensors
        return grads[0][place_R].view(ctx.shape).sum(dim=1), None, None, None


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


def dispatch(x_TH: torch.Tensor, plan: DispatchPlan, group: ParallelGroup) -> torch.Tensor:
    """Local tokens -> rows for the local experts, sorted by expert [N, H]."""
    rows: torch.Tensor = _CopyTokens.apply(x_TH, plan.order_R, plan.place_R, plan.top_k)  # type: ignore[assignment]
    if group.world_size == 1:
        return rows
    rows = all_to_all_rows(rows, group, plan.recv_rows, plan.send_rows)
    return _PermuteRows.apply(rows, plan.local_order_N, plan.local_place_N)  # type: ignore[return-value]


def combine(
    rows_NH: torch.Tensor, topk_weights_TK: torch.Tensor, plan: DispatchPlan, group: ParallelGroup
) -> torch.Tensor:
    """Expert outputs -> weighted sum per token [T, H], on the rank that holds the token.

    The sum runs in the promoted type of rows and weights (float32 for bf16 rows) and is cast once. Weights are
    applied here and not at the expert, so their gradient needs no exchange.
    """
    if group.world_size > 1:
        rows_NH = _PermuteRows.apply(rows_NH, plan.local_place_N, plan.local_order_N)  # type: ignore[assignment]
        rows_NH = all_to_all_rows(rows_NH, group, plan.send_rows, plan.recv_rows)
    copies_RH: torch.Tensor = _PermuteRows.apply(rows_NH, plan.place_R, plan.order_R)  # type: ignore[assignment]
    copies_TKH = copies_RH.view(*topk_weights_TK.shape, rows_NH.shape[1])
    return (copies_TKH * topk_weights_TK.unsqueeze(-1)).sum(dim=1).to(rows_NH.dtype)
