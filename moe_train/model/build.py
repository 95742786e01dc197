"""Hugging Face model -> the same model with its MoE blocks swapped for the parallel layer.

Built on the meta device; the dense part is then materialised everywhere and the experts only where they are held,
before any optimizer exists.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moe_train.config import Recipe
from moe_train.errors import ConfigError, RoutingError
from moe_train.model.family import aux_loss_coef, compute_dtype
from moe_train.model.initialize import draw_expert, materialise_dense
from moe_train.model.profiles import num_experts_of, profile_of
from moe_train.moe import (
    ExpertSource,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    Placement,
    resolve_backend,
    router_logits,
)
from moe_train.parallel import ParallelGroup


@dataclass(frozen=True, kw_only=True)
class SwappedBlock:
    """A family's MoE block as it was found: `name` in the model, its `experts` module (on the meta device)."""

    name: str
    experts: nn.Module
    index: int

    @property
    def experts_name(self) -> str:
        return f"{self.name}.{self.experts_attribute}"

    experts_attribute: str = "experts"


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """model: without experts as parameters. layers: the parallel layers in model order. context: what they share."""

    model: PreTrainedModel
    layers: list[ParallelMoELayer]
    context: MoEContext
    placement: Placement

    def biases(self) -> list[torch.Tensor]:
        """Correction-bias buffers of the routers, one per layer; empty if the family has none."""
        named = [(layer, layer.names.bias) for layer in self.layers]
        return [getattr(layer.get_submodule(layer.names.router), bias) for layer, bias in named if bias]


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


def build_model(
    recipe: Recipe,
    config: PretrainedConfig,
    group: ParallelGroup,
    device: torch.device,
    make_experts,
) -> BuiltModel:
    """Build, swap, materialise.

    Args:
        group: the EP group.
        make_experts: (block, initial weights: logical expert -> {parameter: tensor}) -> `ExpertSource` of this rank's
            slice. It decides how the slice is stored; it must ask for one expert at a time.
    """
    model = meta_model(recipe, config)
    profile = profile_of(config.model_type)
    blocks = find_blocks(model)
    placement = Placement(num_experts=num_experts_of(config), world_size=group.world_size)
    context = MoEContext(len(blocks), placement.num_experts, device)
    first = dict(blocks[0].experts.named_parameters(recurse=False))
    intermediate, hidden = first["down_proj"].shape[2], first["down_proj"].shape[1]
    backend = resolve_backend(recipe.moe.backend, device, compute_dtype(recipe), hidden, intermediate)
    options = LayerOptions(
        spec=profile.spec(config),
        placement=placement,
        backend=backend,
        aux_loss=aux_loss_coef(recipe, config) > 0,
        z_loss=recipe.moe.z_loss_coef > 0,
    )
    layers = []
    for block in blocks:
        draw = partial(draw_expert, model, block.experts, block.experts_name, device=device, seed=recipe.seed)
        layers.append(swap_block(model, block, options, group, context, make_experts(block, draw)))
    materialise_dense(model, device, recipe.seed)
    if recipe.model.activation_checkpointing:
        enable_checkpointing(model, context)
    model.train()
    return BuiltModel(model=model, layers=layers, context=context, placement=placement)


def swap_block(
    model: PreTrainedModel,
    block: SwappedBlock,
    options: LayerOptions,
    group: ParallelGroup,
    context: MoEContext,
    source: ExpertSource,
) -> ParallelMoELayer:
    """Put a parallel layer in a block's place; router and shared experts stay the family's own modules and names."""
    names = profile_of(model.config.model_type).names
    old = model.get_submodule(block.name)
    children = {name: child for name, child in old.named_children() if name != names.experts}
    router = children[names.router]
    # its parameters and name stay; only the arithmetic becomes ours: float32 logits, and nothing else
    router.forward = partial(_router_forward, router)  # type: ignore[method-assign]
    layer = ParallelMoELayer(
        children=children,
        names=names,
        experts=source,
        # a function, not a module: ZeRO-3 traces modules and wants the same trace on ranks with unequal experts
        activation=block.experts.act_fn.forward,  # type: ignore[union-attr]
        options=options,
        group=group,
        context=context,
        index=block.index,
    )
    parent, _, attribute = block.name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return layer


def _router_forward(router: nn.Module, x_TH: torch.Tensor) -> torch.Tensor:
    return router_logits(x_TH, router.weight)  # type: ignore[arg-type]


def enable_checkpointing(model: PreTrainedModel, context: MoEContext) -> None:
    """Recompute decoder layers; the second forward replays the first one's routing."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"model.activation_checkpointing (true): {type(model).__name__} does not support it")
    # transformers 5.23 renamed it and warns at the old name; both take these options first
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), context.recompute())})
