"""Experts whose products run in FP8: where that is possible, what of it pays, and the weights, quantised once.

H hidden size, I expert intermediate size on a rank, L experts on a rank.
"""

import math
from typing import Literal

import torch

from moe_train import kernels
from moe_train.errors import ConfigError
from moe_train.kernels import Fp8Gemms
from moe_train.kernels.fp8 import GEMMS, MAX_EXPERTS, UNIT
from moe_train.moe.experts import Activation, ExpertWeights, activation_name

ExpertPrecision = Literal["bf16", "fp8"]

LEAST = 512
"""Of K (what is summed over) and N (columns that come out), for FP8 to be faster than bf16."""
TILE, LEAST_FILLED = 512, 0.8
"""Columns that torch's kernel rounds N up to, and the part of them that must not be computed for nothing. On an H200
(1024 rows for each of 64 experts) whatever passes both gained 1.17 to 1.63, and whatever does not, 0.65 to 1.12, which
quantising eats up."""
ALTERNATIVE = "set precision.experts to bf16"


def fp8_gemms(
    asked: ExpertPrecision | None, device: torch.device, hidden: int, intermediate: int, experts: int
) -> Fp8Gemms | None:
    """Which of the experts' products run in FP8; None if it is not asked for. On a CPU all of them: speed is no matter.

    Args:
        asked: `precision.experts`. experts: L, the most of any rank.

    Raises `ConfigError` where they cannot, or where none would be faster.
    """
    if asked != "fp8":
        return None
    _check_device(device)
    return gemms_of_sizes(hidden, intermediate, experts, all_pay=device.type == "cpu")


def gemms_of_sizes(hidden: int, intermediate: int, experts: int, *, all_pay: bool = False) -> Fp8Gemms:
    """The same for a GPU that has FP8, or for a device where speed is no matter. Raises `ConfigError`."""
    sizes = {"hidden": hidden, "expert intermediate size on a rank": intermediate}
    wrong = [f"{what} ({size})" for what, size in sizes.items() if size % UNIT]
    if wrong:
        raise ConfigError(
            f"precision.experts (fp8) needs {' and '.join(wrong)} to be a multiple of {UNIT}: change model.config, "
            f"lower parallel.expert_tensor or {ALTERNATIVE}"
        )
    if experts > MAX_EXPERTS:
        raise ConfigError(
            f"precision.experts (fp8) takes at most {MAX_EXPERTS} experts on a rank, not {experts}: raise "
            f"parallel.expert or {ALTERNATIVE}"
        )
    if all_pay:
        return Fp8Gemms()
    found = paying_gemms(hidden, intermediate)
    if not found.names:
        raise ConfigError(
            f"precision.experts (fp8) would make none of the experts' products faster at hidden ({hidden}) and expert "
            f"intermediate size on a rank ({intermediate}): {ALTERNATIVE}"
        )
    return found


def paying_gemms(hidden: int, intermediate: int) -> Fp8Gemms:
    """Those of the four that are faster in FP8 at these sizes."""
    shapes = {  # K, N
        "h": (hidden, 2 * intermediate),
        "y": (intermediate, hidden),
        "dA": (hidden, intermediate),
        "dX": (2 * intermediate, hidden),
    }
    return Fp8Gemms(tuple(name for name in GEMMS if _pays(*shapes[name])))


def _pays(k: int, n: int) -> bool:
    return min(k, n) >= LEAST and n >= LEAST_FILLED * TILE * math.ceil(n / TILE)


def _check_device(device: torch.device) -> None:
    if device.type == "cuda":
        # compute capability 9.0 is the one that torch's row-wise scaled grouped GEMM is built for
        if torch.cuda.get_device_capability(device) != (9, 0):
            raise ConfigError(
                f"precision.experts (fp8) needs the FP8 tensor cores of an H100, H200 or GH200, and this is a "
                f"{torch.cuda.get_device_name(device)}: {ALTERNATIVE}"
            )
        if not kernels.runs_triton(device):
            raise ConfigError(f"precision.experts (fp8) needs the package triton: install it or {ALTERNATIVE}")
    elif not kernels.runs_triton(device):
        raise ConfigError(
            f"precision.experts (fp8) needs a GPU with FP8 tensor cores, and this is a CPU: {ALTERNATIVE} (to try it "
            "here, without its speed, install triton and set TRITON_INTERPRET=1)"
        )


class Fp8Experts:
    """One layer's experts in FP8. Keeps the quantised weights for as long as the weights stay the same.

    That is for `ExpertWeights.version` to say: accumulated micro-batches and recompute find what the first forward
    of an optimizer step has quantised. Weights without a version are there for the moment only (gathered at ZeRO-3):
    nothing of them is kept, the operators quantise what they need in forward and in backward.
    """

    def __init__(self, gemms: Fp8Gemms, activation: Activation):
        self.gemms, self.activation = gemms, activation_name(activation)
        self._quantised: list[torch.Tensor] = []
        self._version: object = None

    def tokens(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, maps: kernels.RowMaps, weights: ExpertWeights
    ) -> torch.Tensor:
        """See `experts.fused_tokens`."""
        given = (weights.gate_up_LIH, weights.down_LHI, self.activation, self.gemms, self.quantised(weights))
        return kernels.fp8_local_experts(x_TH, weights_TK, maps, *given)

    def quantised(self, weights: ExpertWeights) -> list[torch.Tensor]:
        """Of these weights, made anew if they are others than the last time; empty if they have no version."""
        if weights.version is None:
            return []
        if weights.version != self._version:
            # written over where they are: no step allocates them again
            self._quantised = kernels.quantise_weights(
                weights.gate_up_LIH, weights.down_LHI, self.gemms, self._quantised
            )
            self._version = weights.version
        return self._quantised
