"""Hugging Face model -> the same model with its MoE blocks swapped for the parallel layer.

Built on the meta device; the dense part is then materialised everywhere and the experts only where they are held,
before any optimizer exists.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moe_train.config import Recipe
from moe_train.errors import ConfigError, RoutingError
from moe_train.model.dense import compile_attention, fuse_dense_layers
from moe_train.model.family import aux_loss_coef, compute_dtype, jitter_noise
from moe_train.model.forced import forced_shares
from moe_train.model.initialize import draw_expert, draw_modules, materialise_dense, seed_of
from moe_train.model.profiles import profile_of
from moe_train.model.tensor import apply_tensor_parallel
from moe_train.moe import (
    BorrowedModule,
    CapacityRouter,
    ExpertChoiceRouter,
    ExpertSource,
    ForcedRouter,
    HashRouter,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ParameterSource,
    Router,
    ScoreRouter,
    SharedBlock,
    SinkhornRouter,
    SlotPlan,
    SplitSharedExperts,
    balanced_table,
    fp8_gemms,
    resolve_backend,
    router_logits,
)
from moe_train.parallel import Groups

SCORE_ROUTERS: dict[str, type[ScoreRouter]] = {
    "top_k": ScoreRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
}
"""By `moe.router`."""


@dataclass(frozen=True, kw_only=True)
class SwappedBlock:
    """A family's MoE block as it was found, on the meta device.

    name: of the block in the model. experts: its stacked experts. shared: parts of it, by attribute name, whose
    parameters are kept outside of the model (empty: all of them stay children of the layer).
    """

    name: str
    experts: nn.Module
    index: int
    experts_attribute: str = "experts"
    shared: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def experts_name(self) -> str:
        return f"{self.name}.{self.experts_attribute}"


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """model: without experts as parameters. layers: the parallel layers in model order. context: what they share.
    is_forced: tokens go where a benchmark wants them."""

    model: PreTrainedModel
    layers: list[ParallelMoELayer]
    context: MoEContext
    is_forced: bool = False

    def biases(self) -> list[torch.Tensor | None]:
        """Correction-bias buffers of the routers, by layer; None where a layer's router has none to update."""
        return [_bias_of(layer) if layer.gate_router.balanced else None for layer in self.layers]

    def all_biases(self) -> list[torch.Tensor]:
        """Those of layers that route by a table too: a checkpoint holds what the family's does."""
        return [bias for bias in map(_bias_of, self.layers) if bias is not None]

    @property
    def num_experts(self) -> int:
        return self.context.counts_LE.shape[1]

    @property
    def num_balanced_layers(self) -> int:
        """Layers whose router takes part in router losses."""
        return sum(layer.gate_router.balanced for layer in self.layers)


def _bias_of(layer: ParallelMoELayer) -> torch.Tensor | None:
    return getattr(layer.get_submodule(layer.names.router), layer.names.bias) if layer.names.bias else None


Draw = Callable[..., dict[str, torch.Tensor]]


class Keeper(Protocol):
    """Who keeps the parameters that are not the model's own, and hands them to its layers."""

    def experts(self, block: SwappedBlock, draw: Draw, plan: SlotPlan) -> ExpertSource:
        """This rank's slots of a block. `draw(expert=e)`: initial weights of one logical expert by parameter name."""
        ...

    def shared(self, block: SwappedBlock, draw: Draw) -> ParameterSource | None:
        """This rank's part of `block.shared`, or None. `draw()`: initial values by `<attribute>.<parameter>`."""
        ...


def meta_model(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """The stock model, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=recipe.model.attention, dtype=torch.float32)


def find_blocks(model: PreTrainedModel) -> list[SwappedBlock]:
    """The MoE blocks, in order.

    Raises `RoutingError` when the profile's class is nowhere in the model or a block misses a part.
    """
    profile = profile_of(model.config.model_type)
    blocks = []
    for name, module in model.named_modules():
        if type(module).__name__ != profile.block:
            continue
        for attribute in (profile.names.router, profile.names.experts):
            if not hasattr(module, attribute):
                children = [child for child, _ in module.named_children()]
                raise RoutingError(
                    f"{name} ({profile.block}) has no `{attribute}`; its children are {children}: correct `names` of "
                    f"the {model.config.model_type} entry in moe_train/model/profiles.py"
                )
        experts = module.get_submodule(profile.names.experts)
        blocks.append(
            SwappedBlock(name=name, experts=experts, index=len(blocks), experts_attribute=profile.names.experts)
        )
    if not blocks:
        raise RoutingError(
            f"{type(model).__name__} has no {profile.block}: check the fields under model.config that decide which "
            "layers are sparse (mlp_only_layers, decoder_sparse_step, first_k_dense_replace)"
        )
    return blocks


def check_hash_layers(recipe: Recipe, num_layers: int) -> None:
    """Raises `ConfigError` if there are fewer MoE layers than are to hash, or none left for what balances scores."""
    hashed = recipe.moe.hash_layers
    if hashed > num_layers:
        raise ConfigError(
            f"moe.hash_layers ({hashed}) exceeds the {num_layers} MoE layers of the model: set at most {num_layers}"
        )
    for key in ("aux_loss_coef", "z_loss_coef", "bias_update_rate"):
        if hashed == num_layers and getattr(recipe.moe, key):
            raise ConfigError(
                f"moe.{key} ({getattr(recipe.moe, key)}) acts on layers that route by scores, and moe.hash_layers "
                f"({hashed}) leaves none of the {num_layers}: set one of them to 0"
            )
    if hashed == num_layers and recipe.moe.router != "top_k":
        raise ConfigError(
            f"moe.router ({recipe.moe.router}) is how layers choose by scores, and moe.hash_layers ({hashed}) leaves "
            f"none of the {num_layers}: set moe.router to top_k or moe.hash_layers lower"
        )


def build_model(
    recipe: Recipe,
    config: PretrainedConfig,
    groups: Groups,
    plan: SlotPlan,
    device: torch.device,
    keeper: Keeper,
    ranks_per_node: int | None = None,
    drawn_on: torch.device | None = None,
) -> BuiltModel:
    """Build, swap, materialise.

    Args:
        plan: of every layer, to begin with.
        keeper: decides how experts are stored; it must ask for one expert at a time.
        drawn_on: whose generator the initial values come from; by default the device's. They differ by kind of device.
    """
    source = drawn_on or device
    model = meta_model(recipe, config)
    blocks = find_blocks(model)
    check_hash_layers(recipe, len(blocks))
    context = MoEContext(len(blocks), plan.num_experts, device)
    if recipe.moe.bias_update_rate and recipe.moe.bias_update == "quantile":
        context.quantiles_LE = torch.zeros(context.counts_LE.shape, dtype=torch.float64, device=device)
    if recipe.moe.capacity_factor is not None:
        context.kept_LE = torch.zeros_like(context.counts_LE)
    first = dict(blocks[0].experts.named_parameters(recurse=False))
    intermediate, hidden = first["down_proj"].shape[2], first["down_proj"].shape[1]
    part = intermediate // groups.expert_tensor.world_size
    gemms = fp8_gemms(recipe.precision.experts, device, hidden, part, max(plan.slots_per_rank))
    options = LayerOptions(
        backend=resolve_backend(
            "fused" if gemms else recipe.moe.backend,
            device,
            compute_dtype(recipe),
            hidden,
            part,
            hidden_act=getattr(config, "hidden_act", ""),
        ),
        aux_loss=aux_loss_coef(recipe, config) > 0,
        z_loss=recipe.moe.z_loss_coef > 0,
        aux_over=recipe.moe.aux_loss,
        route_after_dp_transform=recipe.moe.route_after_dp_transform,
        jitter=jitter_noise(config),
        jitter_seed=seed_of(recipe.seed, "router jitter"),
        ranks_per_node=ranks_per_node,
        fp8=gemms,
    )
    layers = []
    for block in blocks:
        block = with_shared_outside(model, block, recipe, plan)
        draw = partial(draw_expert, model, block.experts, block.experts_name, device=source, seed=recipe.seed)
        draw_shared = partial(draw_modules, model, block.shared, block.name, device=source, seed=recipe.seed)
        layer = swap_block(
            model,
            block,
            options,
            groups,
            context,
            plan,
            keeper.experts(block, draw, plan),
            keeper.shared(block, draw_shared) if block.shared else None,
            _router(block, recipe, config, device),
        )
        layers.append(layer)
    materialise_dense(model, source, recipe.seed)
    nn.Module.to(model, device)
    apply_tensor_parallel(model, groups.tensor)
    fuse_dense_layers(model, recipe.model.kernels, device)
    if recipe.model.compile and device.type == "cuda":
        compile_attention(model)
    for layer in layers:
        layer.sum_partial_gradients()
    if recipe.moe.hash_layers:
        model.register_forward_pre_hook(partial(_note_input_ids, context), with_kwargs=True)
    if recipe.model.activation_checkpointing:
        enable_checkpointing(model, context)
    model.train()
    return BuiltModel(model=model, layers=layers, context=context, is_forced=recipe.moe.force_load is not None)


def _router(block: SwappedBlock, recipe: Recipe, config: PretrainedConfig, device: torch.device) -> Router:
    """By scores, in the first `moe.hash_layers` by a table of token ids that the recipe's seed decides, or forced."""
    profile = profile_of(config.model_type)
    spec = profile.spec(config)
    if recipe.moe.force_load is not None:
        router = ForcedRouter(spec, profile.names.bias, forced_shares(recipe, config))
    elif block.index >= recipe.moe.hash_layers:
        router = SCORE_ROUTERS[recipe.moe.router](spec, profile.names.bias)
    else:
        table = hash_table(block, recipe, config).to(device)
        router = HashRouter(spec, lambda gate: table)
    if recipe.moe.capacity_factor is None:
        return router
    return CapacityRouter(router, recipe.moe.capacity_factor, recipe.moe.drop)


def hash_table(block: SwappedBlock, recipe: Recipe, config: PretrainedConfig) -> torch.Tensor:
    """Experts of each token id [V, K], by the recipe's seed and the block's name."""
    spec = profile_of(config.model_type).spec(config)
    seed = seed_of(recipe.seed, block.name, "tid2eid")
    return balanced_table(config.vocab_size, spec.num_experts, spec.top_k, seed)


def with_shared_outside(model: PreTrainedModel, block: SwappedBlock, recipe: Recipe, plan: SlotPlan) -> SwappedBlock:
    """Which of the block's shared parts the layer does not own: those on ranks of their own, or cut over ranks."""
    names = profile_of(model.config.model_type).names
    if plan.shared_ranks:
        outside = [names.shared_experts, names.shared_experts_gate]
    else:
        outside = [names.shared_experts] if recipe.parallel.shared_expert_tensor else []
    old = model.get_submodule(block.name)
    return replace(block, shared={name: old.get_submodule(name) for name in outside if name is not None})


def swap_block(
    model: PreTrainedModel,
    block: SwappedBlock,
    options: LayerOptions,
    groups: Groups,
    context: MoEContext,
    plan: SlotPlan,
    source: ExpertSource,
    shared_source: ParameterSource | None,
    router: Router,
) -> ParallelMoELayer:
    """Put a parallel layer in a block's place; router and shared experts stay the family's own modules and names."""
    names = profile_of(model.config.model_type).names
    old = model.get_submodule(block.name)
    kept_out = {names.experts, *block.shared}
    children = {name: child for name, child in old.named_children() if name not in kept_out}
    gate = children[names.router]
    # its parameters and name stay; only the arithmetic becomes ours: float32 logits, and nothing else
    gate.forward = partial(_router_forward, gate)  # type: ignore[method-assign]
    external, split = None, None
    if shared_source is not None:
        borrowed = BorrowedModule(SharedBlock(block.shared), shared_source)
        external = borrowed if plan.shared_ranks else None
        split = None if plan.shared_ranks else SplitSharedExperts(borrowed, groups.tensor)
    layer = ParallelMoELayer(
        children=children,
        names=names,
        router=router,
        experts=source,
        # a function, not a module: ZeRO-3 traces modules and wants the same trace on ranks with unequal experts
        activation=block.experts.act_fn.forward,  # type: ignore[union-attr]
        plan=plan,
        options=options,
        groups=groups,
        context=context,
        index=block.index,
        external_shared=external,
        split_shared=split,
    )
    parent, _, attribute = block.name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return layer


def _note_input_ids(context: MoEContext, module: nn.Module, args: tuple, kwargs: dict) -> None:
    context.input_ids = kwargs.get("input_ids", args[0] if args else None)


def _router_forward(router: nn.Module, x_TH: torch.Tensor) -> torch.Tensor:
    return router_logits(x_TH, router.weight)  # type: ignore[arg-type]


def enable_checkpointing(model: PreTrainedModel, context: MoEContext) -> None:
    """Recompute decoder layers; the second forward replays the first one's routing."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"model.activation_checkpointing (true): {type(model).__name__} does not support it")
    # transformers 5.23 renamed it and warns at the old name; both take these options first
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), context.recompute())})
