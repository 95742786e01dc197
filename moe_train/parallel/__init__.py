"""Ranks, groups and collectives: the only room that imports torch.distributed."""

from moe_train.parallel.collectives import (
    all_to_all_rows,
    copy_to,
    even_counts,
    exchange_counts,
    exchange_sizes,
    finish_reduce,
    gather_rows,
    gather_rows_partial,
    reduce_partial,
    scatter_rows,
    slice_rows,
    start_reduce,
)
from moe_train.parallel.groups import (
    Groups,
    ParallelGroup,
    Ranks,
    build_groups,
    close_process_group,
    init_process_group,
    raise_together,
    subgroup,
)
from moe_train.parallel.topology import Topology, resolve_topology

__all__ = [
    "Groups",
    "ParallelGroup",
    "Ranks",
    "Topology",
    "all_to_all_rows",
    "build_groups",
    "close_process_group",
    "copy_to",
    "even_counts",
    "exchange_counts",
    "exchange_sizes",
    "finish_reduce",
    "gather_rows",
    "gather_rows_partial",
    "init_process_group",
    "raise_together",
    "reduce_partial",
    "resolve_topology",
    "scatter_rows",
    "slice_rows",
    "start_reduce",
    "subgroup",
]
