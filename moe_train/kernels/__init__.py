"""Kernels of the MoE layer, and of the dense layers around it.

One name, four places: `reference/`, `triton/`, tests/kernels and tests/bench. A kernel is a torch operator with an
adjoint; which implementation runs is decided by the device (see `choose`).
"""

from moe_train.kernels.adamw import adamw_step_
from moe_train.kernels.choose import has_triton, interpreted, runs_triton
from moe_train.kernels.cross_entropy import cross_entropy_
from moe_train.kernels.experts import local_experts
from moe_train.kernels.fp8 import Fp8Gemms, quantise_weights
from moe_train.kernels.fp8_experts import fp8_local_experts
from moe_train.kernels.norm import rms_norm
from moe_train.kernels.quack_experts import GATED, has_quack, quack_tokens
from moe_train.kernels.reference.activation import ACTIVATION_NAMES
from moe_train.kernels.rotary import rotate
from moe_train.kernels.router import RouteOutput, route
from moe_train.kernels.router_figures import FIGURES, router_figures
from moe_train.kernels.row_maps import RowMaps, row_maps
from moe_train.kernels.rows import copy_tokens, sum_copies
from moe_train.kernels.rule import AdamWRule, RouterRule

__all__ = [
    "ACTIVATION_NAMES",
    "FIGURES",
    "GATED",
    "AdamWRule",
    "Fp8Gemms",
    "RouteOutput",
    "RouterRule",
    "RowMaps",
    "adamw_step_",
    "copy_tokens",
    "cross_entropy_",
    "fp8_local_experts",
    "has_quack",
    "has_triton",
    "interpreted",
    "local_experts",
    "quack_tokens",
    "quantise_weights",
    "rms_norm",
    "rotate",
    "route",
    "router_figures",
    "row_maps",
    "runs_triton",
    "sum_copies",
]
