"""Where a certificate's layouts run: on processes of this machine's CPU, or one rank per GPU; what that leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from moe_train.config import Recipe
from moe_train.errors import ConfigError
from moe_train.model import load_model_config
from moe_train.verify.grid import ARITHMETIC, PRECISIONS, Device, Precision, Traits
from moe_train.verify.shrink import why_not_fused


@dataclass(frozen=True, kw_only=True)
class Place:
    """worlds: numbers of ranks that fit. precisions: that layouts compute in. left_out: worlds that do not fit."""

    device: Device
    worlds: tuple[int, ...]
    precisions: tuple[Precision, ...]
    left_out: tuple[str, ...] = ()


def place_for(
    device: str = "cpu", worlds: Sequence[int] = (1, 2, 3, 4), precisions: Sequence[Precision] | None = None
) -> Place:
    """Where `device` is; which of the worlds fit.

    NCCL takes one rank per GPU: larger worlds are left out, with a sentence. Raises `ConfigError` if nothing is left.
    """
    if device not in get_args(Device):
        raise ConfigError(f"--device ({device}) must be cpu or cuda")
    gpus = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise ConfigError("--device (cuda): torch finds no GPU on this machine: leave it out or say cpu")
    found: Device = "cuda" if gpus else "cpu"
    computed = {precision for precision, _ in ARITHMETIC[found]}
    has: list[Precision] = [precision for precision in PRECISIONS if precision in computed]
    wanted = tuple(has if precisions is None else precisions)
    if not set(wanted) <= set(has):
        raise ConfigError(
            f"--precision ({','.join(wanted)}): on {'GPUs' if gpus else 'a CPU'} layouts compute in {', '.join(has)}"
            + ("; --device cpu has fp64" if gpus else "")
        )
    if not gpus:
        return Place(device=found, worlds=tuple(worlds), precisions=wanted)
    fitting, left_out = tuple(world for world in worlds if world <= gpus), [w for w in worlds if w > gpus]
    many = f"{gpus} GPU{'s' if gpus > 1 else ''}, and NCCL takes one rank per GPU"
    if not fitting:
        raise ConfigError(
            f"--world ({','.join(map(str, worlds))}): this machine has {many}: name a smaller one, or --device cpu"
        )
    why = (f"worlds of {', '.join(map(str, left_out))}: this machine has {many}; --device cpu runs them",)
    return Place(device=found, worlds=fitting, precisions=wanted, left_out=why if left_out else ())


def backends_left_out(recipe: Recipe, traits: Traits) -> tuple[str, ...]:
    """Of a shrunk recipe's layouts on GPUs, those that would need Triton."""
    if traits.device == "cpu" or traits.fused or "bf16" not in traits.precisions:
        return ()
    return (f"backend fused: {why_not_fused(load_model_config(recipe))}",)


def not_covered(device: Device) -> str:
    """What no layout of a certificate shows."""
    return "offload, fp16, fp8" if device == "cuda" else "GPUs and NCCL, offload, fp16, fp8"


def parse_worlds(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4). Raises `ConfigError`."""
    try:
        worlds = sorted({int(part) for part in text.split(",")})
    except ValueError:
        worlds = []
    if not worlds or worlds[0] < 1:
        raise ConfigError(f"--world ({text}): numbers of processes, at least 1, separated by commas, such as 1,2,4")
    return tuple(worlds)


def parse_precisions(text: str | None) -> tuple[Precision, ...] | None:
    """`fp32,bf16` -> (fp32, bf16), None if nothing is said. Raises `ConfigError`."""
    if text is None:
        return None
    named = [part.strip() for part in text.split(",")]
    if not set(named) <= set(PRECISIONS):
        raise ConfigError(f"--precision ({text}): some of {', '.join(PRECISIONS)}, separated by commas")
    return tuple(precision for precision in PRECISIONS if precision in named)
