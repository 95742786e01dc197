"""Kernels of the MoE layer, and of the dense layers around it.

One name, four places: `reference/`, `triton/`, tests/kernels and tests/bench. A kernel is a torch operator with an
adjoint; which implementation runs is decided by the device (see `choose`).
"""

from moe_train.kernels.adamw import adamw_step_
from moe_train.kernels.choose import has_triton, interpreted, runs_triton
from moe_train.kernels.cross_entropy import cross_entropy_
from moe_train.kernels.experts import expert_rows, local_experts
from moe_train.kernels.norm import rms_norm
from moe_train.kernels.reference.activation import ACTIVATION_NAMES
from moe_train.kernels.rotary import rotate
from moe_train.kernels.router import RouteOutput, route
from moe_train.kernels.row_maps import RowMaps, row_maps
from moe_train.kernels.rows import weighted_sum
from moe_train.kernels.rule import AdamWRule, RouterRule

__all__ = [
    "ACTIVATION_NAMES",
    "AdamWRule",
    "RouteOutput",
    "RouterRule",
    "RowMaps",
    "adamw_step_",
    "cross_entropy_",
    "expert_rows",
    "has_triton",
    "interpreted",
    "local_experts",
    "rms_norm",
    "rotate",
    "route",
    "row_maps",
    "runs_triton",
    "weighted_sum",
]
