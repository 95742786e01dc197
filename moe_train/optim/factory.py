"""AdamW from torch, DeepSpeed or apex, for dense parameters and expert shards alike."""

import importlib.util
from collections.abc import Callable

import torch

from moe_train.config.schema import OptimizerSection
from moe_train.errors import ConfigError
from moe_train.optim.adamw import OnePassAdamW

APEX_HELP = (
    "build NVIDIA's apex from its GitHub repository (APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation .)"
    " or set optimizer.name to adamw"
)


OptimizerFactory = Callable[[list[dict]], torch.optim.Optimizer]


def optimizer_factory(
    section: OptimizerSection, state_device: torch.device, *, experts: bool = False
) -> OptimizerFactory:
    """Returns: param groups (each with a boolean `decay`) -> optimizer.

    experts: for them, whose store knows how to update in one pass over memory.

    Raises `ConfigError` at once if the library asked for is not there.
    """
    one_pass = experts and (section.name == "one_pass_adamw" or state_device.type == "cuda")
    build = {
        "adamw": _one_pass_adamw if one_pass else _torch_adamw,
        "one_pass_adamw": _one_pass_adamw if one_pass else _torch_adamw,
        "deepspeed_fused_adam": _deepspeed_fused_adam,
        "apex_fused_adam": _apex_fused_adam,
    }[section.name](section, state_device)

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        named = [
            {"params": group["params"], "weight_decay": section.weight_decay if group["decay"] else 0.0}
            for group in groups
        ]
        return build(named, lr=section.lr, betas=section.betas, eps=section.eps)

    return make


def decays(section: OptimizerSection) -> Callable[[str, int], bool]:
    """(parameter name, number of dimensions) -> whether weight decay applies: matrices, unless named in `no_decay`."""
    return lambda name, dims: dims >= 2 and not any(part in name for part in section.no_decay)


def _torch_adamw(section: OptimizerSection, device: torch.device):
    return lambda groups, **options: torch.optim.AdamW(groups, fused=device.type == "cuda", **options)


def _one_pass_adamw(section: OptimizerSection, device: torch.device):
    return lambda groups, **options: OnePassAdamW(groups, fused=device.type == "cuda", **options)


def _deepspeed_fused_adam(section: OptimizerSection, device: torch.device):
    if device.type != "cuda":
        raise ConfigError("optimizer.name (deepspeed_fused_adam) needs a CUDA GPU: set optimizer.name to adamw")
    from deepspeed.ops.adam import FusedAdam

    return lambda groups, **options: FusedAdam(groups, adam_w_mode=True, **options)


def _apex_fused_adam(section: OptimizerSection, device: torch.device):
    if importlib.util.find_spec("apex") is None:
        raise ConfigError(f"optimizer.name (apex_fused_adam): apex is not installed; {APEX_HELP}")
    if any(_find_spec(f"apex.{part}") is None for part in ("optimizers", "normalization")):
        raise ConfigError(
            "optimizer.name (apex_fused_adam): the installed package called apex is another project (the one on PyPI "
            f"is a web toolkit), not NVIDIA's; pip uninstall apex, then {APEX_HELP}"
        )
    if importlib.util.find_spec("amp_C") is None:
        raise ConfigError(f"optimizer.name (apex_fused_adam): apex was built without its CUDA extension; {APEX_HELP}")
    if device.type != "cuda":
        raise ConfigError("optimizer.name (apex_fused_adam) needs a CUDA GPU: set optimizer.name to adamw")
    from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

    return lambda groups, **options: FusedAdam(groups, adam_w_mode=True, **options)


def _find_spec(name: str):
    try:
        return importlib.util.find_spec(name)
    except ImportError:  # the parent is there and fails to import: not usable either
        return None
