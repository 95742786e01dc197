"""A recipe -> the same recipe around a model small enough to run at every layout. Pure: nothing is built or opened.

Kept: family, options of router, losses, optimizer and schedule, which layers are sparse, seed, raw DeepSpeed keys.
Changed, each for the reason beside it: sizes, and constants that would make an error too small to see.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from moe_train.config import Recipe, parse_recipe
from moe_train.errors import ConfigError, MoeTrainError
from moe_train.model import aux_loss_coef, check_tensor, load_model_config, num_experts_of
from moe_train.model.profiles import profile_of
from moe_train.moe import KERNEL_BACKENDS, resolve_backend
from moe_train.moe.experts import activation_name
from moe_train.verify.grid import PRECISIONS, Device, Layout, Precision, Traits

STEPS = 3
"""Optimizer steps: the second shows what the first left behind, the third what the second did to the moments."""
HIDDEN, HEADS, VOCAB, SEQUENCE = 32, 4, 61, 16
EXPERTS = 6
"""Uneven on 4 ranks (2, 2, 1, 1)."""
MAX_SEQUENCES = 64


def shrink(recipe: Recipe, worlds: Sequence[int]) -> Recipe:
    """The recipe that is certified; its global batch is a multiple of each world.

    Raises `ConfigError` for a recipe whose numbers are random or depend on the layout by design.
    """
    config = load_model_config(recipe)
    _refuse_random(config)
    tree = recipe.model_dump(mode="json")
    if recipe.model.weights is not None:  # a smaller model has no use for them
        tree["model"] |= {"path": recipe.model.weights, "weights": None}
    tree["model"]["config"] = {**recipe.model.config, **small_fields(config)}
    if recipe.model.attention == "flash_attention_2":
        tree["model"]["attention"] = "sdpa"  # which CPUs and float32 have too
    tree["model"]["compile"] = False  # layouts of tensor parallelism and ZeRO-3 cannot have it
    tree["precision"] = {"compute": "fp32", "gradients": "fp32"}
    tree["zero"]["offload"] = "none"  # on a CPU it moves nothing, on GPUs it is another optimizer
    tree["data"]["sequence_length"] = SEQUENCE
    tree["batch"] = {"global_size": global_batch(worlds), "micro_size": 1}
    tree["train"] = {"steps": STEPS}
    tree["parallel"] = {}  # a layout says them all
    warmup = min(recipe.schedule.warmup_steps, 1)
    tree["schedule"] |= {"warmup_steps": warmup, "decay_steps": 1 if recipe.schedule.decay_steps else None}
    tree["optimizer"] |= _optimizer(recipe)
    tree["moe"] |= _moe(recipe, config)
    tree["diagnostics"]["guards"] = []  # they act between steps, on what they see
    tree["world_sizes"] = []
    tree["checkpoint"] = {}
    tree["tracking"] = {"mode": "disabled"}
    return parse_recipe(tree)


def at_layout(recipe: Recipe, layout: Layout) -> Recipe:
    """A shrunk recipe as this layout runs it."""
    tree = recipe.model_dump(mode="json")
    tree["parallel"] |= {
        "expert": layout.expert,
        "tensor": layout.tensor,
        "expert_tensor": layout.expert_tensor,
        "redundant_experts": layout.redundant,
        "shared_expert_ranks": layout.shared_ranks,
        "shared_expert_tensor": layout.shared == "split",
    }
    tree["moe"]["route_after_dp_transform"] = layout.after
    tree["zero"]["stage"] = layout.stage
    tree["batch"]["micro_size"] = layout.micro_size
    tree["model"]["activation_checkpointing"] = layout.recompute
    tree["moe"]["backend"] = layout.backend
    tree["precision"] = {"compute": "bf16" if layout.precision == "bf16" else "fp32", "gradients": "fp32"}
    return parse_recipe(tree)


def traits_of(recipe: Recipe, device: Device = "cpu", precisions: Sequence[Precision] = PRECISIONS) -> Traits:
    """What of a shrunk recipe, and of the device that it is to run on, decides which layouts it has.

    Raises `ConfigError` if it asks for `moe.backend: fused`, and Triton does not run there.
    """
    config = load_model_config(recipe)
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    fused = recipe.moe.backend in KERNEL_BACKENDS  # hopper differs from fused in its GEMMs alone, and needs a GPU
    if fused:
        resolve_backend("fused", torch.device(device), torch.float32, config.hidden_size, width)
    elif device == "cuda":
        fused = why_not_fused(config) is None
    sizes = []
    for size in range(1, HEADS + 1):
        try:
            check_tensor(config, size)
        except MoeTrainError:
            continue
        sizes.append(size)
    return Traits(
        num_experts=num_experts_of(config),
        has_shared=profile_of(config.model_type).names.shared_experts is not None,
        tensors=tuple(sizes),
        width=width,
        whole_sequences=recipe.moe.whole_sequences,
        fused=fused,
        device=device,
        precisions=tuple(precisions),
    )


def why_not_fused(config: PretrainedConfig) -> str | None:
    """What keeps GPUs from running a recipe's experts by `moe.backend: fused`; None: nothing does."""
    try:
        resolve_backend("fused", torch.device("cuda"), torch.bfloat16, HIDDEN, 8)
        activation_name(ACT2FN[config.hidden_act])
    except ConfigError as error:
        return str(error)
    return None


def global_batch(worlds: Sequence[int]) -> int:
    """Sequences per step: a multiple of every world, at least 8 and at least 2 per rank."""
    unit = math.lcm(*worlds)
    size = unit * -(-max(8, 2 * max(worlds)) // unit)
    if size > MAX_SEQUENCES:
        raise ConfigError(
            f"--world ({','.join(map(str, worlds))}): one batch for all of them needs {size} sequences, more than "
            f"{MAX_SEQUENCES}: name worlds with smaller common multiples"
        )
    return size


def small_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of the family's configuration to override."""
    profile = profile_of(config.model_type)
    experts = getattr(config, profile.num_experts)
    dense_first = bool(getattr(config, "first_k_dense_replace", 0))
    dense_only, sparse_step = getattr(config, "mlp_only_layers", None), getattr(config, "decoder_sparse_step", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    latent = hasattr(config, "kv_lora_rank")
    wanted = {
        "vocab_size": VOCAB,
        "pad_token_id": None,  # its embedding is zero and stays zero: all experts' scores tie
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3 if dense_first or dense_only or sparse_step > 1 else 2,
        "first_k_dense_replace": int(dense_first),
        "mlp_only_layers": [0] if dense_only else [],
        "decoder_sparse_step": min(sparse_step, 2),
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if kv_heads == config.num_attention_heads else min(kv_heads, HEADS // 2),
        "intermediate_size": 96,
        "moe_intermediate_size": 96,  # a quarter of it is a multiple of 8, as grouped GEMMs in bf16 want
        "shared_expert_intermediate_size": 40,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "max_position_embeddings": 2 * SEQUENCE,
        # activations keep their size through the layers: every part has a gradient that is large against rounding
        "initializer_range": HIDDEN**-0.5,
        profile.num_experts: min(experts, EXPERTS),
        "num_experts_per_tok": min(config.num_experts_per_tok, 3),
    }
    if getattr(config, "q_lora_rank", None):
        wanted["q_lora_rank"] = 16
    if latent:
        wanted |= {"head_dim": 8, "qk_head_dim": 16}  # derived by the family, and written into its config.json
    elif getattr(config, "head_dim", None):
        same = config.head_dim == config.hidden_size // config.num_attention_heads
        wanted["head_dim"] = HIDDEN // HEADS * (1 if same else 2)
    if (getattr(config, "n_group", 1) or 1) > 1:
        limited = config.topk_group < config.n_group
        wanted |= {profile.num_experts: EXPERTS, "n_group": 3, "topk_group": 2 if limited else 3}
    if getattr(config, "layer_types", None):
        wanted["layer_types"] = list(config.layer_types)[: wanted["num_hidden_layers"]]
    return {name: value for name, value in wanted.items() if hasattr(config, name)}


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    one_pass = recipe.optimizer.name == "one_pass_adamw"
    return {
        "name": "one_pass_adamw" if one_pass else "adamw",  # the others need a GPU, and compute the same
        "lr": 0.01,  # three steps must change the numbers of the next one
        # Adam divides by the gradient's size: at 1e-8 the rounding of an element that should be 0 becomes a step of lr;
        # clipped gradients are about 1e-3 here
        "eps": max(recipe.optimizer.eps, 1e-5),
        "grad_clip": 0.1 if recipe.optimizer.grad_clip else 0.0,  # binds at every step; the oracle makes sure
    }


def _moe(recipe: Recipe, config: PretrainedConfig) -> dict[str, Any]:
    """Weights of the router losses that were on: large enough that a wrong factor shows in float32 gradients."""
    aux, z, rate = aux_loss_coef(recipe, config), recipe.moe.z_loss_coef, recipe.moe.bias_update_rate
    capacity, forced = recipe.moe.capacity_factor, recipe.moe.force_load
    if forced is not None and forced.histogram is not None:
        forced = forced.model_copy(update={"histogram": None, "zipf": 1.0})  # of another number of experts
    return {
        "force_load": forced.model_dump() if forced else None,
        "aux_loss_coef": max(aux, 0.05) if aux else 0.0,
        "z_loss_coef": max(z, 0.01) if z else 0.0,
        "bias_update_rate": max(rate, 0.02) if rate else 0.0,
        "capacity_factor": min(capacity, 1.0) if capacity else None,  # so that something is dropped
        "hash_layers": min(recipe.moe.hash_layers, 1),  # one of the two MoE layers, so that one is routed by scores
        "replan_interval": 0,  # certified at every layout with redundant experts, between two steps
    }


def _refuse_random(config: PretrainedConfig) -> None:
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float) and value > 0:
            raise ConfigError(
                f"model.config.{name} ({value}): a certificate compares numbers, and dropout draws them anew at every "
                "layout: set it to 0.0 to certify the rest"
            )
