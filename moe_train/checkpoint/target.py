"""A layout -> what each of its ranks owns of every logical tensor, and would write if it saved. Arithmetic alone.

The routed experts, and shared experts on ranks of their own or cut over a tensor group, lie as `optim.ExpertTensor`
shards them. Everything else is DeepSpeed's: a tensor is cut evenly over the data group (ZeRO 1 to 3), or given whole to
its ranks in turn (ZeRO-0). ZeRO-3 does just that; the flat buffers of ZeRO 1 and 2 would put other borders.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from moe_train.checkpoint.source import Key, StoredTensor
from moe_train.errors import CheckpointError, ConfigError, TopologyError
from moe_train.moe.placement import SlotPlan, check_counts
from moe_train.parallel.tensor_slice import TensorSlice, mlp_part
from moe_train.parallel.topology import Topology

LAYOUT_KEYS = {
    "world": "world",
    "expert": "expert_parallel",
    "tensor": "tensor_parallel",
    "expert_tensor": "expert_tensor_parallel",
    "zero": "zero_stage",
    "redundant": "redundant_experts",
    "shared_ranks": "shared_expert_ranks",
    "shared_tensor": "shared_expert_tensor",
}
"""Fields of a `Layout` -> keys of a manifest's layout."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes as a recipe's `parallel` and `zero` name them. Raises `TopologyError` for those that make no grid."""

    world: int
    expert: int = 1
    tensor: int = 1
    expert_tensor: int = 1
    zero: int = 0
    redundant: int = 0
    shared_ranks: int = 0
    shared_tensor: bool = False

    def __post_init__(self):
        if self.world < 1 or self.zero not in range(4):
            raise TopologyError(f"a layout needs a rank (not {self.world}) and a ZeRO stage from 0 to 3 ({self.zero})")
        topology = self.topology
        if self.shared_ranks and (self.expert_tensor > 1 or self.shared_tensor):
            other = f"expert_tensor ({self.expert_tensor})" if self.expert_tensor > 1 else "shared_expert_tensor (true)"
            raise TopologyError(
                f"parallel.{other} and parallel.shared_expert_ranks ({self.shared_ranks}): ranks of their own hold "
                "whole shared experts; set one of the two to its default"
            )
        if self.shared_tensor and topology.tensor == 1:
            raise TopologyError(
                "parallel.shared_expert_tensor (true) needs ranks that hold the same tokens, and parallel.tensor is "
                "1: raise parallel.tensor or set this to false"
            )

    @property
    def topology(self) -> Topology:
        return Topology(world=self.world, expert=self.expert, tensor=self.tensor, expert_tensor=self.expert_tensor)

    @classmethod
    def changed(cls, stored: dict[str, Any], changes: dict[str, int | bool | None]) -> "Layout":
        """The layout of a manifest, with what is not None of `changes` in its place."""
        found = {name: stored[key] for name, key in LAYOUT_KEYS.items() if key in stored}
        for name, value in found.items():
            if not isinstance(value, int):
                raise CheckpointError(f"the checkpoint's layout says {LAYOUT_KEYS[name]} {value!r}, which is no number")
        found |= {name: value for name, value in changes.items() if value is not None}
        if "world" not in found:
            raise ConfigError("the checkpoint does not say its number of ranks: give the new one (--world)")
        return cls(**found)

    def to_manifest(self) -> dict[str, Any]:
        return {key: getattr(self, name) for name, key in LAYOUT_KEYS.items()}

    def __str__(self) -> str:
        parts = [f"world {self.world}", f"EP {self.expert}", f"ZeRO-{self.zero}"]
        if self.tensor > 1:
            parts.append(f"TP {self.tensor}")
        if self.expert_tensor > 1:
            parts.append(f"expert TP {self.expert_tensor}")
        if self.redundant:
            parts.append(f"{self.redundant} redundant experts")
        if self.shared_ranks:
            parts.append(f"{self.shared_ranks} shared-expert ranks")
        if self.shared_tensor:
            parts.append("shared experts cut over TP")
        return ", ".join(parts)


class Cuts(Protocol):
    """What a layout has to know of a model family; see `model.cuts`."""

    def dense(self, name: str, shape: tuple[int, ...], tensor: int) -> list[TensorSlice] | None:
        """Parts of a parameter outside of MoE blocks, one for each rank of a tensor group; None: all hold it whole."""
        ...

    def shared(self, name: str, gate: bool) -> bool:
        """Whether a parameter (by its name inside of its block) is of the shared experts, their gate included."""
        ...


class Owned(NamedTuple):
    """Elements start to stop of a part of a logical tensor."""

    key: Key
    part: TensorSlice | None
    start: int
    stop: int


Place = tuple[int, TensorSlice | None, int, int]
"""(rank, part, start, stop)."""


def owned(
    layout: Layout, tensors: dict[Key, StoredTensor], cuts: Callable[[], Cuts] | None = None
) -> list[list[Owned]]:
    """What each rank owns, in the order in which it writes.

    Args:
        cuts: asked for where the layout depends on the family: tensor parallelism, shared experts apart.

    Raises:
        TopologyError: the layout does not fit the model. CheckpointError: experts are missing.
    """
    places = _Places(layout, tensors, cuts)
    ranks: list[list[Owned]] = [[] for _ in range(layout.world)]
    for key in sorted(tensors, key=order):
        for rank, part, start, stop in places.of(key, tensors[key].shape):
            ranks[rank].append(Owned(key, part, start, stop))
    return ranks


def order(key: Key) -> tuple:
    """Layer 2 before layer 10, an expert's tensors side by side, its weights before its states."""
    parts = [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", key.name)]
    return parts, -1 if key.expert is None else key.expert, key.kind != "master", key.kind


class _Places:
    def __init__(self, layout: Layout, tensors: dict[Key, StoredTensor], cuts: Callable[[], Cuts] | None):
        self.layout, self.topology = layout, layout.topology
        apart = layout.tensor > 1 or layout.shared_ranks or layout.shared_tensor
        self.cuts = cuts() if cuts and apart else None
        if apart and self.cuts is None:
            raise TopologyError(f"{layout}: what is cut or set apart depends on the model's family, which is not known")
        self.plans = _plans(layout, tensors)
        self.blocks = {name.rpartition(".")[0].rpartition(".")[0] for name in self.plans}
        dense = sorted({key._replace(kind="master") for key in tensors if key.expert is None}, key=order)
        self.position = {key.name: number for number, key in enumerate(dense)}
        self.data, self.expert_data = self.topology.data_groups(), self.topology.expert_data_groups()
        groups = self.topology.expert_groups()
        self.holders = sorted(rank for group in groups for rank in group[: layout.shared_ranks])

    def of(self, key: Key, shape: tuple[int, ...]) -> Iterator[Place]:
        if key.kind == "rng":
            saved_by = re.match(r"rank(\d+)\.", key.name)
            yield int(saved_by[1]) % self.layout.world if saved_by else 0, None, 0, math.prod(shape)
        elif key.kind == "buffer":
            yield 0, None, 0, math.prod(shape)
        elif key.expert is not None:
            yield from self._routed(key, shape)
        else:
            yield from self._dense(key, shape)

    def _routed(self, key: Key, shape: tuple[int, ...]) -> Iterator[Place]:
        """The home's experts of a parameter are one flat buffer, cut over the ranks that hold the same."""
        assert key.expert is not None
        plan, width = self.plans[key.name], self.layout.expert_tensor
        rank = plan.owner(key.expert)
        first, count = plan.home(rank)
        for index in range(width):
            part = None if width == 1 else mlp_part(key.name, shape, index, width)
            numel = part.numel if part else math.prod(shape)
            group = self.expert_data[rank * width + index]
            yield from self._sharded(part, numel, group, (key.expert - first) * numel, count * numel)

    def _dense(self, key: Key, shape: tuple[int, ...]) -> Iterator[Place]:
        block = next((b for b in _parents(key.name) if b in self.blocks), None)
        inner = key.name.removeprefix(f"{block}.")
        if block is None:
            parts = self.cuts.dense(key.name, shape, self.layout.tensor) if self.cuts else None
        elif self.layout.shared_ranks and self.cuts and self.cuts.shared(inner, gate=True):
            yield from self._sharded(None, math.prod(shape), self.holders)
            return
        elif self.layout.shared_tensor and self.cuts and self.cuts.shared(inner, gate=False):
            for index, group in enumerate(self.data):
                part = mlp_part(key.name, shape, index, self.layout.tensor)
                yield from self._sharded(part, part.numel, group)
            return
        else:
            parts = None
        for part, group in zip(parts or [None], self.data, strict=False):
            numel = part.numel if part else math.prod(shape)
            if self.layout.zero:
                yield from self._sharded(part, numel, group)
            else:
                yield group[self.position[key.name] % len(group)], part, 0, numel

    def _sharded(
        self, part: TensorSlice | None, numel: int, group: list[int], offset: int = 0, total: int | None = None
    ) -> Iterator[Place]:
        """`numel` elements, `offset` into a flat buffer of `total` that is cut in equal shards over the group."""
        size = -(-(numel if total is None else total) // (len(group) if self.layout.zero else 1))
        if not numel:
            yield group[0], part, 0, 0
            return
        for shard in range(offset // size, (offset + numel - 1) // size + 1):
            start, stop = max(shard * size, offset), min((shard + 1) * size, offset + numel)
            yield group[shard], part, start - offset, stop - offset


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _plans(layout: Layout, tensors: Iterable[Key]) -> dict[str, SlotPlan]:
    """Homes of the experts of each stacked parameter; redundant copies have weights alone, and are not stored."""
    experts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for key in tensors:
        if key.expert is not None:
            experts[key.name][key.kind].add(key.expert)
    plans: dict[int, SlotPlan] = {}
    found = {}
    for name, kinds in experts.items():
        number = max(map(max, kinds.values())) + 1
        for kind, held in kinds.items():
            missing = set(range(number)) - held
            if missing:
                raise CheckpointError(f"{Key(kind, name, min(missing))} is missing, and {number} experts are stored")
        if number not in plans:
            check_counts(number, layout.expert, layout.shared_ranks, layout.redundant)
            plans[number] = SlotPlan(number, layout.expert, layout.shared_ranks)
        found[name] = plans[number]
    return found
