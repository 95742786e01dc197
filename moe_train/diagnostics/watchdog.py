"""Which module's output was the first that is not finite."""

from collections.abc import Callable

import torch
from torch import nn


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> tuple[int, str] | None:
    """Run `forward` with a look at every module's output, in order of completion.

    Returns (position in that order, module name), or None if every output is finite. The position orders findings of
    several ranks, whose modules complete in the same order.
    """
    found: list[tuple[int, str]] = []
    counter = [0]

    def hook(name: str):
        def look(module, inputs, output):
            counter[0] += 1
            if not found and not all(t.isfinite().all() for t in _tensors(output)):
                found.append((counter[0], name or type(model).__name__))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in _tensors(value)]
    return []
