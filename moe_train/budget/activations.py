"""Bytes that autograd keeps between forward and backward of one micro-batch, found by running the model without memory.

The model's own code runs on meta tensors (shapes without values), layer by layer, and every tensor that autograd saves
is counted once per storage, weights left out. MoE layers run too, the router, dispatch and combine as they are; only
how many rows arrive is not decided by a router but given: a fair share, times a factor.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from moe_train.config import Recipe
from moe_train.model import aux_loss_coef, compute_dtype
from moe_train.model.build import SwappedBlock, find_blocks, meta_model, swap_block
from moe_train.model.dense import fuse_dense_layers
from moe_train.model.head import linear_cross_entropy
from moe_train.model.profiles import profile_of
from moe_train.moe import LayerOptions, MoEContext, ParallelMoELayer, ResidentExperts, ScoreRouter, SlotPlan
from moe_train.moe.dispatch import DispatchPlan, Travel, by_expert, combine, dispatch
from moe_train.moe.experts import loop_experts
from moe_train.parallel import Topology, build_groups

META, CUDA = torch.device("meta"), torch.device("cuda")


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one micro-batch on a rank.

    layers: what each decoder layer keeps. inputs: of them, what stays under activation checkpointing. rest: embedding,
    final norm, head and loss.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    rest: int

    def peak(self, checkpointing: bool) -> int:
        """With checkpointing: the inputs of all layers, and everything of the one that is being recomputed."""
        if not checkpointing:
            return sum(self.layers) + self.rest
        return sum(self.inputs) + max(self.layers) + self.rest


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Of one rank's experts: how many rows they get, how wide each is here, and of how many tokens the rows are, those
    of other ranks included; None: of all that the rank has, and of no other's."""

    received: int
    width: int
    visits: int | None = None


def count_activations(
    recipe: Recipe,
    config: PretrainedConfig,
    tokens: tuple[int, int],
    rows: Rows,
    fused: bool = False,
    device: torch.device = CUDA,
) -> Activations:
    """Args:
    tokens: [sequences, length] of a micro-batch.
    rows: of the experts on this rank, in every MoE layer.
    fused: `moe.backend` is so.
    device: whose defaults `model.kernels` has.

    Tensor parallelism of the dense part is not in it: there, this is an upper bound.
    """
    dtype = compute_dtype(recipe)
    model = meta_model(recipe, config)
    nn.Module.to(model, dtype)
    experts = _swap_blocks(model, recipe, rows, fused)
    fuse_dense_layers(model, recipe.model.kernels, device)
    model.train()
    saved = SavedTensors(model, experts)
    backbone: Any = model.model
    ids = torch.zeros(tokens, dtype=torch.int64, device=META)
    places = torch.arange(tokens[1], device=META).unsqueeze(0)
    layers, inputs = [], []
    attention = _FusedAttention() if recipe.model.attention != "eager" else nullcontext()
    with saved.counting(), attention:
        hidden = backbone.embed_tokens(ids)
        angles = backbone.rotary_emb(hidden, places)
        rest = saved.take()
        for layer in backbone.layers:
            inputs.append(hidden.nbytes)
            hidden = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=angles)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            layers.append(saved.take())
        head: Any = model.get_output_embeddings()
        linear_cross_entropy(backbone.norm(hidden).flatten(0, 1), head.weight, ids.flatten())
        rest += saved.take()
    return Activations(layers=tuple(layers), inputs=tuple(inputs), rest=rest)


class SavedTensors:
    """Bytes of what autograd saves, each storage once, without those of the model's own parameters and buffers."""

    def __init__(self, model: nn.Module, others: tuple[torch.Tensor, ...] = ()):
        held = [*model.parameters(), *model.buffers(), *others]
        self._known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in held}
        self._bytes = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage  # kept alive, so that no other storage gets its address
            self._bytes += storage.nbytes()
        return tensor

    def take(self) -> int:
        """Since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def _swap_blocks(model: PreTrainedModel, recipe: Recipe, rows: Rows, fused: bool) -> tuple[torch.Tensor, ...]:
    """The parallel layer in the place of each block, for one rank, with a given number of rows for its experts.

    Returns their weights.
    """
    config, dtype = model.config, compute_dtype(recipe)
    profile, blocks = profile_of(config.model_type), find_blocks(model)
    spec = profile.spec(config)
    options = LayerOptions(
        backend="fused" if fused else "loop",
        aux_loss=aux_loss_coef(recipe, config) > 0,
        z_loss=recipe.moe.z_loss_coef > 0,
        aux_over=recipe.moe.aux_loss,
    )
    context = MoEContext(len(blocks), spec.num_experts, META)
    groups, plan = build_groups(Topology(world=1, expert=1)), SlotPlan(spec.num_experts, 1)
    held: list[torch.Tensor] = []
    for block in blocks:
        weights = _weights(block, rows.width, dtype)
        held += weights
        source = ResidentExperts(weights[0], weights[1])
        router = ScoreRouter(spec, profile.names.bias)
        layer = swap_block(model, block, options, groups, context, plan, source, None, router)
        layer.run_routed = partial(_run_given_rows, layer, rows, fused)  # type: ignore[method-assign]
    return tuple(held)


def _weights(block: SwappedBlock, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Leaves in the shapes of one rank's experts; how many there are changes nothing that is saved."""
    hidden = block.experts.get_parameter("down_proj").shape[1]
    return [
        torch.empty(1, rows, columns, dtype=dtype, device=META, requires_grad=True)
        for rows, columns in ((2 * width, hidden), (hidden, width))
    ]


def _run_given_rows(
    layer: ParallelMoELayer, rows: Rows, fused: bool, x_MH: torch.Tensor, weights_MK: torch.Tensor, plan: DispatchPlan
) -> torch.Tensor:
    """Tokens through experts that get as many rows as are given, of as many tokens as visit this rank."""
    if rows.visits is not None:  # as if this rank sent so many, to itself
        place_MK = plan.maps.place_R.view(weights_MK.shape)
        visits = Travel(rank=0, place_TC=place_MK, send_rows=[rows.visits], recv_rows=[rows.visits], copies_sent=[0])
        plan = replace(plan, travel=visits)
    x_NH, weights_NK = dispatch(x_MH, weights_MK, plan, layer.group)
    with layer.expert_source.fetch() as weights:
        if fused:
            both = weights.gate_up_LIH, weights.down_LHI
            y_NH: Any = _FusedExperts.apply(x_NH, weights_NK, plan.rows_per_slot, *both, rows.received)
        else:  # the grouped backend saves the same, and knows no meta tensors of float32
            place_R = torch.empty(weights_NK.numel(), dtype=torch.int64, device=META)
            maps = replace(plan.maps, place_R=place_R, counts_D=torch.tensor([rows.received]))
            here = replace(plan, maps=maps, num_rows=rows.received)
            y_NH = by_expert(x_NH, weights_NK, here, lambda r, n: loop_experts(r, n, weights, layer.activation))
    return combine(y_NH, plan, layer.group)


class _FusedExperts(torch.autograd.Function):
    """What `kernels.local_experts` saves: tokens, weights, the pre-activation of every row, the maps, and where each
    expert's rows end (and on Hopper 12 bytes for each 128 rows, and up to 63 columns of each row of the pre-activation
    that no multiple of 64 has: 7 % of 720)."""

    @staticmethod
    def forward(ctx, x_MH, weights_MK, rows_per_slot, gate_up_LIH, down_LHI, number):
        h_N2I = x_MH.new_empty(number, gate_up_LIH.shape[1])
        maps = [torch.empty(size, dtype=torch.int64, device=META) for size in (number, weights_MK.numel())]
        offsets_L = torch.empty(len(rows_per_slot), dtype=torch.int32, device=META)
        ctx.save_for_backward(x_MH, weights_MK, gate_up_LIH, down_LHI, h_N2I, offsets_L, *maps)
        return torch.empty_like(x_MH)

    @staticmethod
    def backward(ctx, *grads):
        dx_MH, dweights_MK, dgate_up, ddown = (torch.empty_like(x) for x in ctx.saved_tensors[:4])
        return dx_MH, dweights_MK, None, dgate_up, ddown, None


class _FlashAttention(torch.autograd.Function):
    """What any fused attention saves: its inputs, its output and one float32 per query."""

    @staticmethod
    def forward(ctx, query, key, value):
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it out
        ctx.save_for_backward(query, key, value, out, out.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """Meta tensors would take the unfused path, which keeps the scores."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))
