"""A resolved recipe -> everything a training loop needs, in the order it must be made."""

from dataclasses import dataclass

import torch

from moe_train.data.open import TrainData, open_data
from moe_train.data.prepare import Progress as PrepareProgress
from moe_train.errors import DataError, MoeTrainError
from moe_train.model import BuiltModel, Draw, SwappedBlock, build_model, compute_dtype
from moe_train.model.initialize import seed_of
from moe_train.moe import SlotPlan
from moe_train.optim import (
    Engine,
    ExpertStore,
    ExpertTensor,
    LayerExperts,
    ShardOptions,
    SharedExpertSource,
    TensorSlice,
    decays,
    optimizer_factory,
)
from moe_train.parallel import Groups, ParallelGroup, raise_together
from moe_train.parallel.tensor_slice import mlp_part
from moe_train.train.check import ResolvedRun, node_size


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


def assemble_around(
    data: TrainData, run: ResolvedRun, groups: Groups, device: torch.device, drawn_on: torch.device | None = None
) -> Assembly:
    """Model, experts and optimizers, for data that is open. Collective. drawn_on: see `build_model`."""
    built, store = build_sharded_model(run, groups, device, drawn_on=drawn_on)
    engine = Engine(
        built.model, store, optimizer_factory(run.recipe.optimizer, state_device(run, device)), run.recipe, groups,
        run.accumulation,
    )  # fmt: skip
    # each data-parallel rank its own stream, on CPU and GPU; tensor peers drop the same activations
    torch.manual_seed(seed_of(run.recipe.seed, "rank", groups.data.rank_in_group))
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
    run: ResolvedRun,
    groups: Groups,
    device: torch.device,
    compute: torch.dtype | None = None,
    drawn_on: torch.device | None = None,
) -> tuple[BuiltModel, ExpertStore]:
    """The model with its blocks swapped, its expert slices in a store. Collective (the store publishes its weights).

    Args:
        compute: type of the expert weights, if not the recipe's (a certificate computes in float64).
        drawn_on: see `build_model`.
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
    keeper = StoreKeeper(groups, options, run.plan)
    built = build_model(recipe, run.model_config, groups, run.plan, device, keeper, node_size(run), drawn_on)
    factory = optimizer_factory(recipe.optimizer, options.state_device, experts=True)
    store = ExpertStore(keeper.tensors, factory, decays(recipe.optimizer), groups.world, groups.data.world_size)
    store.publish()
    return built, store


class StoreKeeper:
    """Keeps what the model does not own in `ExpertTensor`s: a `Keeper`.

    tensors: in the order of the layers, the same on every rank.
    """

    def __init__(self, groups: Groups, options: ShardOptions, plan: SlotPlan):
        self.groups, self.options, self.plan = groups, options, plan
        self.tensors: list[ExpertTensor] = []

    def experts(self, block: SwappedBlock, draw: Draw, plan: SlotPlan) -> LayerExperts:
        groups = self.groups
        shapes = {name: tuple(p.shape[1:]) for name, p in block.experts.named_parameters(recurse=False)}
        parts = {
            name: ExpertTensor.routed(
                f"{block.experts_name}.{name}",
                plan,
                shape,
                groups.expert,
                groups.expert_data,
                self.options,
                _cut(name, shape, groups.expert_tensor),
            )
            for name, shape in shapes.items()
        }
        first, count = plan.home(groups.expert.rank_in_group)
        for expert in range(first, first + count):
            for name, value in draw(expert=expert).items():
                parts[name].write_expert(expert, value)
        self.tensors.extend(parts.values())
        return LayerExperts(parts["gate_up_proj"], parts["down_proj"])

    def shared(self, block: SwappedBlock, draw: Draw) -> SharedExpertSource | None:
        external = self.plan.shared_ranks > 0
        group = self.groups.shared_holders(self.plan.shared_ranks) if external else self.groups.data
        cut_over = ParallelGroup.single() if external else self.groups.tensor
        units = [None] if group is not None else []
        parts = {}
        for attribute, module in block.shared.items():
            for name, parameter in module.named_parameters():
                key, shape = f"{attribute}.{name}", tuple(parameter.shape)
                part = _cut(name, shape, cut_over)
                holders = group or ParallelGroup.single()
                parts[key] = ExpertTensor(f"{block.name}.{key}", units, shape, holders, self.options, part=part)
        self.tensors.extend(parts.values())
        if group is None:
            return None
        for key, value in draw().items():
            parts[key].write_expert(None, value)
        return SharedExpertSource(parts)


def _cut(name: str, shape: tuple[int, ...], group: ParallelGroup) -> TensorSlice | None:
    """This rank's part of a gated MLP's matrix."""
    return None if group.world_size == 1 else mlp_part(name, shape, group.rank_in_group, group.world_size)
