"""Logical experts -> slots on the ranks of an EP group. Pure functions, equal on every rank.

With E experts over W ranks, the first S of them kept for the shared expert alone, and R redundant copies:

- every expert has one home: the ranks S..W-1 share the E experts out contiguously;
- a rank holds slots. The redundant ones come first and hold a copy of an expert that has its home elsewhere;
  the home slice follows;
- rows are sent to destinations: numbers over the whole group in rank order, one per slot, and one for the shared
  expert of each of the first S ranks. E + R + S in all.

E=4, W=3, S=1, R=2, copies of expert 3 on rank 1 and of expert 0 on rank 2:

    rank             0        1           2
    slots            shared   3  0  1     0  2  3
    destination      0        1  2  3     4  5  6
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moe_train.errors import TopologyError


def assign_experts(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    """Contiguous slice of a rank: the first `num_experts % world_size` ranks hold one expert more.

    Returns:
        (first expert, number of experts); the number may be 0.

    Raises:
        ValueError: an argument that is no integer or out of range, by name.
    """
    for name, value, low in (("num_experts", num_experts, 0), ("world_size", world_size, 1), ("rank", rank, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} ({value!r}) must be an integer of at least {low}")
    if rank >= world_size:
        raise ValueError(f"rank ({rank}) must be below world_size ({world_size})")
    share, rest = divmod(num_experts, world_size)
    return rank * share + min(rank, rest), share + (rank < rest)


def check_counts(num_experts: int, world_size: int, shared_ranks: int, redundant: int) -> None:
    """Raise `TopologyError` for an S or an R for which no plan exists, and for sizes that are no sizes."""
    for name, value, low in (
        ("the number of experts", num_experts, 0),
        ("parallel.expert", world_size, 1),
        ("parallel.shared_expert_ranks", shared_ranks, 0),
        ("parallel.redundant_experts", redundant, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise TopologyError(f"{name} ({value!r}) must be an integer of at least {low}: correct it")
    if world_size == 1:
        _refuse_without_expert_parallelism("parallel.shared_expert_ranks", shared_ranks)
        _refuse_without_expert_parallelism("parallel.redundant_experts", redundant)
    if shared_ranks >= world_size:
        raise TopologyError(
            f"parallel.shared_expert_ranks ({shared_ranks}) must be below parallel.expert ({world_size}), or no rank "
            f"is left for the routed experts: set at most {world_size - 1} or raise parallel.expert"
        )
    most = num_experts * (world_size - shared_ranks - 1)
    if redundant > most:
        raise TopologyError(
            f"parallel.redundant_experts ({redundant}) exceeds {most}: no rank may hold one of the {num_experts} "
            f"experts twice, and parallel.expert ({world_size}) less parallel.shared_expert_ranks ({shared_ranks}) "
            f"leaves {world_size - shared_ranks} ranks for them: set at most {most}"
        )


def _refuse_without_expert_parallelism(key: str, value: int | str) -> None:
    if value:
        raise TopologyError(
            f"{key} ({value}) needs expert parallelism and parallel.expert is 1: raise parallel.expert or leave "
            f"{key} out"
        )


def default_counts(
    world_size: int, top_k: int, num_experts: int, external_shared: bool, redundant: bool
) -> tuple[int, int]:
    """Shared ranks S and redundant copies R where the recipe says that they are wanted and not how many.

    A token sends K rows to routed experts and one to the shared expert: S is the shared expert's part of the ranks,
    W / (K + 1), rounded up. R fills the routed ranks to the same number of slots where they differ; where they do
    not, and without shared ranks, it is one copy per routed rank, if copies are asked for.

    Raises:
        TopologyError: either is asked for and the EP group is one rank.
    """
    if world_size == 1:
        _refuse_without_expert_parallelism("parallel.shared_expert_ranks", external_shared and "auto")
        _refuse_without_expert_parallelism("parallel.redundant_experts", redundant and "auto")
    if not external_shared:
        return 0, world_size if redundant else 0
    shared = 1 if top_k + 1 > world_size else -(-world_size // (top_k + 1))
    routed = world_size - shared
    copies = routed - num_experts % routed
    return shared, 0 if copies == routed and not redundant else copies


def copies_for(ranks: Sequence[int], source_rank: int, ranks_per_node: int | None) -> list[int]:
    """Of the ranks that hold an expert, those that a source sends to: the ones on its node, if any, or all."""
    if ranks_per_node is None:
        return list(ranks)
    node = source_rank // ranks_per_node
    return [rank for rank in ranks if rank // ranks_per_node == node] or list(ranks)


@dataclass(frozen=True)
class SlotPlan:
    """Which expert each slot of an EP group holds. Hashable; equal plans have equal digests on every rank.

    num_experts: E logical experts. world_size: W ranks of the EP group.
    shared_ranks: S. Ranks 0..S-1 hold the shared expert and no routed expert.
    replicas: per rank of the EP group the experts held redundantly there, in slot order; () for none at all.

    The home rank of an expert owns it: its optimizer state, its copy in a checkpoint, its part of the norm. A
    redundant slot holds a copy of the weights alone, so another plan with the same counts moves weights, never state.
    """

    num_experts: int
    world_size: int
    shared_ranks: int = 0
    replicas: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        replicas = tuple(tuple(experts) for experts in self.replicas)
        redundant = sum(map(len, replicas))
        check_counts(self.num_experts, self.world_size, self.shared_ranks, redundant)
        if len(replicas) not in (0, self.world_size):
            raise TopologyError(
                f"parallel.redundant_experts ({redundant}): a plan for {len(replicas)} ranks does not fit "
                f"parallel.expert ({self.world_size}): plan again for this number of ranks"
            )
        # one spelling of "none", so that equal plans compare, hash and digest equal
        object.__setattr__(self, "replicas", replicas if redundant else ())
        for rank in range(self.world_size if redundant else 0):
            self._check_rank(rank)

    def _check_rank(self, rank: int) -> None:
        copies, held = self.replicas[rank], self.slots(rank)
        start = f"parallel.redundant_experts ({self.num_redundant}): rank {rank} of parallel.expert ({self.world_size})"
        wanted = 0
        if rank >= self.shared_ranks:
            routed = self.world_size - self.shared_ranks
            share = assign_experts(self.num_experts + self.num_redundant, routed, rank - self.shared_ranks)[1]
            wanted = share - self.home(rank)[1]
        if len(copies) != wanted:
            raise TopologyError(
                f"{start} holds {len(copies)} redundant experts instead of {wanted}, with "
                f"parallel.shared_expert_ranks ({self.shared_ranks}): plan again for these sizes"
            )
        for expert in copies:
            if type(expert) is not int or not 0 <= expert < self.num_experts:
                raise TopologyError(
                    f"{start} is to hold expert {expert!r}, and the experts are 0..{self.num_experts - 1}: plan again "
                    "for this model"
                )
            if held.count(expert) > 1:
                raise TopologyError(f"{start} holds expert {expert} twice: a copy belongs on a rank without one")

    @property
    def num_redundant(self) -> int:
        """R, over all ranks."""
        return sum(map(len, self.replicas))

    def home(self, rank: int) -> tuple[int, int]:
        """(first expert, number of experts) that have their home on a rank; (0, 0) on a shared rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank ({rank}) must lie between 0 and {self.world_size - 1}")
        if rank < self.shared_ranks:
            return 0, 0
        return assign_experts(self.num_experts, self.world_size - self.shared_ranks, rank - self.shared_ranks)

    @property
    def homes(self) -> list[tuple[int, int]]:
        """`home` of each rank."""
        return [self.home(rank) for rank in range(self.world_size)]

    def owner(self, expert: int) -> int:
        """The rank that is home of an expert."""
        return self._owners[self._checked(expert)]

    def slots(self, rank: int) -> tuple[int, ...]:
        """Logical experts of a rank in slot order: redundant copies first, then the home slice."""
        first, count = self.home(rank)
        return (*(self.replicas[rank] if self.replicas else ()), *range(first, first + count))

    @property
    def slots_per_rank(self) -> list[int]:
        """Number of routed slots of each rank; 0 for shared ranks."""
        return [len(self.slots(rank)) for rank in range(self.world_size)]

    def replica_ranks(self, expert: int) -> tuple[int, ...]:
        """Ranks that hold an expert, ascending, its home among them."""
        return self._holders[self._checked(expert)]

    @property
    def destinations_per_rank(self) -> list[int]:
        """Number of destinations of each rank: 1 for shared ranks, one per slot for the others."""
        return [1] * self.shared_ranks + self.slots_per_rank[self.shared_ranks :]

    @property
    def destinations(self) -> tuple[tuple[int, int | None], ...]:
        """(rank, logical expert) behind each destination number; None is the shared expert."""
        shared = tuple((rank, None) for rank in range(self.shared_ranks))
        return shared + tuple((rank, expert) for rank in range(self.world_size) for expert in self.slots(rank))

    @property
    def shared_destinations(self) -> tuple[int, ...]:
        """Destination numbers of the shared expert's ranks."""
        return tuple(range(self.shared_ranks))

    def expert_destinations(self, source_rank: int, ranks_per_node: int | None = None) -> tuple[tuple[int, ...], ...]:
        """Destination numbers that a rank may send the rows of each expert to. Build it once per plan.

        With `ranks_per_node`, only copies on the source's node where it has any. Each expert's numbers are rotated
        by the source rank, so that sources which all start at their first number spread over the copies.
        """
        if not 0 <= source_rank < self.world_size:
            raise ValueError(f"source_rank ({source_rank}) must lie between 0 and {self.world_size - 1}")
        if ranks_per_node is not None and ranks_per_node < 1:
            raise ValueError(f"ranks_per_node ({ranks_per_node}) must be at least 1")
        number = {place: index for index, place in enumerate(self.destinations)}
        table = []
        for expert, holders in enumerate(self._holders):
            found = [number[rank, expert] for rank in copies_for(holders, source_rank, ranks_per_node)]
            turn = source_rank % len(found)
            table.append((*found[turn:], *found[:turn]))
        return tuple(table)

    def digest(self) -> str:
        """Short text that equal plans share and different plans do not."""
        fields = (self.num_experts, self.world_size, self.shared_ranks, self.replicas)
        return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]

    @cached_property
    def _owners(self) -> tuple[int, ...]:
        return tuple(rank for rank, (_, count) in enumerate(self.homes) for _ in range(count))

    @cached_property
    def _holders(self) -> tuple[tuple[int, ...], ...]:
        holders: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank in range(self.world_size):
            for expert in self.slots(rank):
                holders[expert].append(rank)
        return tuple(map(tuple, holders))

    def _checked(self, expert: int) -> int:
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert ({expert}) must lie between 0 and {self.num_experts - 1}")
        return expert


@dataclass(frozen=True, kw_only=True)
class ReplicaRoutes:
    """How one rank's redundant slots are filled from the experts' homes, and their gradients taken back.

    send: which of the experts at home here (as places in the home slice) go out, grouped by receiving rank.
    send_counts, recv_counts: how many per rank. place: for each redundant slot here, which received expert it is.
    """

    send: tuple[int, ...]
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    place: tuple[int, ...]


def replica_routes(plan: SlotPlan, rank: int) -> ReplicaRoutes:
    """Of one rank of the EP group; the same exchange seen from its side."""
    first, count = plan.home(rank)
    replicas = plan.replicas or ((),) * plan.world_size
    mine = replicas[rank]
    by_owner = sorted(range(len(mine)), key=lambda slot: (plan.owner(mine[slot]), slot))
    wanted = [[e - first for e in held if first <= e < first + count] for held in replicas]
    return ReplicaRoutes(
        send=tuple(expert for experts in wanted for expert in experts),
        send_counts=tuple(map(len, wanted)),
        recv_counts=tuple(sum(plan.owner(e) == source for e in mine) for source in range(plan.world_size)),
        place=tuple(by_owner.index(slot) for slot in range(len(mine))),
    )
