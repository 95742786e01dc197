"""Process groups, made once from a `Topology`, and the few plain collectives that need no gradient."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from moe_train.errors import MoeTrainError, TopologyError
from moe_train.parallel.topology import Topology


class ParallelGroup:
    """A set of ranks that communicate. At size 1 it needs no `torch.distributed` and issues nothing.

    Args:
        ranks: global ranks, in order; `rank` must be one of them.
        rank: this process's global rank.
        process_group: the torch process group over `ranks` (None at size 1).
    """

    def __init__(self, ranks: Sequence[int], rank: int, process_group: dist.ProcessGroup | None = None):
        if rank not in ranks:
            raise TopologyError(f"rank {rank} is in none of the group's ranks {list(ranks)}")
        if len(ranks) > 1 and process_group is None:
            raise TopologyError(f"a group of {len(ranks)} ranks needs a process group")
        self.ranks = tuple(ranks)
        self.rank_in_group = self.ranks.index(rank)
        self.process_group = process_group

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def on_gpu(self) -> bool:
        return self.process_group is not None and dist.get_backend(self.process_group) == "nccl"

    @classmethod
    def single(cls) -> "ParallelGroup":
        """The group of one process."""
        return cls([0], 0)

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """In place, no gradient. `op` is sum or max."""
        if self.world_size > 1:
            dist.all_reduce(
                tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=self.process_group
            )
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's values, on every rank, in place. No gradient."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=self.ranks[0], group=self.process_group)
        return tensor

    def all_gather_(self, full: torch.Tensor, part: torch.Tensor) -> None:
        """Fill `full` [world_size * n] with every rank's `part` [n], which may be its own place in `full`."""
        if self.world_size == 1:
            if full.data_ptr() != part.data_ptr():
                full.copy_(part)
        else:
            _ALL_GATHER(full, part, group=self.process_group)

    def reduce_scatter(self, full: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of `full` [world_size * n], this rank's part [n]."""
        if self.world_size == 1:
            return full
        part = full.new_empty(full.numel() // self.world_size)
        _REDUCE_SCATTER(part, full, group=self.process_group)
        return part

    def gather_objects(self, item: object) -> list:
        """Every rank's picklable `item`, in rank order, on every rank. For set-up and errors, not for steps."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.process_group)
        return items

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.process_group)


# torch 2.13 renamed both and warns at the old names; 2.11 knows only those
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ModelParallelUnit:
    """The dense grid, by the names under which DeepSpeed asks for it (`mpu`).

    Its process groups are its own, so that its collectives need no common order with ours, and real ones even of a
    single rank, because DeepSpeed gives them to torch.
    """

    def __init__(self, data: dist.ProcessGroup, tensor: dist.ProcessGroup):
        self._data, self._tensor = data, tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups; `Topology` says what each is for. `world` is all ranks, `expert` the EP group.

    mpu: the dense part's, for DeepSpeed; None in a process that no others have been joined to.
    """

    topology: Topology
    world: ParallelGroup
    data: ParallelGroup
    tensor: ParallelGroup
    expert: ParallelGroup
    expert_data: ParallelGroup
    expert_tensor: ParallelGroup
    token_slice: ParallelGroup
    token_gather: ParallelGroup
    mpu: ModelParallelUnit | None = None
    timeout_s: int | None = None
    _holders: dict[int, ParallelGroup | None] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return self.world.ranks[self.world.rank_in_group]

    def shared_holders(self, per_group: int) -> ParallelGroup | None:
        """The first `per_group` ranks of every EP group, as one group; None elsewhere. Collective the first time."""
        if per_group not in self._holders:
            ranks = sorted(rank for group in self.topology.expert_groups() for rank in group[:per_group])
            self._holders[per_group] = subgroup([ranks], self.timeout_s)
        return self._holders[per_group]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is, as its launcher says (deepspeed, torchrun, or none of them)."""

    rank: int
    local_rank: int
    world: int
    per_node: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        world = int(os.environ.get("WORLD_SIZE", "1"))
        per_node = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or str(world)
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world=world,
            per_node=int(per_node),
        )


def init_process_group(ranks: Ranks, device: torch.device, timeout_s: int) -> None:
    """Join the other ranks: NCCL on a GPU, gloo on a CPU. A process without a launcher is a world of one."""
    if dist.is_initialized():
        return
    alone = "MASTER_ADDR" not in os.environ
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed insists on it
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of objects take the current device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore() if alone else None,  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def build_groups(topology: Topology, timeout_s: int | None = None) -> Groups:
    """Every rank makes every group, in one order: new_group is collective over the world.

    Args:
        timeout_s: of their collectives; a new group does not take over the world's.
    """
    timeout = timedelta(seconds=timeout_s) if timeout_s else None
    rank = dist.get_rank() if dist.is_initialized() else 0

    everyone = list(range(topology.world))
    world = ParallelGroup(everyone, rank, dist.group.WORLD if topology.world > 1 else None)  # type: ignore[arg-type]

    def mine(rank_lists: list[list[int]]) -> ParallelGroup:
        chosen = None
        for ranks in map(tuple, rank_lists):
            process_group = _process_group(ranks, timeout)
            if rank in ranks:
                chosen = ParallelGroup(ranks, rank, process_group)
        assert chosen is not None, f"rank {rank} is in none of {rank_lists}"
        return chosen

    return Groups(
        topology=topology,
        world=world,
        data=mine(topology.data_groups()),
        tensor=mine(topology.tensor_groups()),
        expert=mine(topology.expert_groups()),
        expert_data=mine(topology.expert_data_groups()),
        expert_tensor=mine(topology.expert_tensor_groups()),
        token_slice=mine(topology.token_slice_groups()),
        token_gather=mine(topology.token_gather_groups()),
        mpu=_model_parallel_unit(topology, timeout) if dist.is_initialized() else None,
        timeout_s=timeout_s,
    )


def _model_parallel_unit(topology: Topology, timeout: timedelta | None) -> ModelParallelUnit:
    """Made once for each pair of sizes: two recipes of one run, or the tests of one process, share it. Collective."""
    made: dict[tuple, ModelParallelUnit] = _UNITS.setdefault(dist.group.WORLD, {})
    key = (topology.world, topology.tensor, timeout)
    if key not in made:
        data = dist.new_subgroups_by_enumeration(topology.data_groups(), timeout=timeout)[0]
        tensor = dist.new_subgroups_by_enumeration(topology.tensor_groups(), timeout=timeout)[0]
        made[key] = ModelParallelUnit(data, tensor)  # type: ignore[arg-type]
    return made[key]


_UNITS: WeakKeyDictionary = WeakKeyDictionary()
_PROCESS_GROUPS: WeakKeyDictionary = WeakKeyDictionary()
"""Both by the world they were made in: closing it forgets them."""


def _process_group(ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Made once for the same ranks: kinds of groups share it, recipes of one run, tests of one process (apart from
    DeepSpeed's own). Each has threads and sockets that live as long as the world. Collective over the world."""
    if len(ranks) == 1:
        return None
    made: dict[tuple, dist.ProcessGroup] = _PROCESS_GROUPS.setdefault(dist.group.WORLD, {})
    if (ranks, timeout) not in made:
        made[ranks, timeout] = dist.new_group(list(ranks), timeout=timeout)  # type: ignore[assignment]
    return made[ranks, timeout]


def subgroup(rank_lists: Sequence[Sequence[int]], timeout_s: int | None = None) -> ParallelGroup | None:
    """This rank's group among `rank_lists`, None where it is in none. Collective over the world."""
    timeout = timedelta(seconds=timeout_s) if timeout_s else None
    rank = dist.get_rank() if dist.is_initialized() else 0
    chosen = None
    for ranks in map(tuple, rank_lists):
        process_group = _process_group(ranks, timeout)
        if rank in ranks:
            chosen = ParallelGroup(ranks, rank, process_group)
    return chosen


def close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def raise_together(group: ParallelGroup, error: MoeTrainError | None) -> None:
    """Collective: if any rank has an error, every rank raises the first one, so that none waits for the others."""
    for rank, found in enumerate(group.gather_objects(None if error is None else (type(error), str(error)))):
        if found is not None:
            kind, text = found
            if error is not None and str(error) == text:
                raise error
            raise kind(f"rank {rank}: {text}" if group.world_size > 1 else text)
