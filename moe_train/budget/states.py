"""Bytes of weights, gradients and optimizer states on one rank, by the rules of those who allocate them.

Experts and whatever else lies beside the model: `optim.ExpertTensor`. The dense part: DeepSpeed 0.19.8, whose optimizer
depends on stage and precision. P parameters on the rank, W data-parallel ranks, b bytes of a weight, g of a gradient.

                          weights                gradients at the step     master and moments
  stage 0, fp32           P b                    P g                       2 P 4 (the weights are the master)
  bf16 with fp32 sums     padded P b             padded P 4, and P b       3 x 4 x padded P / W
  stage 1 and 2           padded P b             padded P / W, g           3 x 4 x padded P / W
  stage 3                 shards b, and what     shards g                  3 x 4 x shards
                          is kept gathered

"padded": each parameter group (with and without weight decay) to a multiple of 2 W. A shard of stage 3 is each
parameter alone, rounded up to W equal parts; those of up to 100,000 elements stay gathered between their uses as well.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_train.config import Recipe
from moe_train.model import compute_dtype
from moe_train.model.held import Held, StoredParameter
from moe_train.moe import paying_gemms
from moe_train.optim import decays
from moe_train.parallel import Topology

STATE_BYTES = 4
"""Of a master weight and of each of AdamW's two moments."""
SCALE_BYTES = 4
"""Of a row in FP8."""
PERSISTENT = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: elements up to which a parameter stays gathered."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """In the type each of them is kept in; scalars of the optimizer are left out."""

    weights: int
    gradients: int
    states: int

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            states=self.states + other.states,
        )

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states


def gradient_bytes(recipe: Recipe) -> int:
    """Of one element as it is accumulated and reduced."""
    return 2 if recipe.precision.gradients == "bf16" else 4


def quantised_bytes(parameter: StoredParameter, recipe: Recipe) -> int:
    """Of an expert matrix once more in FP8, for each product that takes it so; both ways if two do."""
    kind = parameter.name.rpartition(".")[2]
    if recipe.precision.experts != "fp8" or kind not in ("gate_up_proj", "down_proj"):
        return 0
    rows, columns = parameter.unit_shape
    gemms = paying_gemms(columns, rows // 2) if kind == "gate_up_proj" else paying_gemms(rows, columns)
    along, across = ("h", "dX") if kind == "gate_up_proj" else ("y", "dA")
    found = parameter.unit_numel + rows * SCALE_BYTES if along in gemms else 0
    return found + (parameter.unit_numel + columns * SCALE_BYTES if across in gemms else 0)


def stored_bytes(parameters: Iterable[StoredParameter], recipe: Recipe) -> StateBytes:
    """Of what lies beside the model on one rank."""
    weight, gradient = compute_dtype(recipe).itemsize, gradient_bytes(recipe)
    stage, offloaded = recipe.zero.stage, recipe.zero.offload == "cpu"
    found = StateBytes(weights=0, gradients=0, states=0)
    for parameter in parameters:
        copied, home = parameter.copies * parameter.unit_numel, parameter.home * parameter.unit_numel
        slots, shards = parameter.copies + parameter.home, parameter.holders if stage >= 1 and parameter.home else 1
        shard = -(-home // shards)
        separate = weight < STATE_BYTES or offloaded  # else the weights are the master
        found += StateBytes(
            weights=(copied + shard * (1 if stage == 3 else shards)) * weight
            + (quantised_bytes(parameter, recipe) * slots if stage < 3 or shards == 1 else 0),
            gradients=(copied + shard * (shards if stage < 2 else 1)) * gradient,
            states=shard * STATE_BYTES * (3 if separate else 2),
        )
    return found


def dense_bytes(held: Held, recipe: Recipe, topology: Topology) -> StateBytes:
    """Of the model's own parameters on one rank."""
    weight, gradient = compute_dtype(recipe).itemsize, gradient_bytes(recipe)
    stage, world, total = recipe.zero.stage, topology.data, held.num_dense
    if stage == 3:
        parts = [(-(-math.prod(shape) // world), math.prod(shape)) for shape in held.dense.values()]
        shards = sum(part for part, _ in parts)
        kept = sum(part * world for part, numel in parts if numel <= PERSISTENT)
        return StateBytes(
            weights=(shards + kept) * weight, gradients=shards * gradient, states=shards * 3 * STATE_BYTES
        )
    if stage == 0 and recipe.precision.compute == "fp32":
        return StateBytes(weights=total * weight, gradients=total * gradient, states=total * 2 * STATE_BYTES)
    decay = decays(recipe.optimizer)
    groups = [
        sum(math.prod(shape) for name, shape in held.dense.items() if decay(name, len(shape)) == flag)
        for flag in (True, False)
    ]
    padded = sum(-(-numel // (2 * world)) * 2 * world for numel in groups)
    states = padded // world * 3 * STATE_BYTES
    if sums_in_fp32(recipe):  # bf16 gradients are added to flat fp32 ones, and stay until the step
        return StateBytes(weights=padded * weight, gradients=padded * STATE_BYTES + total * weight, states=states)
    return StateBytes(weights=padded * weight, gradients=padded // world * gradient, states=states)


def sums_in_fp32(recipe: Recipe) -> bool:
    """DeepSpeed's BF16_Optimizer: bf16 below stage 2, with gradients in fp32."""
    precision = recipe.precision
    return recipe.zero.stage < 2 and precision.compute == "bf16" and precision.gradients == "fp32"


def held_bytes(held: Held, recipe: Recipe, topology: Topology) -> tuple[StateBytes, StateBytes]:
    """(experts and whatever else lies beside the model, the dense part) of one rank."""
    return stored_bytes(held.stored, recipe), dense_bytes(held, recipe, topology)
