"""Which experts to hold redundantly, and where: loads -> SlotPlan. Pure Python, the same plan on every rank.

Homes do not move, so a plan is a choice for the redundant slots alone. Three steps:

1. How many copies: the next one goes to the expert with the most rows per copy, as in DeepSeek's EPLB.
2. Where: the copy with the most rows first, on the rank with the fewest rows so far. Where nodes are known, a node
   without a copy comes first, because dispatch stays on a node that has one.
3. Better: while some exchange takes rows off the most loaded rank, the best one is made: two copies change places, or
   a slot gets another expert. Homes are contiguous, so the most loaded rank is often one of several middling experts
   that step 1, which looks at one expert at a time, never copies.

A rank never holds an expert twice. A copy that fits on no rank with a free slot moves others along (`_Slots.place`);
step 1 takes only copies that can all be placed together, so a plan is found whenever there is one.

Every slot is used, also where all ranks were alike without copies: 4 experts alike on 2 ranks are 2 and 2 rows, and
with one copy 2.5 and 1.5. Copies pay where loads differ, or where they fill ranks to the same number of slots.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe_train.errors import TopologyError
from moe_train.moe.placement import SlotPlan, assign_experts, check_counts

ROUNDING = 1e-9
"""Relative differences below this are none, so that the search for better plans ends."""

GOOD_ENOUGH = 1.01
"""A most loaded rank this close to the mean is not improved further: the next loads differ by more."""

MOST_TRIALS = 60_000
"""Exchanges tried per plan, about a second. Counted and not timed, so that every rank stops at the same plan."""


def plan_slots(
    num_experts: int,
    world_size: int,
    shared_ranks: int = 0,
    redundant: int = 0,
    loads: Sequence[float] | None = None,
    ranks_per_node: int | None = None,
) -> SlotPlan:
    """A plan for R copies that keeps the most loaded rank's rows low.

    Args:
        loads: rows per logical expert, over all ranks of the group; None: all alike.
        ranks_per_node: given, dispatch is taken to send to copies on the source's node first.

    Raises:
        TopologyError: counts for which no plan exists, loads that are none.
    """
    check_counts(num_experts, world_size, shared_ranks, redundant)
    loads_E = _checked_loads(num_experts, loads)
    empty = SlotPlan(num_experts, world_size, shared_ranks)
    if not redundant:
        return empty
    routed = world_size - shared_ranks
    free = [0] * shared_ranks
    for place, (_, home) in enumerate(empty.homes[shared_ranks:]):
        free.append(assign_experts(num_experts + redundant, routed, place)[1] - home)
    traffic = _Traffic(loads_E, world_size, ranks_per_node)
    copies = _copies_per_expert(_Slots(empty, free, loads_E), loads_E)
    rows = [load / (count + 1) for load, count in zip(loads_E, copies, strict=True)]
    slots = _Slots(empty, free, rows)
    _place_heaviest_first(slots, copies, traffic)
    _improve(slots, traffic)
    replicas = tuple(tuple(sorted(experts)) for experts in slots.redundant)
    return SlotPlan(num_experts, world_size, shared_ranks, replicas)


def rank_loads(plan: SlotPlan, loads: Sequence[float], ranks_per_node: int | None = None) -> list[float]:
    """Expected rows per rank of the EP group, if every source sends alike and spreads over the copies it may reach."""
    traffic = _Traffic(_checked_loads(plan.num_experts, loads), plan.world_size, ranks_per_node)
    return traffic.rank_loads([plan.replica_ranks(expert) for expert in range(plan.num_experts)])


@functools.lru_cache(maxsize=512)
def rank_shares(plan: SlotPlan, ranks_per_node: int | None = None) -> np.ndarray:
    """The part of each expert's rows that each rank gets [E, W]: `rank_loads` are the loads times it."""
    traffic = _Traffic([1.0] * plan.num_experts, plan.world_size, ranks_per_node)
    shares_EW = np.zeros((plan.num_experts, plan.world_size))
    for expert in range(plan.num_experts):
        for rank, rows in traffic.rows(expert, plan.replica_ranks(expert)).items():
            shares_EW[expert, rank] = rows
    return shares_EW


def _checked_loads(num_experts: int, loads: Sequence[float] | None) -> list[float]:
    if loads is None:
        return [1.0] * num_experts
    values = [float(load) for load in loads]
    if len(values) != num_experts:
        raise TopologyError(
            f"parallel.redundant_experts: {len(values)} loads do not fit {num_experts} experts: give one per expert"
        )
    for expert, load in enumerate(values):
        if not (math.isfinite(load) and load >= 0):
            raise TopologyError(
                f"parallel.redundant_experts: the load of expert {expert} ({load}) must be finite and at least 0: "
                "count the rows again"
            )
    return values


class _Traffic:
    """Loads and nodes -> the rows that each holder of an expert gets."""

    def __init__(self, loads: list[float], world_size: int, ranks_per_node: int | None):
        if ranks_per_node is not None and ranks_per_node < 1:
            raise ValueError(f"ranks_per_node ({ranks_per_node}) must be at least 1")
        self.loads = loads
        self.world_size = world_size
        self.by_node = ranks_per_node is not None
        self.node_of = [rank // ranks_per_node if ranks_per_node else 0 for rank in range(world_size)]
        ranks_on = Counter(self.node_of)
        self.node_part = {node: count / world_size for node, count in ranks_on.items()}

    def rows(self, expert: int, holders: Sequence[int]) -> dict[int, float]:
        """Rows of an expert on each rank that holds it."""
        load = self.loads[expert]
        if not self.by_node:
            return dict.fromkeys(holders, load / len(holders))
        on_node = Counter(self.node_of[rank] for rank in holders)
        far = (1 - sum(self.node_part[node] for node in on_node)) / len(holders)
        near = {node: self.node_part[node] / count for node, count in on_node.items()}
        return {rank: load * (near[self.node_of[rank]] + far) for rank in holders}

    def rank_loads(self, holders: Sequence[Sequence[int]]) -> list[float]:
        total = [0.0] * self.world_size
        for expert, ranks in enumerate(holders):
            for rank, rows in self.rows(expert, ranks).items():
                total[rank] += rows
        return total


class _Slots:
    """Redundant slots while they are being filled.

    holders[e]: ranks with expert e, home first. redundant[r]: copies on rank r. free[r]: slots left on rank r.
    rows[e]: what a copy of expert e counts for. load[r]: the sum over rank r, homes included.
    """

    def __init__(self, empty: SlotPlan, free: list[int], rows: list[float]):
        self.holders = [[empty.owner(expert)] for expert in range(empty.num_experts)]
        self.redundant: list[list[int]] = [[] for _ in range(empty.world_size)]
        self.routed_ranks = empty.world_size - empty.shared_ranks
        self.free = list(free)
        self.width = list(free)
        self.rows = rows
        self.load = [sum(rows[first : first + count]) for first, count in empty.homes]

    def put(self, expert: int, rank: int) -> None:
        self.holders[expert].append(rank)
        self.redundant[rank].append(expert)
        self.free[rank] -= 1
        self.load[rank] += self.rows[expert]

    def take(self, expert: int, rank: int) -> None:
        self.holders[expert].remove(rank)
        self.redundant[rank].remove(expert)
        self.free[rank] += 1
        self.load[rank] -= self.rows[expert]

    def place(self, expert: int, key: Callable[[int], tuple]) -> bool:
        """Put one more copy somewhere: on the free rank with the lowest key, or where others can make room.

        Without a free rank that lacks the expert, the shortest chain is searched: the copy goes to a full rank, a copy
        from there to another one, and so on until one has a free slot. False if there is no chain; then there is
        none later either, whatever else is placed (the sets of copies that fit together form a matroid).
        """
        ranks = [rank for rank, free in enumerate(self.free) if free and rank not in self.holders[expert]]
        if ranks:
            self.put(expert, min(ranks, key=key))
            return True
        came: dict[int, tuple[int, int | None]] = {}  # rank -> (expert that moves there, from which rank)
        queue: list[tuple[int, int | None]] = [(expert, None)]
        for moving, source in queue:
            for rank, width in enumerate(self.width):
                if not width or rank in came or rank in self.holders[moving]:
                    continue
                came[rank] = (moving, source)
                if self.free[rank]:
                    self._move_along(rank, came)
                    return True
                queue += [(copy, rank) for copy in self.redundant[rank]]
        return False

    def _move_along(self, rank: int, came: dict[int, tuple[int, int | None]]) -> None:
        at: int | None = rank
        while at is not None:
            moving, source = came[at]
            if source is not None:
                self.take(moving, source)
            self.put(moving, at)
            at = source


def _copies_per_expert(slots: _Slots, loads: list[float]) -> list[int]:
    """Copies beside the home of each expert. The next one goes to the most rows per copy.

    Among equals to the fewest copies, then to the home rank with the most rows, then to the lowest number: equal loads
    take the copies from all ranks in turn.
    """
    copies = [0] * len(loads)
    home = [holders[0] for holders in slots.holders]
    home_load = list(slots.load)
    open_experts = set(range(len(loads)))
    for _ in range(sum(slots.free)):
        while True:
            expert = min(open_experts, key=lambda e: (-loads[e] / (copies[e] + 1), copies[e], -home_load[home[e]], e))
            if slots.place(expert, key=lambda rank: (-slots.free[rank], rank)):
                break
            open_experts.remove(expert)
        copies[expert] += 1
        home_load[home[expert]] -= loads[expert] / copies[expert] / (copies[expert] + 1)
    return copies


def _place_heaviest_first(slots: _Slots, copies: list[int], traffic: _Traffic) -> None:
    """Every copy on a rank, those with the most rows first: on a new node where there is one, then the least loaded."""
    for expert in sorted(range(len(copies)), key=lambda e: (-slots.rows[e], e)):
        for _ in range(copies[expert]):
            nodes = {traffic.node_of[rank] for rank in slots.holders[expert]} if traffic.by_node else set()
            slots.place(expert, key=lambda rank, nodes=nodes: (traffic.node_of[rank] in nodes, slots.load[rank], rank))


Turn = tuple[int, int, int]
"""(rank, expert that leaves a redundant slot there, expert that takes it)."""


def _improve(slots: _Slots, traffic: _Traffic) -> None:
    """Exchange copies while that takes rows off the most loaded rank, the best exchange first.

    Every exchange leaves fewer ranks at the highest load, or a lower one, so the search ends.
    """
    load = traffic.rank_loads(slots.holders)
    enough = GOOD_ENOUGH * sum(load) / slots.routed_ranks
    trials = 0
    while trials < MOST_TRIALS:
        worst = max(range(len(load)), key=lambda rank: (load[rank], -rank))
        if load[worst] <= enough:
            return
        best: tuple[Turn, ...] = ()
        best_delta: dict[int, float] = {}
        lowest = load[worst] * (1 - ROUNDING)
        for turns in _exchanges(slots, worst):
            trials += 1
            delta = _effect(slots, traffic, turns)
            highest = max(load[rank] + more for rank, more in delta.items())
            if highest < lowest:
                best, best_delta, lowest = turns, delta, highest
        if not best:
            return
        for rank, old, new in best:
            slots.take(old, rank)
            slots.put(new, rank)
        for rank, more in best_delta.items():
            load[rank] += more


def _exchanges(slots: _Slots, worst: int) -> Iterator[tuple[Turn, ...]]:
    """Every exchange of copies that can take rows off a rank."""
    here = [expert for expert, ranks in enumerate(slots.holders) if worst in ranks]
    for old in slots.redundant[worst]:
        yield from (((worst, old, new),) for new in range(len(slots.holders)) if worst not in slots.holders[new])
    for rank, experts in enumerate(slots.redundant):
        if rank == worst:
            continue
        for old in experts:
            for new in here:
                if rank not in slots.holders[new]:
                    yield ((rank, old, new),)
            if worst not in slots.holders[old]:
                for given in slots.redundant[worst]:
                    if rank not in slots.holders[given]:
                        yield (rank, old, given), (worst, given, old)


def _effect(slots: _Slots, traffic: _Traffic, turns: tuple[Turn, ...]) -> dict[int, float]:
    """Rows that an exchange adds to each rank that it concerns."""
    after: dict[int, list[int]] = {}
    for rank, old, new in turns:
        after[old] = [other for other in after.get(old, slots.holders[old]) if other != rank]
        after[new] = [*after.get(new, slots.holders[new]), rank]
    delta: dict[int, float] = {}
    for expert, ranks in after.items():
        for rank, rows in traffic.rows(expert, slots.holders[expert]).items():
            delta[rank] = delta.get(rank, 0.0) - rows
        for rank, rows in traffic.rows(expert, ranks).items():
            delta[rank] = delta.get(rank, 0.0) + rows
    return delta
