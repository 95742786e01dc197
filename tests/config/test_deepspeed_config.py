"""What `deepspeed.initialize` is given, by stage and precision."""

import pytest

from moe_train.config import parse_recipe
from moe_train.config.deepspeed import deepspeed_config

RECIPE = {
    "model": {"model_type": "qwen3_moe"},
    "optimizer": {"lr": 1e-4, "grad_clip": 0.7},
    "data": {"corpora": [{"text": "python-stdlib"}], "sequence_length": 8},
    "batch": {"global_size": 12, "micro_size": 2},
    "train": {"steps": 3},
}


def config(stage: int, compute: str, gradients: str = "fp32", offload: str = "none", raw: dict | None = None) -> dict:
    recipe = parse_recipe(
        {
            **RECIPE,
            "zero": {"stage": stage, "offload": offload},
            "precision": {"compute": compute, "gradients": gradients},
            "deepspeed": raw or {},
        }
    )
    return deepspeed_config(recipe, accumulation=3)


@pytest.mark.parametrize(
    ("stage", "compute", "dense_stage", "clip"),
    [
        (0, "fp32", 0, 0.0),  # no optimizer of DeepSpeed's whose norm could include the experts: the engine clips
        (1, "fp32", 1, 0.7),
        (2, "fp32", 2, 0.7),
        (3, "fp32", 3, 0.7),
        (0, "bf16", 1, 0.7),  # stage 0 has no optimizer that sums bf16 gradients in fp32
        (1, "bf16", 1, 0.7),
        (2, "bf16", 2, 0.7),
        (3, "bf16", 3, 0.7),
        (1, "fp16", 1, 0.7),
        (2, "fp16", 2, 0.7),
        (3, "fp16", 3, 0.7),
    ],
)
def test_stage_precision_and_clip(stage, compute, dense_stage, clip):
    made = config(stage, compute)
    assert made["zero_optimization"]["stage"] == dense_stage
    assert made["gradient_clipping"] == clip
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (compute == "bf16", compute == "fp16")
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 3
    assert "train_batch_size" not in made  # DeepSpeed derives it; two sources could disagree


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_gradients_are_summed_and_sent_in_one_type(gradients):
    made = config(2, "bf16", gradients)
    assert made["communication_data_type"] == gradients
    assert made["data_types"] == {"grad_accum_dtype": gradients}


def test_offload_is_written_only_when_asked_for():
    assert "offload_optimizer" not in config(2, "bf16")["zero_optimization"]
    assert config(2, "bf16", offload="cpu")["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_raw_keys_are_merged_into_sections():
    plain = config(2, "bf16")
    made = config(2, "bf16", raw={"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": True}})
    assert made["zero_optimization"] == {**plain["zero_optimization"], "reduce_bucket_size": 7}
    assert made["comms_logger"] == {"enabled": True}
    assert {k: v for k, v in made.items() if k not in ("zero_optimization", "comms_logger")} == {
        k: v for k, v in plain.items() if k != "zero_optimization"
    }
