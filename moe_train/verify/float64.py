"""Whole computations in float64, although model code rounds parts of them to float32 by name."""

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While active, every torch call that names float32 gets float64 instead.

    Hugging Face models write norms, softmax and rotary angles "in float32": an upcast from bf16, but from float64 a
    rounding, which would hide everything below 1e-7.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(_wide(value) for value in args)
        return func(*args, **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(value):
    return torch.float64 if value is torch.float32 else value
