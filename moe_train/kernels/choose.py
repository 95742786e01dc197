"""Which implementation of a kernel runs: Triton on a GPU or under its interpreter, the torch reference elsewhere."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    kind = "triton" if runs_triton(device) else "reference"
    return importlib.import_module(f"moe_train.kernels.{kind}.{name}")
