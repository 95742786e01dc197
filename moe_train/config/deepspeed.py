"""Recipe -> DeepSpeed's JSON. The one file that knows its keys."""

import copy
from typing import Any

from moe_train.config.schema import Recipe

LARGEST_BUCKET = 500_000_000
"""DeepSpeed's own default, in elements: 2 GB of fp32."""


def deepspeed_config(recipe: Recipe, accumulation: int, dense_parameters: int = LARGEST_BUCKET) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. Raw keys of `deepspeed:` come last; `Recipe` has refused ours.

    Args:
        dense_parameters: how many there are; the reduction bucket, which is allocated whole, need not be larger.
    """
    reduce_type = recipe.precision.gradients
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.optimizer.grad_clip if _deepspeed_clips(recipe) else 0.0,
        "zero_optimization": {
            "stage": _dense_stage(recipe),
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": min(dense_parameters, LARGEST_BUCKET),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": reduce_type,
        "data_types": {"grad_accum_dtype": reduce_type},
        "bf16": {"enabled": recipe.precision.compute == "bf16"},
        "fp16": {"enabled": recipe.precision.compute == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": 10**12,
    }
    if recipe.zero.offload == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return _merge(config, recipe.deepspeed)


def _dense_stage(recipe: Recipe) -> int:
    """DeepSpeed 0.19.8 has no unsharded optimizer that sums bf16 gradients in fp32: stage 1, the same numbers."""
    return recipe.zero.stage if recipe.precision.compute == "fp32" else max(recipe.zero.stage, 1)


def _deepspeed_clips(recipe: Recipe) -> bool:
    """At stage 0 in fp32 there is no DeepSpeed wrapper whose norm could include the experts: the engine clips."""
    return recipe.zero.stage > 0 or recipe.precision.compute != "fp32"


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
