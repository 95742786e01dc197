"""Collectives with a gradient. Each names its adjoint; at group size 1 each is the identity and issues nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from moe_train.parallel.groups import ParallelGroup


class _AllToAllRows(torch.autograd.Function):
    """One node for all tables: its adjoint exchanges them in one order, whatever a rank computed between."""

    @staticmethod
    def forward(ctx, group, outputs, inputs, *tensors):
        ctx.group, ctx.outputs, ctx.inputs = group, outputs, inputs
        return tuple(_exchange(each, group, outputs, inputs) for each in tensors)

    @staticmethod
    def backward(ctx, *grads):
        wanted = zip(grads, ctx.needs_input_grad[3:], strict=True)
        back = (ctx.group, ctx.inputs, ctx.outputs)
        return None, None, None, *(_exchange(each, *back) if needed else None for each, needed in wanted)


def _exchange(x_RH: torch.Tensor, group: ParallelGroup, outputs: Sequence[int], inputs: Sequence[int]) -> torch.Tensor:
    received = x_RH.new_empty((sum(outputs), *x_RH.shape[1:]))
    dist.all_to_all_single(received, x_RH.contiguous(), list(outputs), list(inputs), group=group.process_group)
    return received


def all_to_all_rows(
    x_RH: torch.Tensor, group: ParallelGroup, output_split_sizes: Sequence[int], input_split_sizes: Sequence[int]
) -> torch.Tensor:
    """`all_to_all_tables` of one."""
    return all_to_all_tables((x_RH,), group, output_split_sizes, input_split_sizes)[0]


def all_to_all_tables(
    tables: Sequence[torch.Tensor],
    group: ParallelGroup,
    output_split_sizes: Sequence[int],
    input_split_sizes: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    """Send consecutive blocks of rows, one to each rank; receive one from each, in rank order.

    Adjoint: the same exchange with the two lists swapped, of all tables once the last gradient is there.

    Args:
        tables: [sum(input_split_sizes), ...] each; row by row they belong together.
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
    for table in tables:
        if sum(input_split_sizes) != table.shape[0]:
            raise ValueError(
                f"input split sizes {list(input_split_sizes)} do not add up to the {table.shape[0]} rows given"
            )
    if group.world_size == 1:
        return tuple(tables)
    return _AllToAllRows.apply(group, tuple(output_split_sizes), tuple(input_split_sizes), *tables)  # type: ignore[return-value]


def exchange_numbers(numbers_WX: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """Row w to rank w; returns what each rank had for this one [W, X]. Integers: no gradient."""
    if group.world_size == 1:
        return numbers_WX
    numbers_WX = numbers_WX.contiguous()
    received_WX = torch.empty_like(numbers_WX)
    dist.all_to_all_single(received_WX, numbers_WX, group=group.process_group)
    return received_WX


# ---- tokens and partial sums. The adjoint depends on whether the consumer's gradient is replicated or partial, so
# each collective comes under two names and none is a default.


class _ReducePartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return group.all_reduce_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return ctx.group.all_reduce_(grads[0].clone(memory_format=torch.contiguous_format)), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, counts, partial):
        ctx.group, ctx.counts, ctx.partial = group, counts, partial
        return _gather(x, group, counts)

    @staticmethod
    def backward(ctx, *grads):
        if ctx.partial:
            return _scatter(grads[0], ctx.group, ctx.counts), None, None, None
        return grads[0].split(ctx.counts)[ctx.group.rank_in_group], None, None, None


class _SliceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, counts):
        ctx.group, ctx.counts = group, counts
        return x.split(counts)[group.rank_in_group].clone()

    @staticmethod
    def backward(ctx, *grads):
        return _gather(grads[0], ctx.group, ctx.counts), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, counts):
        ctx.group, ctx.counts = group, counts
        return _scatter(x, group, counts)

    @staticmethod
    def backward(ctx, *grads):
        return _gather(grads[0], ctx.group, ctx.counts), None, None


def _gather(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    """Rows of all ranks in order; the blocks travel padded to the longest one."""
    longest = max(counts)
    if not longest:
        return x.contiguous()
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: x.shape[0]] = x
    full = x.new_empty(group.world_size, *padded.shape)
    group.all_gather_(full.view(-1), padded.view(-1))
    if min(counts) == longest:
        return full.flatten(0, 1)
    return torch.cat([block[:count] for block, count in zip(full, counts, strict=True)])


def _scatter(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    longest, rank = max(counts), group.rank_in_group
    if not longest:
        return x.contiguous()
    padded = x.new_zeros(group.world_size, longest, *x.shape[1:])
    for block, rows in zip(padded, x.split(list(counts)), strict=True):
        block[: rows.shape[0]] = rows
    return group.reduce_scatter(padded.view(-1)).view(longest, *x.shape[1:])[: counts[rank]]


def reduce_partial(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """Sum of the ranks' partial results. Adjoint: identity (everybody goes on with the same sum)."""
    return x if group.world_size == 1 else _ReducePartial.apply(x, group)  # type: ignore[return-value]


def copy_to(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """The identity, where each rank goes on to a different part of the work. Adjoint: sum of the partial gradients."""
    return x if group.world_size == 1 else _CopyTo.apply(x, group)  # type: ignore[return-value]


def gather_rows(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    """Rows [counts[rank], ...] of all ranks -> [sum(counts), ...]. Adjoint: slice (the gradient is replicated)."""
    _check_counts(x, group, counts, whole=False)
    return x if group.world_size == 1 else _GatherRows.apply(x, group, list(counts), False)  # type: ignore[return-value]


def gather_rows_partial(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    """As `gather_rows`. Adjoint: reduce_scatter (each rank's gradient is a part of the sum)."""
    _check_counts(x, group, counts, whole=False)
    return x if group.world_size == 1 else _GatherRows.apply(x, group, list(counts), True)  # type: ignore[return-value]


def slice_rows(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    """Replicated rows [sum(counts), ...] -> this rank's block. Adjoint: all_gather."""
    _check_counts(x, group, counts, whole=True)
    return x if group.world_size == 1 else _SliceRows.apply(x, group, list(counts))  # type: ignore[return-value]


def scatter_rows(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int]) -> torch.Tensor:
    """Partial sums [sum(counts), ...] -> this rank's block of the sum (reduce_scatter). Adjoint: all_gather."""
    _check_counts(x, group, counts, whole=True)
    return x if group.world_size == 1 else _ScatterRows.apply(x, group, list(counts))  # type: ignore[return-value]


def _check_counts(x: torch.Tensor, group: ParallelGroup, counts: Sequence[int], whole: bool) -> None:
    """`x` must hold all of the rows, or this rank's block."""
    fits = len(counts) == group.world_size and min(counts) >= 0
    if not fits or x.shape[0] != (sum(counts) if whole else counts[group.rank_in_group]):
        raise ValueError(
            f"row counts {list(counts)} do not fit {x.shape[0]} rows on rank {group.rank_in_group} of a group of "
            f"{group.world_size}"
        )


# ---- the last dimension, in equal parts: dense layers of which each rank computes some of the outputs


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather_last(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _own_columns(grads[0], ctx.group), None


class _SliceColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _own_columns(x, group)

    @staticmethod
    def backward(ctx, *grads):
        return _gather_last(grads[0], ctx.group), None


def _gather_last(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    full = x.new_empty(group.world_size, *x.shape)
    group.all_gather_(full.view(-1), x.contiguous().view(-1))
    return torch.cat(tuple(full), -1)  # never a view: whoever gets it may write to it


def _own_columns(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    width = x.shape[-1] // group.world_size
    part = x.narrow(-1, group.rank_in_group * width, width)
    return part.clone(memory_format=torch.contiguous_format)


def gather_columns(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """[..., N / world_size] -> [..., N], in rank order. Adjoint: slice (the gradient is replicated)."""
    return x if group.world_size == 1 else _GatherColumns.apply(x, group)  # type: ignore[return-value]


def slice_columns(x: torch.Tensor, group: ParallelGroup) -> torch.Tensor:
    """Replicated [..., N] -> this rank's [..., N / world_size]. Adjoint: all_gather."""
    if x.shape[-1] % group.world_size:
        raise ValueError(f"{x.shape[-1]} columns cannot be shared out evenly over {group.world_size} ranks")
    return x if group.world_size == 1 else _SliceColumns.apply(x, group)  # type: ignore[return-value]


def even_counts(num_rows: int, group: ParallelGroup) -> list[int]:
    """How `num_rows` are shared out: blocks of ceil(rows / ranks), the last ones shorter or empty."""
    block = -(-num_rows // group.world_size)
    return [max(min(block, num_rows - rank * block), 0) for rank in range(group.world_size)]


def exchange_sizes(num_rows: int, group: ParallelGroup) -> list[int]:
    """How many rows each rank of the group has. Reads the device once on a GPU."""
    if group.world_size == 1:
        return [num_rows]
    device = torch.device("cuda", torch.cuda.current_device()) if group.on_gpu else torch.device("cpu")
    sizes = torch.empty(group.world_size, dtype=torch.int64, device=device)
    group.all_gather_(sizes, torch.tensor([num_rows], dtype=torch.int64, device=device))
    return sizes.tolist()


class PendingSum:
    """A sum over ranks under way (`start_reduce`); `wait` gives it to the graph."""

    def __init__(self):
        self.work: dist.Work | None = None


class _StartReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, pending):
        total = x.clone(memory_format=torch.contiguous_format)
        pending.work = dist.all_reduce(total, group=group.process_group, async_op=True)
        return total

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pending):
        pending.work.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def start_reduce(x: torch.Tensor, group: ParallelGroup) -> tuple[torch.Tensor, PendingSum]:
    """`reduce_partial` that does not wait: the tensor must not be read before `finish_reduce`."""
    pending = PendingSum()
    if group.world_size == 1:
        return x, pending
    return _StartReduce.apply(x, group, pending), pending  # type: ignore[return-value]


def finish_reduce(x: torch.Tensor, pending: PendingSum) -> torch.Tensor:
    return x if pending.work is None else _Wait.apply(x, pending)  # type: ignore[return-value]
