"""Optimizers: DeepSpeed for the dense part, our sharded store for the experts. The only room that imports deepspeed."""

from moe_train.optim.engine import Engine, StepResult
from moe_train.optim.expert_shard import ExpertStore, ExpertTensor, LayerExperts, ShardOptions
from moe_train.optim.factory import decays, optimizer_factory
from moe_train.optim.fragments import Fragment
from moe_train.optim.schedule import lr_factor

__all__ = [
    "Engine",
    "ExpertStore",
    "ExpertTensor",
    "Fragment",
    "LayerExperts",
    "ShardOptions",
    "StepResult",
    "decays",
    "lr_factor",
    "optimizer_factory",
]
