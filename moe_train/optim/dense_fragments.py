"""Where DeepSpeed keeps each dense parameter's fp32 weights and moments on this rank, by ZeRO stage.

Every function yields `Fragment`s whose views alias DeepSpeed's own buffers: reading them saves, writing them loads.
DeepSpeed sees of a parameter that tensor parallelism has cut the part alone, and shards it over the data group.
"""

from collections.abc import Iterator

import torch

from moe_train.optim.fragments import Fragment, narrow_views, state_views
from moe_train.parallel import Groups, tensor_part


def unsharded(optimizer: torch.optim.Optimizer, names: dict[int, str], groups: Groups) -> Iterator[Fragment]:
    """Stage 0 in fp32: every rank of the data group holds everything; the saving is dealt out in turn."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    data = groups.data
    for position, parameter in enumerate(parameters):
        views = state_views(optimizer, parameter)
        mine = position % data.world_size == data.rank_in_group
        yield _fragment(parameter, tuple(parameter.shape), names, groups, 0, parameter.numel(), views, mine)


def flat_partitions(
    wrapper, param_groups: list[list], flats: list, names: dict[int, str], groups: Groups
) -> Iterator[Fragment]:
    """Stages 1 and 2, and bf16 at stage 0: each group of parameters is one flat buffer, cut over the data group."""
    for group, flat in zip(param_groups, flats, strict=True):
        views = state_views(wrapper.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            held, local = mapping.lp_fragment_address, mapping.hp_fragment_address
            piece = narrow_views(views, local.start, local.start + local.numel)
            start, stop = held.start, held.start + held.numel
            yield _fragment(parameter, tuple(parameter.shape), names, groups, start, stop, piece)


def parameter_partitions(wrapper, names: dict[int, str], groups: Groups) -> Iterator[Fragment]:
    """Stage 3: each parameter is cut over the data group by itself, in equal parts, the last one padded."""
    rank = groups.data.rank_in_group
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        views = state_views(wrapper.optimizer, flat)
        offset = 0
        for parameter in group:
            part = parameter.partition_numel()
            start, stop = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < stop:
                piece = narrow_views(views, offset, offset + stop - start)
                yield _fragment(parameter, tuple(parameter.ds_shape), names, groups, start, stop, piece)
            offset += part


def _fragment(
    parameter: torch.Tensor,
    shape: tuple[int, ...],
    names: dict[int, str],
    groups: Groups,
    start: int,
    stop: int,
    views: dict[str, torch.Tensor],
    owner: bool = True,
) -> Fragment:
    """Elements `start` to `stop` of what this rank has of a parameter, of that shape; the ranks of a tensor group have
    different parts, or the same whole, which the first one saves."""
    part = tensor_part(parameter)
    return Fragment(
        name=names[id(parameter)],
        expert=None,
        shape=shape if part is None else part.view_shape,
        start=start,
        stop=stop,
        views=views,
        owner=owner and (part is not None or groups.tensor.rank_in_group == 0),
        part=part,
    )


def publish_stage_3(wrapper) -> None:
    """fp32 partitions -> the weights that forward uses. Collective."""
    for index, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
        wrapper.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        updated = wrapper.unflatten(wrapper.fp16_partitioned_groups_flat[index], wrapper.fp16_partitioned_groups[index])
        for partitioned, value in zip(wrapper.fp16_partitioned_groups[index], updated, strict=True):
            partitioned.data = value.data
    if wrapper.persistent_parameters:
        wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
