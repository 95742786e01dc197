"""Where a certificate's layouts run: on processes of this machine's CPU, or on its GPUs; what that leaves out."""

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
    """worlds: numbers of ranks. precisions: that layouts compute in. sharing: worlds of more ranks than GPUs."""

    device: Device
    worlds: tuple[int, ...]
    precisions: tuple[Precision, ...]
    sharing: tuple[int, ...] = ()


def place_for(
    device: str = "cpu", worlds: Sequence[int] = (1, 2, 3, 4), precisions: Sequence[Precision] | None = None
) -> Place:
    """Where `device` is; which of the worlds have more ranks than it has GPUs. Raises `ConfigError`."""
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
    sharing = tuple(world for world in worlds if gpus and world > gpus)
    return Place(device=found, worlds=tuple(worlds), precisions=wanted, sharing=sharing)


def how_shared(sharing: Sequence[int]) -> str:
    """What those worlds do for want of GPUs, and what they do not show."""
    named = f"world{'s' if len(sharing) > 1 else ''} of {', '.join(map(str, sharing))}"
    return f"{named}: more ranks than GPUs, which NCCL does not take; they share GPUs, over gloo"


def backends_left_out(recipe: Recipe, traits: Traits) -> tuple[str, ...]:
    """Of a shrunk recipe's layouts on GPUs, those that would need Triton."""
    if traits.device == "cpu" or traits.fused or "bf16" not in traits.precisions:
        return ()
    return (f"backend fused: {why_not_fused(load_model_config(recipe))}",)


def not_covered(device: Device, worlds: Sequence[int], sharing: Sequence[int]) -> str:
    """What no layout of a certificate shows."""
    if device == "cpu":
        return "GPUs and NCCL, offload, fp16, fp8"
    alone = max((world for world in worlds if world not in sharing), default=1) == 1
    return ("NCCL, " if alone else "") + "offload, fp16, fp8"


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
