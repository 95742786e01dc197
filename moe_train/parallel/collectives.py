"""Collectives with a gradient. Each names its adjoint; at group size 1 each is the identity and issues nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_train.parallel.groups import ParallelGroup


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RH, group, output_split_sizes, input_split_sizes):
        ctx.group, ctx.output_split_sizes, ctx.input_split_sizes = group, output_split_sizes, input_split_sizes
        return _exchange(x_RH, group, output_split_sizes, input_split_sizes)

    @staticmethod
    def backward(ctx, *grads):
        return _exchange(grads[0], ctx.group, ctx.input_split_sizes, ctx.output_split_sizes), None, None, None


def _exchange(x_RH: torch.Tensor, group: ParallelGroup, outputs: Sequence[int], inputs: Sequence[int]) -> torch.Tensor:
    received = x_RH.new_empty((sum(outputs), *x_RH.shape[1:]))
    dist.all_to_all_single(received, x_RH.contiguous(), list(outputs), list(inputs), group=group.process_group)
    return received


def all_to_all_rows(
    x_RH: torch.Tensor, group: ParallelGroup, output_split_sizes: Sequence[int], input_split_sizes: Sequence[int]
) -> torch.Tensor:
    """Send consecutive blocks of rows, one to each rank; receive one from each, in rank order.

    Adjoint: the same exchange with the two lists swapped.

    Args:
        x_RH: rows [sum(input_split_sizes), ...].
        output_split_sizes: rows to receive from each rank, as those ranks announced them.
        input_split_sizes: rows to send to each rank.

    Raises:
        ValueError: a list that does not fit the group or the rows; raised before anything is sent,
            because gloo answers a mismatch with uninitialised memory and NCCL with a hang.
    """
    if len(input_split_sizes) != group.world_size or len(output_split_sizes) != group.world_size:
        raise ValueError(
            f"split sizes must name {group.world_size} ranks: "
            f"input {list(input_split_sizes)}, output {list(output_split_sizes)}"
        )
    if sum(input_split_sizes) != x_RH.shape[0]:
        raise ValueError(f"input split sizes {list(input_split_sizes)} do not add up to the {x_RH.shape[0]} rows given")
    if group.world_size == 1:
        return x_RH
    return _AllToAllRows.apply(x_RH, group, tuple(output_split_sizes), tuple(input_split_sizes))  # type: ignore[return-value]


def exchange_counts(counts_E: torch.Tensor, group: ParallelGroup, experts_per_rank: Sequence[int]) -> torch.Tensor:
    """Tell every rank how many rows it will get for each of its experts. Integers: no gradient.

    Args:
        counts_E: rows this rank sends to each logical expert, int64, experts in rank order.
        experts_per_rank: how many experts each rank of the group holds (they may differ, or be 0).

    Returns:
        [world_size, local experts]: entry (r, i) is what rank r sends to local expert i.
    """
    local = experts_per_rank[group.rank_in_group]
    if group.world_size == 1:
        return counts_E.view(1, local)
    received = counts_E.new_empty(group.world_size * local)
    dist.all_to_all_single(
        received, counts_E, [local] * group.world_size, list(experts_per_rank), group=group.process_group
    )
    return received.view(group.world_size, local)
