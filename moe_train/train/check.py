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
from moe_train.hub import FolderLayout, check_folder
from moe_train.model import aux_loss_coef, check_tensor, compute_dtype, load_model_config, num_experts_of
from moe_train.model.build import check_hash_layers, find_blocks, meta_model
from moe_train.model.profiles import profile_of
from moe_train.moe import SlotPlan, check_counts, default_counts, fp8_gemms, plan_slots, resolve_backend
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
    plan: SlotPlan
    """Of every MoE layer, to begin with."""
    accumulation: int
    per_node: int

    @classmethod
    def at(cls, recipe: Recipe, topology: Topology, config: PretrainedConfig | None = None) -> "ResolvedRun":
        """A recipe at a topology that is given, on one host. Raises as `resolve_run` does."""
        config = config or load_model_config(recipe)
        return cls(
            path=Path(),
            recipe=recipe,
            model_config=config,
            topology=topology,
            plan=first_plan(recipe, config, topology),
            accumulation=accumulation_steps(recipe.batch, topology.data),
            per_node=topology.world,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch.global_size * self.recipe.data.sequence_length

    @property
    def aux_loss_coef(self) -> float:
        return aux_loss_coef(self.recipe, self.model_config)

    @property
    def counts_ahead(self) -> bool:
        """Whether each micro-batch goes forward once more, for a loss over the whole step."""
        return self.recipe.moe.aux_loss == "global_batch" and self.accumulation > 1 and self.aux_loss_coef > 0

    @property
    def forwards(self) -> int:
        """How often a micro-batch goes forward: again for recompute, and to count ahead."""
        return 1 + self.recipe.model.activation_checkpointing + self.counts_ahead

    def row_bytes(self) -> tuple[int, int]:
        """Bytes on the wire for a row that is sent to another rank's experts, in a step: there, and back.

        In every forward a token goes there and what is made of it comes back; in backward their gradients the other
        way. With a token go 4 bytes for the weight of each copy, whose gradients come back, and where its way is
        planned, which recompute does not, 4 for the copy's number there.
        """
        row = self.model_config.hidden_size * compute_dtype(self.recipe).itemsize
        copies = 4 * (self.model_config.num_experts_per_tok + (self.plan.shared_ranks > 0))
        planned = 1 + self.counts_ahead
        rows = (self.forwards + 1) * row
        return rows + (self.forwards + planned) * copies, rows + copies


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
    parallel = recipe.parallel
    topology = attempt(
        lambda: resolve_topology(parallel.expert, world, num_experts, per_node, parallel.tensor, parallel.expert_tensor)
    )
    plan = attempt(lambda: first_plan(recipe, config, topology)) if config and topology else None
    weights = recipe.model.weights
    if config and weights is not None:
        attempt(lambda: check_folder(Path(weights), FolderLayout(config)))
    accumulation = attempt(lambda: accumulation_steps(recipe.batch, topology.data if topology else world))
    if problems:
        raise type(problems[0])("\n".join(f"{path}: {line}" for error in problems for line in str(error).splitlines()))
    assert config is not None
    assert topology is not None
    assert plan is not None
    assert accumulation is not None
    return ResolvedRun(
        path=path,
        recipe=recipe,
        model_config=config,
        topology=topology,
        plan=plan,
        accumulation=accumulation,
        per_node=per_node,
    )


def first_plan(recipe: Recipe, config: PretrainedConfig, topology: Topology) -> SlotPlan:
    """Where experts lie before any load is known. Raises `TopologyError` for what the model or the layout rules out."""
    check_tensor(config, topology.tensor)
    parallel, profile = recipe.parallel, profile_of(config.model_type)
    experts, top_k, world = num_experts_of(config), config.num_experts_per_tok, topology.expert
    shared, redundant = parallel.shared_expert_ranks, parallel.redundant_experts
    ruled = default_counts(world, top_k, experts, shared == "auto", redundant == "auto")
    if shared == "auto":
        shared = ruled[0]
    if redundant == "auto":
        check_counts(experts, world, shared, 0)
        routed = world - shared
        redundant = ruled[1] if not shared or parallel.shared_expert_ranks == "auto" else routed - experts % routed
        redundant = min(redundant, experts * (routed - 1))  # no rank holds an expert twice
    check_counts(experts, world, shared, redundant)
    key = "shared_expert_ranks" if shared else "shared_expert_tensor" if parallel.shared_expert_tensor else ""
    if key and profile.names.shared_experts is None:
        raise TopologyError(
            f"parallel.{key} ({getattr(parallel, key)}): {config.model_type} has no shared experts; leave the key out "
            "or train a family that has them"
        )
    if parallel.shared_expert_tensor and topology.tensor == 1:
        raise TopologyError(
            "parallel.shared_expert_tensor (true) needs ranks that hold the same tokens, and parallel.tensor is 1: "
            "raise parallel.tensor or set this to false"
        )
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    if width % topology.expert_tensor:
        raise TopologyError(
            f"parallel.expert_tensor ({topology.expert_tensor}) must divide the experts' intermediate size ({width}): "
            "change model.config.moe_intermediate_size or the number"
        )
    if recipe.moe.replan_interval and not redundant:
        raise ConfigError(
            f"moe.replan_interval ({recipe.moe.replan_interval}) places redundant experts, and "
            "parallel.redundant_experts is 0: set one of them"
        )
    if recipe.moe.hash_layers or parallel.shared_expert_tensor:
        _check_blocks(recipe, config, topology)
    return plan_slots(experts, world, shared, redundant)


def _check_blocks(recipe: Recipe, config: PretrainedConfig, topology: Topology) -> None:
    """What only the model's own blocks tell: how many there are, and how wide their shared experts."""
    blocks, names = find_blocks(model := meta_model(recipe, config)), profile_of(config.model_type).names
    check_hash_layers(recipe, len(blocks))
    if recipe.parallel.shared_expert_tensor:
        shared = model.get_submodule(f"{blocks[0].name}.{names.shared_experts}")
        width = shared.get_submodule("down_proj").weight.shape[1]  # type: ignore[union-attr]
        if width % topology.tensor:
            raise TopologyError(
                f"parallel.shared_expert_tensor (true): the shared experts' intermediate size ({width}) must be a "
                f"multiple of parallel.tensor ({topology.tensor}): change either, or set this to false"
            )


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
    part = intermediate // run.topology.expert_tensor
    asked, most = run.recipe.precision.experts, max(run.plan.slots_per_rank)
    gemms = fp8_gemms(asked, device, config.hidden_size, part, most)
    backend = "fused" if gemms else run.recipe.moe.backend
    resolve_backend(backend, device, compute_dtype(run.recipe), config.hidden_size, part)
    optimizer_factory(run.recipe.optimizer, device)  # says so if its library is missing


def node_size(run: ResolvedRun) -> int | None:
    """Neighbouring ranks of an EP group on one host, for plans that keep rows there; None: the group is on one."""
    stride = run.topology.expert_tensor
    size = run.per_node // stride
    whole = size >= 1 and run.per_node % stride == 0 and run.topology.expert % size == 0
    return size if whole and size < run.topology.expert else None
