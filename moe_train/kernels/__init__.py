"""Kernels of the MoE layer. One name, four places: `reference/`, `triton/`, tests/kernels and tests/bench.

A kernel is a torch operator with an adjoint; which implementation runs is decided by the device (see `choose`).
"""

from moe_train.kernels.choose import has_triton, interpreted, runs_triton
from moe_train.kernels.experts import expert_rows, local_experts
from moe_train.kernels.fp8 import Fp8Gemms, quantise_weights
from moe_train.kernels.fp8_experts import fp8_expert_rows, fp8_local_experts
from moe_train.kernels.quack_experts import GATED, has_quack, quack_rows, quack_tokens
from moe_train.kernels.reference.activation import ACTIVATION_NAMES
from moe_train.kernels.router import RouteOutput, route
from moe_train.kernels.row_maps import RowMaps, row_maps
from moe_train.kernels.rows import copy_tokens, weighted_sum
from moe_train.kernels.rule import RouterRule

__all__ = [
    "ACTIVATION_NAMES",
    "GATED",
    "Fp8Gemms",
    "RouteOutput",
    "RouterRule",
    "RowMaps",
    "copy_tokens",
    "expert_rows",
    "fp8_expert_rows",
    "fp8_local_experts",
    "has_quack",
    "has_triton",
    "interpreted",
    "local_experts",
    "quack_rows",
    "quack_tokens",
    "quantise_weights",
    "route",
    "row_maps",
    "runs_triton",
    "weighted_sum",
]
