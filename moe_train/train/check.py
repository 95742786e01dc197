"""Recipe -> everything that can be decided, and refused, before a process group exists."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from moe_train.config import Recipe, accumulation_steps, load_recipe
from moe_train.data.tokenizer import load_tokenizer
from moe_train.errors import ConfigError, MoeTrainError, TopologyError
from moe_train.model import aux_loss_coef, compute_dtype, load_model_config, num_experts_of
from moe_train.moe import resolve_backend
from moe_train.optim import optimizer_factory
from moe_train.parallel import Ranks, Topology, resolve_topology

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A recipe with every `auto` filled in for a number of ranks."""

    path: Path
    recipe: Recipe
    model_config: PretrainedConfig
    topology: Topology
    accumulation: int

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch.global_size * self.recipe.data.sequence_length

    @property
    def aux_loss_coef(self) -> float:
        return aux_loss_coef(self.recipe, self.model_config)


def resolve_run(path: Path, overrides: tuple[str, ...], world: int, per_node: int) -> ResolvedRun:
    """Raises the `ConfigError`, `RoutingError` or `DataError` that says all that is wrong with the recipe."""
    recipe = load_recipe(path, overrides)
    problems: list[MoeTrainError] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except MoeTrainError as error:
            problems.append(error)
            return None

    attempt(lambda: _check_world(recipe, world))
    tokenizer = attempt(lambda: load_tokenizer(recipe.data.tokenizer))
    config = attempt(lambda: load_model_config(recipe, tokenizer.vocab_size if tokenizer else None))
    num_experts = num_experts_of(config) if config else 1
    topology = attempt(lambda: resolve_topology(recipe.parallel.expert, world, num_experts, per_node))
    accumulation = attempt(lambda: accumulation_steps(recipe.batch, topology.data if topology else world))
    if problems:
        raise type(problems[0])("\n".join(f"{path}: {line}" for error in problems for line in str(error).splitlines()))
    assert config is not None
    assert topology is not None
    assert accumulation is not None
    return ResolvedRun(path=path, recipe=recipe, model_config=config, topology=topology, accumulation=accumulation)


def _check_world(recipe: Recipe, world: int) -> None:
    if recipe.world_sizes and world not in recipe.world_sizes:
        raise TopologyError(
            f"world_sizes ({list(recipe.world_sizes)}) leaves out {world} ranks: start one of those numbers, "
            "or change world_sizes together with batch and parallel"
        )


def pick_device(ranks: Ranks) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise TopologyError(
            f"rank {ranks.rank} wants GPU {ranks.local_rank}, this host has {torch.cuda.device_count()}: "
            "start fewer ranks"
        )
    return torch.device("cuda", ranks.local_rank)


def check_hardware(run: ResolvedRun, device: torch.device) -> None:
    """What the recipe asks of this host's device. Raises `ConfigError`."""
    compute = run.recipe.precision.compute
    if compute == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision.compute (bf16) cannot run on {torch.cuda.get_device_name(device)}: set it to fp16 or fp32"
        )
    if compute == "fp16" and device.type == "cpu":
        raise ConfigError("precision.compute (fp16) cannot run on a CPU: set it to fp32 or bf16")
    if run.recipe.model.attention == "flash_attention_2" and device.type == "cpu":
        raise ConfigError("model.attention (flash_attention_2) needs a GPU: set it to sdpa")
    config = run.model_config
    intermediate = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    resolve_backend(run.recipe.moe.backend, device, compute_dtype(run.recipe), config.hidden_size, intermediate)
    optimizer_factory(run.recipe.optimizer, device)  # says so if its library is missing
