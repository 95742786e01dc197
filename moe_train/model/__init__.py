"""Hugging Face architectures with their MoE blocks swapped for the parallel layer."""

from moe_train.model.build import BuiltModel, Draw, SwappedBlock, build_model
from moe_train.model.count import ParameterCount, count_parameters
from moe_train.model.family import aux_loss_coef, compute_dtype, load_model_config
from moe_train.model.profiles import PROFILES, num_experts_of
from moe_train.model.tensor import check_tensor

__all__ = [
    "PROFILES",
    "BuiltModel",
    "Draw",
    "ParameterCount",
    "SwappedBlock",
    "aux_loss_coef",
    "build_model",
    "check_tensor",
    "compute_dtype",
    "count_parameters",
    "load_model_config",
    "num_experts_of",
]
