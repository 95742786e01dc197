"""A resolved recipe -> everything a training loop needs, in the order it must be made."""

from dataclasses import dataclass

import torch

from moe_train.data.open import TrainData, open_data
from moe_train.data.prepare import Progress as PrepareProgress
from moe_train.errors import DataError, MoeTrainError
from moe_train.model import BuiltModel, SwappedBlock, build_model, compute_dtype
from moe_train.model.initialize import seed_of
from moe_train.moe import Placement
from moe_train.optim import (
    Engine,
    ExpertStore,
    ExpertTensor,
    LayerExperts,
    ShardOptions,
    decays,
    optimizer_factory,
)
from moe_train.parallel import Groups, raise_together
from moe_train.train.check import ResolvedRun


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model on its devices, its optimizers and its data."""

    run: ResolvedRun
    groups: Groups
    device: torch.device
    built: BuiltModel
    engine: Engine
    data: TrainData


def assemble(
    run: ResolvedRun, groups: Groups, device: torch.device, prepare_progress: PrepareProgress | None = None
) -> Assembly:
    """Data first (it fails most often), then model, experts and optimizers. Collective."""
    return assemble_around(open_data_together(run, groups, prepare_progress), run, groups, device)


def assemble_around(data: TrainData, run: ResolvedRun, groups: Groups, device: torch.device) -> Assembly:
    """Model, experts and optimizers, for data that is open. Collective."""
    built, store = build_sharded_model(run, groups, device)
    engine = Engine(
        built.model, store, optimizer_factory(run.recipe.optimizer, state_device(run, device)), run.recipe, groups,
        run.accumulation,
    )  # fmt: skip
    torch.manual_seed(seed_of(run.recipe.seed, "rank", groups.rank))  # each rank its own stream, on CPU and GPU
    return Assembly(run=run, groups=groups, device=device, built=built, engine=engine, data=data)


def open_data_together(run: ResolvedRun, groups: Groups, progress: PrepareProgress | None) -> TrainData:
    """Every rank opens the data, or every rank raises the same error."""
    data, error = None, None
    try:
        data = open_data(run.recipe.data, run.model_config.vocab_size, run.recipe.seed, progress)
    except MoeTrainError as caught:
        error = caught
    except OSError as caught:  # one host's disk must not leave the other hosts waiting
        error = DataError(f"{caught.filename}: {caught.strerror}")
    raise_together(groups.world, error)
    assert data is not None
    return data


def state_device(run: ResolvedRun, device: torch.device) -> torch.device:
    return torch.device("cpu") if run.recipe.zero.offload == "cpu" else device


def build_sharded_model(
    run: ResolvedRun, groups: Groups, device: torch.device, compute: torch.dtype | None = None
) -> tuple[BuiltModel, ExpertStore]:
    """The model with its blocks swapped, its expert slices in a store. Collective (the store publishes its weights).

    Args:
        compute: type of the expert weights, if not the recipe's (a certificate computes in float64).
    """
    recipe = run.recipe
    options = ShardOptions(
        stage=recipe.zero.stage,
        compute_dtype=compute or compute_dtype(recipe),
        grad_dtype=torch.bfloat16 if recipe.precision.gradients == "bf16" else torch.float32,
        device=device,
        state_device=state_device(run, device),
        keep_gathered=recipe.model.activation_checkpointing,
    )
    tensors: list[ExpertTensor] = []

    def make_experts(block: SwappedBlock, draw) -> LayerExperts:
        placement = Placement(num_experts=block.experts.num_experts, world_size=groups.expert.world_size)  # type: ignore
        first, count = placement.slices[groups.expert.rank_in_group]
        shapes = {name: tuple(p.shape[1:]) for name, p in block.experts.named_parameters(recurse=False)}
        parts = {
            name: ExpertTensor(f"{block.experts_name}.{name}", first, count, shape, groups.expert_data, options)
            for name, shape in shapes.items()
        }
        for expert in range(first, first + count):
            for name, value in draw(expert=expert).items():
                parts[name].write_expert(expert, value)
        tensors.extend(parts.values())
        return LayerExperts(parts["gate_up_proj"], parts["down_proj"])

    built = build_model(recipe, run.model_config, groups.expert, device, make_experts)
    factory = optimizer_factory(recipe.optimizer, options.state_device)
    store = ExpertStore(tensors, factory, decays(recipe.optimizer), groups.world)
    store.publish()
    return built, store
