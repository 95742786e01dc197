"""Recipe -> Hugging Face configuration, with the checks that Hugging Face leaves out."""

import difflib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moe_train.config.schema import ModelSection, Recipe
from moe_train.errors import ConfigError
from moe_train.model.forced import forced_shares
from moe_train.model.profiles import num_experts_of, profile_of

OWNED_CONFIG_FIELDS = {
    "dtype": "precision.compute",
    "torch_dtype": "precision.compute",
    "attn_implementation": "model.attention",
}
"""Fields of a Hugging Face configuration that a recipe key decides."""
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "moe_intermediate_size", "head_dim", "decoder_sparse_step"),
)
"""Hugging Face builds a model with some of these at 0 and divides by others."""


def load_model_config(recipe: Recipe, vocab_size: int | None = None) -> PretrainedConfig:
    """The family's configuration.

    Args:
        vocab_size: ids the tokenizer can produce; a smaller vocabulary is refused, an unset one takes it.

    Raises `ConfigError` (unknown field, out of range) or `RoutingError` (family without a profile, top-k).
    """
    config = section_config(recipe.model, vocab_size)
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size ({config.vocab_size}) is below the tokenizer's {vocab_size} ids "
            f"(data.tokenizer {recipe.data.tokenizer}): set it to at least {vocab_size}"
        )
    profile_of(config.model_type).spec(config)  # raises if top-k or groups do not fit
    _check_ranges(recipe, config)
    # Hugging Face would add its own auxiliary loss to ours
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    config.use_cache = False
    return config


def section_config(section: ModelSection, vocab_size: int | None = None) -> PretrainedConfig:
    """What a recipe's `model` says alone. Raises as `load_model_config` does."""
    model_type, fields = _fields(section)
    profile_of(model_type)
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    _refuse_unknown(model_type, fields)
    return build_config(model_type, fields, "model.config")


def build_config(model_type: str, fields: dict[str, Any], where: str) -> PretrainedConfig:
    """Raises `ConfigError` that begins with `where` for a field of the wrong type."""
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:  # Hugging Face's own validation of a field
        raise ConfigError(f"{where}: {str(error).strip().splitlines()[-1].strip()}") from None


def _fields(section: ModelSection) -> tuple[str, dict[str, Any]]:
    if section.model_type is not None:
        # a family's default (1 of OLMoE) is a token of its own tokenizer; of another one it would be an id that the
        # embedding never learns
        return section.model_type, {"pad_token_id": None, **section.config}
    if section.path is not None:
        tree = read_config_file(Path(section.path), f"model.path ({section.path})")
    else:
        assert section.weights is not None
        where = f"model.weights ({section.weights})"
        tree = read_config_file(Path(section.weights), where)
        if "quantization_config" in tree:
            raise ConfigError(f"{where}: the weights are quantised; give a folder of bf16, fp16 or fp32 weights")
    model_type = tree["model_type"]
    for name, value in profile_of(model_type).published.items():
        if tree.get(name, value) != value:
            raise ConfigError(
                f"{section.path or section.weights}: {name} ({tree[name]}) in config.json; the {model_type} of "
                f"transformers is always {value}"
            )
    ignored = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map")
    if "transformers_version" in tree:  # a published file may have fields that are read by nobody, or by others
        ignored += tuple(tree.keys() - known_fields(model_type))
    # a file may use a field's other name (num_local_experts for num_experts), and would win over the recipe
    aliases = AutoConfig.for_model(model_type).attribute_map.items()
    ignored += tuple(name for pair in aliases for name in pair if set(pair) & set(section.config))
    fields = {k: v for k, v in tree.items() if k not in ignored}
    return model_type, {**fields, **section.config}


def read_config_file(path: Path, where: str) -> dict[str, Any]:
    """A config.json, or that of a folder, as it is. Raises `ConfigError` that begins with `where`."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{where}: there is no config.json there")
    try:
        tree = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {path.name} cannot be read as JSON: {error}") from None
    if not isinstance(tree, dict) or "model_type" not in tree:
        raise ConfigError(f"{where}: {path.name} names no model_type")
    return tree


def _refuse_unknown(model_type: str, fields: dict[str, Any]) -> None:
    """Hugging Face keeps any misspelt field without a word."""
    problems = [
        f"model.config.{name} is decided by {ours}: set that key instead"
        for name, ours in OWNED_CONFIG_FIELDS.items()
        if name in fields
    ]
    legal, family = known_fields(model_type), type(AutoConfig.for_model(model_type)).__name__
    for name in fields:
        if name not in legal and name not in OWNED_CONFIG_FIELDS:
            near = difflib.get_close_matches(name, legal, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"model.config.{name} is no field of {family}{hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def known_fields(model_type: str) -> set[str]:
    """Fields that a family's configuration or its model code knows."""
    default = AutoConfig.for_model(model_type)
    # some fields, head_dim of qwen3_moe among them, are only ever read by the model code
    modeling = inspect.getsource(inspect.getmodule(AutoModelForCausalLM._model_mapping[type(default)]))  # type: ignore
    read = re.findall(r"""config(?:\.|,\s*["'])(\w+)""", modeling)
    return set(default.to_dict()) | set(default.attribute_map) | set(read) | {"rope_theta", "rope_scaling"}


def _check_ranges(recipe: Recipe, config: PretrainedConfig) -> None:
    problems = [
        f"model.config.{name} ({getattr(config, name)}) must be at least 1"
        for name in SIZES
        if getattr(config, name, None) is not None and getattr(config, name) < 1
    ]
    problems += _rope_problems(config)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if not problems and kv_heads is not None and heads % kv_heads:
        problems.append(
            f"model.config.num_key_value_heads ({kv_heads}) must divide model.config.num_attention_heads ({heads})"
        )
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        problems.append(
            f"model.config.pad_token_id ({pad}) must be below model.config.vocab_size ({config.vocab_size}), or null"
        )
    if config.hidden_act not in ACT2FN:
        near = difflib.get_close_matches(config.hidden_act, ACT2FN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"model.config.hidden_act ({config.hidden_act}) is no activation that transformers knows{hint}")
    length, limit = recipe.data.sequence_length, getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        problems.append(
            f"data.sequence_length ({length}) exceeds model.config.max_position_embeddings ({limit}): "
            "raise the latter or shorten the sequences"
        )
    jitter = jitter_noise(config)
    if not 0 <= jitter < 1:
        problems.append(f"model.config.router_jitter_noise ({jitter}) must lie between 0 and 1: factors are 1 +- that")
    try:
        forced_shares(recipe, config)
    except ConfigError as error:
        problems.append(str(error))
    spec = profile_of(config.model_type).spec(config)
    if recipe.moe.router != "top_k" and spec.num_groups > 1:
        problems.append(
            f"moe.router ({recipe.moe.router}) lets a token have any expert, and model.config.n_group "
            f"({spec.num_groups}) limits them to groups: set n_group and topk_group to 1 or moe.router to top_k"
        )
    if recipe.moe.bias_update_rate and not profile_of(config.model_type).names.bias:
        problems.append(
            f"moe.bias_update_rate ({recipe.moe.bias_update_rate}) needs a router with a correction bias, which "
            f"{config.model_type} has not: set it to 0 or use moe.aux_loss_coef"
        )
    if recipe.moe.aux_loss != "sequence" and not aux_loss_coef(recipe, config):
        problems.append(
            f"moe.aux_loss ({recipe.moe.aux_loss}) says what an auxiliary loss balances, and its weight is 0: set "
            "moe.aux_loss_coef or leave moe.aux_loss out"
        )
    if recipe.moe.bias_update == "quantile" and (spec.num_groups > 1 or spec.top_k == spec.num_experts):
        problems.append(
            "moe.bias_update (quantile) compares a token's experts with the best one left out, and "
            f"model.config.n_group ({spec.num_groups}) limits them to groups or top-k ({spec.top_k}) leaves none of "
            f"{spec.num_experts} out: set n_group and topk_group to 1 and top-k lower, or another moe.bias_update"
        )
    if recipe.moe.bias_update != "sign" and not recipe.moe.bias_update_rate:
        problems.append(
            f"moe.bias_update ({recipe.moe.bias_update}) says how a correction bias is updated, and "
            "moe.bias_update_rate is 0: set it or leave moe.bias_update out"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _rope_problems(config: PretrainedConfig) -> list[str]:
    """Of the positions: transformers checks the type of nothing there, and fails once the model is built."""
    rope = getattr(config, "rope_parameters", None) or {}
    theta, kind = rope.get("rope_theta", 1.0), rope.get("rope_type", "default")
    problems = []
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        problems.append(f"model.config.rope_theta ({theta!r}) must be a number above 0, such as 10000.0")
    if kind not in {"default", *ROPE_INIT_FUNCTIONS}:
        problems.append(
            f"model.config.rope_scaling: rope_type ({kind}) is none of {', '.join(['default', *ROPE_INIT_FUNCTIONS])}"
        )
    return problems


def aux_loss_coef(recipe: Recipe, config: PretrainedConfig) -> float:
    """The recipe's weight of the auxiliary loss, or the family's own at the strength Hugging Face gives it.

    Hugging Face's formula equals top-k at perfect balance, every form of ours 1.0, so its coefficient is multiplied by
    top-k. It is never counted twice: the model itself is built with `output_router_logits` off. A router that balances
    its choice by itself has none.
    """
    if recipe.moe.aux_loss_coef is not None:
        return recipe.moe.aux_loss_coef
    if recipe.moe.router != "top_k" or recipe.moe.force_load is not None:
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) * config.num_experts_per_tok


def jitter_noise(config: PretrainedConfig) -> float:
    """Half the width of the random factors on what enters an MoE block, of families that have it."""
    return float(getattr(config, "router_jitter_noise", 0.0) or 0.0)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision.compute]


__all__ = ["aux_loss_coef", "compute_dtype", "load_model_config", "num_experts_of", "profile_of"]
