"""Where DeepSpeed keeps each dense parameter's fp32 weights and moments on this rank, by ZeRO stage.

Every function yields `Fragment`s whose views alias DeepSpeed's own buffers: reading them saves, writing them loads.
"""

from collections.abc import Iterator

import torch

from moe_train.optim.fragments import Fragment, narrow_views, state_views


def unsharded(optimizer: torch.optim.Optimizer, names: dict[int, str], rank: int, world: int) -> Iterator[Fragment]:
    """Stage 0 in fp32: every rank holds everything; the saving is dealt out in turn."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for position, parameter in enumerate(parameters):
        yield Fragment(
            name=names[id(parameter)],
            expert=None,
            shape=tuple(parameter.shape),
            start=0,
            stop=parameter.numel(),
            views=state_views(optimizer, parameter),
            owner=position % world == rank,
        )


def flat_partitions(wrapper, groups: list[list], flats: list, names: dict[int, str]) -> Iterator[Fragment]:
    """Stages 1 and 2, and bf16 at stage 0: each group of parameters is one flat buffer, cut over the ranks."""
    for group, flat in zip(groups, flats, strict=True):
        views = state_views(wrapper.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            logical, local = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(
                name=names[id(parameter)],
                expert=None,
                shape=tuple(parameter.shape),
                start=logical.start,
                stop=logical.start + logical.numel,
                views=narrow_views(views, local.start, local.start + local.numel),
            )


def parameter_partitions(wrapper, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    """Stage 3: each parameter is cut over the ranks by itself, in equal parts, the last one padded."""
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        views = state_views(wrapper.optimizer, flat)
        offset = 0
        for parameter in group:
            part = parameter.partition_numel()
            start, stop = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < stop:
                yield Fragment(
                    name=names[id(parameter)],
                    expert=None,
                    shape=tuple(parameter.ds_shape),
                    start=start,
                    stop=stop,
                    views=narrow_views(views, offset, offset + stop - start),
                )
            offset += part


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
