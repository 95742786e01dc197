"""Tokens to the ranks that hold their experts, and back.

T local tokens, K experts per token, C copies per token (K, and one more for an external shared expert), R rows, N
tokens received, H hidden size, E experts, D destinations of the EP group (slots of the slot plan, and one per rank
that holds the shared expert).

A token goes to a rank once, however many of its experts are there, with the weights of all its copies; that rank adds
up what its experts make of it, and one row comes back. So a copy travels with the first one of its token that is bound
for the same rank. Sent rows are sorted by rank and token; received ones arrive so from each rank. Numbers of rows come
from the routing and are exchanged before the rows; a rank may have no tokens, a slot no rows, a rank no slots. In a
group of one rank tokens stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from moe_train import kernels
from moe_train.moe.placement import SlotPlan
from moe_train.parallel import ParallelGroup, all_to_all_rows, all_to_all_tables, exchange_numbers


class Destinations:
    """A slot plan as one rank needs it: where the rows of each expert may go.

    per_rank: number of destinations of each rank. table_EC: destination numbers by expert, the first `copies_E` of a
    row; None where every expert lies in one place, in order. shared: destinations of the shared expert, this rank's
    first choice first; None where there is none. rank_D, local_D: of each destination its rank and its number there,
    and -1 behind the last one, so that -1 stays -1.
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
        places = [(rank, local) for rank, number in enumerate(self.per_rank) for local in range(number)]
        self.rank_D, self.local_D = torch.tensor([*places, (-1, -1)], device=device).unbind(1)

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
class Travel:
    """Which tokens go to which rank of a group of several.

    rank: this one's place in the group. place_TC: the row sent for a copy that takes its token along, -1 for the
    others. send_rows, recv_rows: rows per rank of the EP group. copies_sent: how many copies the rows sent carry to
    each.
    """

    rank: int
    place_TC: torch.Tensor
    send_rows: list[int]
    recv_rows: list[int]
    copies_sent: list[int]


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Everything that moving the tokens of one routing needs. Holds no gradient; replayed in recompute.

    copies: C, of the rank that has most: expert choice gives tokens of one rank more experts than those of another.
    travel: None in a group of one rank. maps: of the copies of the N tokens that come together here, by local
    destination; those with experts elsewhere, or that are dropped, are padding there. num_rows: of all local
    destinations. fused: for one of the `KERNEL_BACKENDS`, whose kernels are interpreted on a CPU.
    """

    copies: int
    travel: Travel | None
    maps: kernels.RowMaps
    num_rows: int
    fused: bool = False

    @property
    def rows_per_slot(self) -> torch.Tensor:
        """Rows of each local destination, int64 on the device."""
        return self.maps.counts_D


@torch.no_grad()
def plan_dispatch(
    topk_ids_TK: torch.Tensor,
    destinations: Destinations,
    group: ParallelGroup,
    *,
    partial: bool = False,
    fused: bool = False,
) -> DispatchPlan:
    """Who goes where. Reads the device once, but not at all for a group of one rank unless copies may be dropped.

    Args:
        partial: ids may be negative, and their copies go nowhere. fused: see `DispatchPlan`.
    """
    goal_TC = destinations.of(topk_ids_TK).contiguous()
    if partial:  # another width at every step, perhaps, for which kernels would be compiled anew
        goal_TC = _widened(goal_TC.clamp(min=-1), 1 << (goal_TC.shape[1] - 1).bit_length())
    slots = destinations.per_rank[group.rank_in_group]
    if group.world_size == 1:
        maps = kernels.row_maps(goal_TC.view(-1), slots, fused)
        rows, travel = int(maps.counts_D.sum()) if partial else goal_TC.numel(), None
    else:
        travel, local_RC, rows = _travel(goal_TC, destinations, group, fused)
        goal_TC = all_to_all_rows(local_RC, group, travel.recv_rows, travel.send_rows).long()
        maps = kernels.row_maps(goal_TC.view(-1), slots, fused)
    if rows < goal_TC.numel():  # a copy, which does not keep what is cut off
        maps = replace(maps, order_R=maps.order_R[:rows].clone())
    return DispatchPlan(copies=goal_TC.shape[1], travel=travel, maps=maps, num_rows=rows, fused=fused)


def _widened(goal_TC: torch.Tensor, width: int) -> torch.Tensor:
    """With copies that go nowhere."""
    return F.pad(goal_TC, (0, width - goal_TC.shape[1]), value=-1)


def _travel(
    goal_TC: torch.Tensor, destinations: Destinations, group: ParallelGroup, fused: bool
) -> tuple[Travel, torch.Tensor, int]:
    """The travel; of each row sent its copies' numbers on the rank it goes to, int32 [R, C of the rank that has most],
    -1 for copies bound elsewhere; and how many copies come here."""
    tokens, copies = goal_TC.shape
    rank_TC, local_TC = destinations.rank_D[goal_TC], destinations.local_D[goal_TC]
    same_TCC = rank_TC.unsqueeze(2) == rank_TC.unsqueeze(1)
    first_TC = torch.where(same_TCC.tril(-1).any(dim=2), -1, rank_TC)
    maps = kernels.row_maps(first_TC.view(-1), group.world_size, fused)
    order_R = maps.order_R[: tokens * min(copies, group.world_size)]  # as many at most: sizes are not known yet
    token_R = order_R // copies
    here_RC = rank_TC[token_R] == first_TC.view(-1)[order_R].unsqueeze(1)
    local_RC = torch.where(here_RC, local_TC[token_R], -1).to(torch.int32)
    ranks_W = torch.arange(group.world_size, device=goal_TC.device)
    copies_W = (rank_TC.view(-1, 1) == ranks_W).sum(dim=0)
    sent_W3 = torch.stack([maps.counts_D, copies_W, torch.full_like(copies_W, copies)], dim=1)
    found = torch.cat([sent_W3, exchange_numbers(sent_W3, group)], dim=1).t().tolist()
    send_rows, copies_sent, _, recv_rows, copies_received, widths = found
    travel = Travel(
        rank=group.rank_in_group,
        place_TC=maps.place_R.view(tokens, copies),
        send_rows=send_rows,
        recv_rows=recv_rows,
        copies_sent=copies_sent,
    )
    return travel, _widened(local_RC[: sum(send_rows)], max(widths)), sum(copies_received)


def count_ids(ids: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0..size-1 occurs, int64 [size]."""
    flat = ids.reshape(-1)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def dispatch(
    x_TH: torch.Tensor, topk_weights_TK: torch.Tensor, plan: DispatchPlan, group: ParallelGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local tokens and their weights -> the tokens that local experts see [N, H], and the weights of their copies
    [N, C]. The shared expert's weight is 1.

    Both must take part in the output on every rank: their gradients come back by an exchange of all.
    """
    more = plan.copies - topk_weights_TK.shape[1]
    weights_TC = F.pad(topk_weights_TK, (0, more), value=1.0) if more else topk_weights_TK
    if plan.travel is None:
        return x_TH, weights_TC
    travel, rows = plan.travel, sum(plan.travel.send_rows)
    sent = [kernels.copy_tokens(each, travel.place_TC, rows, plan.fused) for each in (x_TH, weights_TC)]
    x_NH, weights_NC = all_to_all_tables(sent, group, travel.recv_rows, travel.send_rows)
    return x_NH, weights_NC


def by_expert(
    x_NH: torch.Tensor,
    weights_NC: torch.Tensor,
    plan: DispatchPlan,
    experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What local experts make of tokens, weighted and summed [N, H]: in float32 at least, and rounded once.

    Args:
        experts: (rows sorted by local destination, how many each has) -> as many rows.
    """
    place_NC = plan.maps.place_R.view(weights_NC.shape)
    rows_RH = kernels.copy_tokens(x_NH, place_NC, plan.num_rows, False)
    return kernels.sum_copies(experts(rows_RH, plan.rows_per_slot), place_NC, weights_NC, False)


def combine(y_NH: torch.Tensor, plan: DispatchPlan, group: ParallelGroup) -> torch.Tensor:
    """What the experts of each rank made of a token -> their sum [T, H], on the rank that holds the token.

    Parts come rounded to the type of the rows; they are added in float32 at least, and rounded once more.
    """
    if plan.travel is None:
        return y_NH
    rows_RH = all_to_all_rows(y_NH, group, plan.travel.send_rows, plan.travel.recv_rows)
    return kernels.sum_copies(rows_RH, plan.travel.place_TC, interpret=plan.fused)
