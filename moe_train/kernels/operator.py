"""A function of tensors as one operator: differentiable, and known to `torch.compile`.

`torch.library` operators are what a compiler needs. Called eagerly they cost the host 15 us more than the function
forward and twice that backward, at each of a step's thousands of calls. So an eager call goes straight to the function,
through a `torch.autograd.Function` where gradients are wanted; a traced one goes through the registered operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]
PLAIN = (torch.Tensor, nn.Parameter)


class Operator:
    """`function`, which changes none of its inputs and returns none, registered as `moe_train::<name>`.

    fake: the same for tensors without data: the shapes and types of what is returned.
    save(ctx, inputs, output), adjoint(ctx, *gradients): of its gradient, as `torch.library.register_autograd` takes
    them; None for a function that has none. Whatever `function` calls in turn is no operator then.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        fake: Function,
        save: Function | None = None,
        adjoint: Function | None = None,
    ):
        self.function = function
        self.registered = torch.library.custom_op(f"moe_train::{name}", function, mutates_args=())
        self.registered.register_fake(fake)
        # gradients of gradients are asked of a function that has none: the library refuses
        self.differentiable = self.registered
        if save is not None and adjoint is not None:
            self.registered.register_autograd(adjoint, setup_context=save)
            self.differentiable = _differentiable(name, function, save, adjoint)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not all(_is_plain(each) for each in inputs):
            return self.registered(*inputs)
        if torch.is_grad_enabled():
            return self.differentiable(*inputs)
        return self.function(*inputs)


def _is_plain(value: Any) -> bool:
    """No tensor of a tracer, and none without data."""
    return not isinstance(value, torch.Tensor) or (type(value) in PLAIN and not value.is_meta)


def _differentiable(name: str, function: Function, save: Function, adjoint: Function) -> Function:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        found = adjoint(ctx, *gradients)
        # for a list of tensors the library wants a list
        return tuple(None if isinstance(each, list) else each for each in found) if type(found) is tuple else found

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods).apply


def take_saved(ctx: Any) -> tuple[torch.Tensor, ...]:
    """`ctx.saved_tensors`, which the graph holds no longer, unless backward is to run again: what nobody else has is
    free once the adjoint deletes it."""
    saved = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    return saved
