"""Which implementation of a kernel runs: Triton on a GPU or under its interpreter, the torch reference elsewhere."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter is on (`TRITON_INTERPRET=1`, set before Triton is imported)."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def runs_triton(device: torch.device) -> bool:
    """Whether kernels on this device are Triton's."""
    return has_triton() and (device.type == "cuda" or interpreted())


def implementation(name: str, device: torch.device) -> ModuleType:
    """`kernels/triton/<name>.py` or `kernels/reference/<name>.py`: the same functions, the same numbers."""
    return _module("triton" if runs_triton(device) else "reference", name)


def dense_implementation(name: str, x: torch.Tensor, *, interpret: bool = False) -> ModuleType:
    """The same for kernels that every model runs, whatever its backend: Triton on a GPU alone, interpreted only if
    asked, and never in float64, which Triton's would round."""
    if x.dtype == torch.float64 or not (interpret or x.device.type == "cuda"):
        return _module("reference", name)
    return implementation(name, x.device)


@functools.cache
def _module(kind: str, name: str) -> ModuleType:
    return importlib.import_module(f"moe_train.kernels.{kind}.{name}")
