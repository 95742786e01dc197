"""Optimizers: DeepSpeed for the dense part, our sharded store for the experts. The only room that imports deepspeed."""

from moe_train.optim.engine import Engine, StepResult
from moe_train.optim.expert_shard import ExpertStore
from moe_train.optim.expert_sources import LayerExperts, SharedExpertSource
from moe_train.optim.expert_tensor import ExpertTensor, ShardOptions
from moe_train.optim.factory import decays, optimizer_factory
from moe_train.optim.fragments import Fragment, TensorSlice
from moe_train.optim.schedule import lr_factor

__all__ = [
    "Engine",
    "ExpertStore",
    "ExpertTensor",
    "Fragment",
    "LayerExperts",
    "ShardOptions",
    "SharedExpertSource",
    "StepResult",
    "TensorSlice",
    "decays",
    "lr_factor",
    "optimizer_factory",
]
