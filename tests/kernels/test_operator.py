"""Operators called eagerly, traced and recomputed; what an adjoint gives up is free, unless backward runs again."""

import pytest
import torch

from moe_train.kernels.operator import Operator, take_saved

expired: list[bool] = []


def cube(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    square = x * x
    return square * x * scale, square


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = inputs[1]


def adjoint(ctx, dy, _):
    x, square = take_saved(ctx)
    dx = thrice(dy * x * x) * ctx.scale
    memory = square.untyped_storage()._weak_ref()
    del square
    expired.append(torch.UntypedStorage._expired(memory))
    torch.UntypedStorage._free_weak_ref(memory)
    return dx, None


def times_three(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


thrice = Operator("test_thrice", times_three, torch.empty_like)
operator = Operator("test_cube", cube, lambda x, scale: (torch.empty_like(x), torch.empty_like(x)), save, adjoint)


def gradient(call, **options) -> torch.Tensor:
    x = torch.arange(5, dtype=torch.float64).requires_grad_()
    y = call(x)
    y.backward(torch.ones(5, dtype=torch.float64), **options)
    assert x.grad is not None
    assert torch.equal(y, 2 * x.detach() ** 3)
    return x.grad


@pytest.mark.parametrize(
    "call",
    [
        lambda x: operator(x, 2.0)[0],
        torch.compile(lambda x: operator(x, 2.0)[0], fullgraph=True, backend="aot_eager"),
        lambda x: operator.registered(x, 2.0)[0],
        lambda x: torch.utils.checkpoint.checkpoint(lambda x: operator(x, 2.0)[0], x, use_reentrant=False),
    ],
    ids=["eager", "compiled", "registered", "recomputed"],
)
def test_gradient(call):
    assert torch.equal(gradient(call), 6 * torch.arange(5, dtype=torch.float64) ** 2)


def test_what_is_deleted_in_backward_is_free():
    expired.clear()
    gradient(lambda x: operator(x, 2.0)[0])
    assert expired == [True]


def test_backward_may_run_again():
    expired.clear()
    x = torch.arange(5, dtype=torch.float64).requires_grad_()
    y = operator(x, 2.0)[0].sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 12 * x.detach() ** 2)
    assert expired == [False, True]


def test_no_second_derivative_is_made_up():
    x = torch.arange(5, dtype=torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(operator(x, 2.0)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


def test_nothing_is_saved_without_gradients():
    x = torch.arange(5, dtype=torch.float64)
    assert operator(x, 2.0)[0].grad_fn is None
    with torch.no_grad():
        assert operator(x.requires_grad_(), 2.0)[0].grad_fn is None


def test_a_tensor_without_data_takes_the_registered_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        found = operator(mode.from_tensor(torch.zeros(3)), 2.0)
    assert found[0].shape == (3,)


def test_so_does_one_on_the_meta_device():
    assert operator(torch.zeros(3, device="meta"), 2.0)[1].is_meta
