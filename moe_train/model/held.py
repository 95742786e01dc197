"""What each rank holds of a model, from shapes alone: the arithmetic of building it, without its memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from moe_train.config import Recipe
from moe_train.model.build import SwappedBlock, find_blocks, with_shared_outside
from moe_train.model.cuts import dense_parts
from moe_train.model.profiles import profile_of
from moe_train.moe import SlotPlan
from moe_train.parallel import Topology
from moe_train.parallel.tensor_slice import mlp_part


@dataclass(frozen=True, kw_only=True)
class StoredParameter:
    """A parameter kept outside of the model, in units (experts, or the whole of a shared expert's matrix).

    unit_shape: of one unit here, tensor parallelism done. home: units at home here. copies: redundant ones.
    holders: ranks that hold the same units, and share their states.
    """

    name: str
    unit_shape: tuple[int, ...]
    home: int
    copies: int
    holders: int

    @property
    def unit_numel(self) -> int:
        return math.prod(self.unit_shape)

    @property
    def numel(self) -> int:
        return self.unit_numel * (self.home + self.copies)


@dataclass(frozen=True, kw_only=True)
class Held:
    """dense: shapes of the model's own parameters on a rank, in order. stored: everything beside them."""

    dense: dict[str, tuple[int, ...]]
    stored: tuple[StoredParameter, ...]

    @property
    def num_dense(self) -> int:
        return sum(map(math.prod, self.dense.values()))

    @property
    def num_stored(self) -> int:
        return sum(parameter.numel for parameter in self.stored)


def held_by(rank: int, model: PreTrainedModel, recipe: Recipe, plan: SlotPlan, topology: Topology) -> Held:
    """What one rank holds below ZeRO-3.

    Args:
        rank: of the whole world.
        model: the stock model, on the meta device.
    """
    blocks = [with_shared_outside(model, block, recipe, plan) for block in find_blocks(model)]
    outside = tuple(
        f"{block.name}.{attribute}." for block in blocks for attribute in (block.experts_attribute, *block.shared)
    )
    inside = tuple(f"{block.name}." for block in blocks)
    rules = profile_of(model.config.model_type).tensor(model.config)
    dense = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.startswith(outside):
            continue
        parts = None
        if topology.tensor > 1 and not name.startswith(inside):
            parts = dense_parts(rules, name, shape, topology.tensor)
        dense[name] = parts[rank % topology.tensor].local_shape(shape) if parts else shape
    stored = [found for block in blocks for found in _stored(rank, block, plan, topology)]
    return Held(dense=dense, stored=tuple(stored))


def _stored(rank: int, block: SwappedBlock, plan: SlotPlan, topology: Topology) -> Iterator[StoredParameter]:
    """In the order in which a run makes them."""
    place = rank // topology.expert_tensor % topology.expert
    for name, parameter in block.experts.named_parameters(recurse=False):
        shape = tuple(parameter.shape[1:])
        yield StoredParameter(
            name=f"{block.experts_name}.{name}",
            unit_shape=_cut(name, shape, rank, topology.expert_tensor),
            home=plan.home(place)[1],
            copies=len(plan.replicas[place]) if plan.replicas else 0,
            holders=topology.expert_data,
        )
    apart = plan.shared_ranks > 0
    for attribute, module in block.shared.items():
        for name, parameter in module.named_parameters():
            key, shape = f"{attribute}.{name}", tuple(parameter.shape)
            yield StoredParameter(
                name=f"{block.name}.{key}",
                unit_shape=shape if apart else _cut(name, shape, rank, topology.tensor),
                home=int(not apart or place < plan.shared_ranks),
                copies=0,
                holders=plan.shared_ranks * topology.expert_data if apart else topology.data,
            )


def _cut(name: str, shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
    return shape if size == 1 else mlp_part(name, shape, rank % size, size).local_shape(shape)
