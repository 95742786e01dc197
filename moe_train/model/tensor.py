"""Tensor parallelism of the dense layers: each rank of a tensor group keeps its share of their weights.

A plan (`model.profiles`) says what happens to which module. It never reaches into MoE blocks: router and shared
experts stay whole here. Parameter objects and their names stay, so that optimizers and checkpoints see one model.

DeepSpeed's own (AutoTP) is not used: it trains multi-head latent attention wrong, without a word.
"""

import math
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_train.errors import ConfigError, TopologyError
from moe_train.model.profiles import profile_of
from moe_train.moe import ParallelMoELayer
from moe_train.parallel import ParallelGroup, copy_to, cut_, gather_columns, reduce_partial, slice_columns
from moe_train.parallel.tensor_slice import TensorSlice
from moe_train.parallel.topology import divisors


def check_tensor(config: PretrainedConfig, tensor: int) -> None:
    """Raises `TopologyError` if the model's layers cannot be shared out over `tensor` ranks."""
    if tensor == 1:
        return
    plan = profile_of(config.model_type).tensor(config)
    sizes = dict(rule.divides for rule in plan if rule.divides)
    allowed = divisors(math.gcd(*sizes.values()))
    problems = [
        f"parallel.tensor ({tensor}) must divide {name} ({size}), of which each rank of a tensor group has a share: "
        f"use one of {allowed} or change the model"
        for name, size in sizes.items()
        if size % tensor
    ]
    if problems:
        raise TopologyError("\n".join(problems))
    if any("gather_output" in rule.actions for rule in plan) and config.attention_dropout:
        raise ConfigError(
            f"model.config.attention_dropout ({config.attention_dropout}): with parallel.tensor ({tensor}) every rank "
            f"of a tensor group computes the attention of {config.model_type} in full, and each would drop other "
            "values: set it to 0.0, or parallel.tensor to 1"
        )


@torch.no_grad()
def apply_tensor_parallel(model: PreTrainedModel, group: ParallelGroup) -> None:
    """Leave of the dense layers this rank's share, in place.

    To be called on drawn weights, equal on all ranks of the group, and before any optimizer is made.
    """
    if group.world_size == 1:
        return
    plan = profile_of(model.config.model_type).tensor(model.config)
    unused = set(plan)
    for name, module in list(_outside_of_blocks(model)):
        rule = next((rule for rule in plan if re.fullmatch(rf"(.*\.)?{rule.pattern}", name)), None)
        assert rule or not isinstance(module, nn.Linear), f"the plan of {model.config.model_type} leaves out {name}"
        if rule is not None:
            unused.discard(rule)
            for action in rule.actions:
                ACTIONS[action](module, group, model.config)
    assert not unused, f"{model.config.model_type} has none of {[rule.pattern for rule in unused]}"


def _outside_of_blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every module but MoE blocks, swapped or not, and what they contain."""
    block = profile_of(model.config.model_type).block
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, ParallelMoELayer) or type(module).__name__ == block:
            inside += (f"{name}.",)
        elif not name.startswith(inside):
            yield name, module


class RowLinear(nn.Linear):
    """A linear of which each rank has a share of the inputs; the partial outputs are summed, the bias added once."""

    tensor_group: ParallelGroup

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = reduce_partial(F.linear(input, self.weight), self.tensor_group)
        return y if self.bias is None else y + self.bias


def _columns(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """A linear computes this rank's share of its outputs, from the whole input."""
    assert type(module) is nn.Linear, type(module)
    for parameter in module.parameters():
        cut_(parameter, TensorSlice.rows(parameter.shape, *_share(parameter.shape[0], group)))
    module.out_features = module.weight.shape[0]


def _rows(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """A linear computes its outputs from this rank's share of the inputs: a partial sum, summed over the ranks."""
    assert type(module) is nn.Linear, type(module)
    cut_(module.weight, TensorSlice.columns(module.weight.shape, *_share(module.weight.shape[1], group)))
    module.in_features = module.weight.shape[1]
    module.__class__ = RowLinear
    module.tensor_group = group  # type: ignore[assignment]


def _share(size: int, group: ParallelGroup) -> tuple[int, int]:
    width, rest = divmod(size, group.world_size)
    assert not rest, f"{size} does not divide by {group.world_size}: check_tensor comes first"
    return width * group.rank_in_group, width * (group.rank_in_group + 1)


def _copy_input(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """All that the module computes from its input is this rank's share: the input's gradient is a sum over the ranks.

    At a parent of several linears, that is one collective in backward for all of them.
    """
    _on_input(module, lambda x: copy_to(x, group))


def _slice_input(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """The module gets this rank's share of the features of an input that every rank has whole."""
    _on_input(module, lambda x: slice_columns(x, group))


def _on_input(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _gather_output(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """Every rank goes on with the outputs of all, in the same way."""

    def hook(module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
        return gather_columns(y, group)

    module.register_forward_hook(hook)


def _copy_rope_output(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """The positional part of a latent key, its last features, goes to this rank's heads as it is."""
    rope = config.qk_rope_head_dim

    def hook(module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([y[..., :-rope], copy_to(y[..., -rope:], group)], -1)

    module.register_forward_hook(hook)


def _sum_gradients(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """Whole weights that this rank uses for its share of the work: their gradients are summed over the ranks."""
    for parameter in module.parameters():
        parameter.register_hook(lambda g: group.all_reduce_(g.clone(memory_format=torch.contiguous_format)))


def _whole(module: nn.Module, group: ParallelGroup, config: PretrainedConfig) -> None:
    """Every rank does the same."""


ACTIONS: dict[str, Callable[[nn.Module, ParallelGroup, PretrainedConfig], None]] = {
    "copy_input": _copy_input,
    "columns": _columns,
    "gather_output": _gather_output,
    "slice_input": _slice_input,
    "rows": _rows,
    "sum_gradients": _sum_gradients,
    "copy_rope_output": _copy_rope_output,
    "whole": _whole,
}
