"""Ranks, groups and collectives: the only room that imports torch.distributed."""

from moe_train.parallel.collectives import all_to_all_rows, exchange_counts
from moe_train.parallel.groups import (
    Groups,
    ParallelGroup,
    Ranks,
    build_groups,
    close_process_group,
    init_process_group,
    raise_together,
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
    "exchange_counts",
    "init_process_group",
    "raise_together",
    "resolve_topology",
]
