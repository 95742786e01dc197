"""The last-dimension collectives with their adjoints, cut parameters, and the groups that DeepSpeed gets."""

import pytest
import torch

from moe_train.parallel import (
    ParallelGroup,
    Topology,
    build_groups,
    cut_,
    gather_columns,
    slice_columns,
    tensor_part,
)
from moe_train.parallel.tensor_slice import TensorSlice
from moe_train.testing import run_distributed


def values(*shape: int, shift: int = 0) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + shift


def columns(rank: int, shape: tuple[int, ...]):
    """Each rank's (output, gradient of the input), gathered and sliced; the former is replicated."""
    group = build_groups(Topology(world=3, expert=1, tensor=3)).tensor
    part = values(*shape, shift=100 * rank).requires_grad_()
    gathered = gather_columns(part, group)
    gathered.mul_(2)  # families clamp what they are given in place
    (gathered * values(*gathered.shape, shift=7)).sum().backward()
    whole = values(*shape[:-1], 3 * shape[-1]).requires_grad_()
    sliced = slice_columns(whole, group)
    (sliced * values(*sliced.shape, shift=1000 * rank)).sum().backward()
    return gathered.detach(), part.grad, sliced.detach(), whole.grad


@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 1, 2), (3,)])
def test_columns_and_their_adjoints(shape):
    width, wide = shape[-1], (*shape[:-1], 3 * shape[-1])
    results = run_distributed(columns, 3, shape)
    for rank, (gathered, part_grad, sliced, whole_grad) in enumerate(results):
        mine = slice(width * rank, width * (rank + 1))
        assert torch.equal(gathered, 2 * torch.cat([values(*shape, shift=100 * r) for r in range(3)], -1))
        assert torch.equal(part_grad, 2 * values(*wide, shift=7)[..., mine])
        assert torch.equal(sliced, values(*wide)[..., mine])
        assert torch.equal(whole_grad, torch.cat([values(*shape, shift=1000 * r) for r in range(3)], -1))


def test_one_rank_issues_no_collective():
    x = torch.ones(2, 3)
    assert gather_columns(x, ParallelGroup.single()) is x
    assert slice_columns(x, ParallelGroup.single()) is x


def uneven(rank: int):
    with pytest.raises(ValueError, match="3 columns cannot be shared out evenly over 2 ranks"):
        slice_columns(torch.ones(2, 3), build_groups(Topology(world=2, expert=1, tensor=2)).tensor)
    return True


def test_columns_that_do_not_divide_are_refused():
    assert run_distributed(uneven, 2) == [True, True]


def test_a_cut_parameter_is_the_same_object_without_the_rest_of_its_memory():
    parameter = torch.nn.Parameter(values(4, 6))
    assert tensor_part(parameter) is None
    part = TensorSlice.columns((4, 6), 2, 4)
    cut_(parameter, part)
    assert tensor_part(parameter) is part
    assert torch.equal(parameter.data, values(4, 6)[:, 2:4])
    assert parameter.untyped_storage().nbytes() == 4 * 2 * 8
    assert parameter.requires_grad


def unit(rank: int, tensor: int):
    topology = Topology(world=4, expert=1, tensor=tensor)
    groups = build_groups(topology)
    assert build_groups(topology).mpu is groups.mpu, "made once"
    mpu = groups.mpu
    ones = torch.ones(1)
    found = [mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()]
    found += [mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()]
    for group in (mpu.get_data_parallel_group(), mpu.get_model_parallel_group()):
        total = ones * rank
        torch.distributed.all_reduce(total, group=group)
        found.append(int(total))
    return found


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (1, [[r, 4, 0, 1, 6, r] for r in range(4)]),
        (2, [[0, 2, 0, 2, 2, 1], [0, 2, 1, 2, 4, 1], [1, 2, 0, 2, 2, 5], [1, 2, 1, 2, 4, 5]]),
        (4, [[0, 1, r, 4, r, 6] for r in range(4)]),
    ],
)
def test_deepspeed_gets_the_dense_grid(tensor, expected):
    """(rank and size in data, in tensor, sum of global ranks in each), also where a group has one rank."""
    assert run_distributed(unit, 4, tensor) == expected
