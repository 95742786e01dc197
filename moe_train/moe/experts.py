"""The experts of one rank: two GEMMs and an activation, per expert.

N rows, H hidden size, I expert intermediate size, L local experts (may be 0).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from moe_train import kernels
from moe_train.errors import ConfigError

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExpertWeights:
    """gate_up_LIH [L, 2I, H]: rows 0..I-1 gate, I..2I-1 up. down_LHI [L, H, I]. Hugging Face's fused layout.

    version: equal for as long as the numbers are the same, so that what is made of them can be kept. None: it cannot be
        said, or they are in memory for the moment only.
    """

    gate_up_LIH: torch.Tensor
    down_LHI: torch.Tensor
    version: object = None


class ExpertSource(Protocol):
    """Where the layer gets its slice of the experts from; whoever stores it decides how it is sharded."""

    def fetch(self) -> AbstractContextManager[ExpertWeights]:
        """The weights, for the length of the context; gradients go back through them."""
        ...


def loop_experts(
    rows_NH: torch.Tensor, rows_per_expert: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """The reference: one expert after another. One without rows takes part too: its gradient is zero, not None."""
    counts = rows_per_expert.tolist()
    outputs = []
    # unbind: its backward stacks once, indexing would build a full-size gradient per expert
    parts = zip(rows_NH.split(counts), weights.gate_up_LIH.unbind(0), weights.down_LHI.unbind(0), strict=True)
    for rows, gate_up, down in parts:
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(activation(gate) * up, down))
    return torch.cat(outputs)


def grouped_experts(
    rows_NH: torch.Tensor, rows_per_expert: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> torch.Tensor:
    """torch's grouped GEMM; the offsets stay on the device."""
    offsets = rows_per_expert.cumsum(0).to(torch.int32)
    gate, up = _grouped_mm(rows_NH, weights.gate_up_LIH, offsets).chunk(2, dim=-1)
    return _grouped_mm(activation(gate) * up, weights.down_LHI, offsets)


KERNEL_BACKENDS = ("fused", "hopper")
"""Each one operator of the kernels room, of tokens; the router before it is one too."""


def fused_tokens(
    backend: str,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    maps: kernels.RowMaps,
    weights: ExpertWeights,
    activation: Activation,
) -> torch.Tensor:
    """One operator of the kernels room: tokens [T, H] -> what the experts here make of them, weighted and summed.

    It saves the tokens and the pre-activation.

    Args:
        backend: one of `KERNEL_BACKENDS`.
    """
    tensors = (weights.gate_up_LIH, weights.down_LHI)
    if backend == "hopper":
        return kernels.quack_tokens(x_TH, weights_TK, maps, *tensors, gated_name(activation))
    return kernels.local_experts(x_TH, weights_TK, maps, *tensors, activation_name(activation))


ACTIVATION_CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Modules of torch and transformers -> the kernels' names of what they compute."""


def activation_name(activation: Activation) -> str:
    """The kernels' name of an activation. Raises `ConfigError` for one that they do not compute."""
    if activation is F.silu:
        return "silu"
    module = getattr(activation, "__self__", activation)
    known = type(module).__module__.partition(".")[0] in ("torch", "transformers")
    found = ACTIVATION_CLASSES.get(type(module).__name__) if known else None
    if found is None:
        name = getattr(activation, "__name__", type(module).__name__)
        raise ConfigError(
            f"moe.backend (fused) computes the activations {', '.join(kernels.ACTIVATION_NAMES)}, and the experts' is "
            f"{type(module).__name__ if isinstance(module, torch.nn.Module) else name}: set moe.backend to grouped"
        )
    return found


def gated_name(activation: Activation) -> str:
    """`activation_name` of one that QuACK's gated GEMMs compute. Raises `ConfigError` for another."""
    name = activation_name(activation)
    if name not in kernels.GATED:
        raise ConfigError(
            f"moe.backend (hopper) computes the activations {', '.join(kernels.GATED)}, and the experts' is {name}: "
            "set moe.backend to fused"
        )
    return name


def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return _ContiguousGradient.apply(F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets))  # type: ignore[return-value]


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose adjoint makes the gradient contiguous: grouped_mm's backward refuses expanded strides."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].contiguous()


class _KeepInGraph(torch.autograd.Function):
    """Its first argument; adjoint: zero gradients for the others."""

    @staticmethod
    def forward(ctx, x, *others):
        ctx.others = [(each.shape, each.dtype) for each in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], *(grads[0].new_zeros(shape, dtype=dtype) for shape, dtype in ctx.others)


def keep_in_graph(x_NH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """What a rank was given and does not use takes part in backward all the same, as it does on the other ranks: an
    expert without rows has a gradient of zero and not None, and an exchange is answered by all."""
    return _KeepInGraph.apply(x_NH, *others)  # type: ignore[return-value]


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"loop": loop_experts, "grouped": grouped_experts}
"""Of rows sorted by expert, for `dispatch.by_expert`."""


def resolve_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    intermediate: int,
    *,
    hidden_act: str = "",
) -> str:
    """`auto` -> the fastest that has been measured for such a layer; an explicit name is checked.

    Args:
        hidden_act: of the experts, as transformers names it. With SwiGLU alone was `fused` measured on a GPU.

    Raises `ConfigError` when `grouped` or `fused` is asked for a type or size that torch's grouped GEMM does not take,
    and when `fused` or `hopper` is asked for where what it is made of does not run.
    """
    unit = 16 // dtype.itemsize  # rows must be multiples of 16 bytes
    aligned = hidden % unit == 0 and intermediate % unit == 0
    if name == "auto":
        if device.type != "cuda" or dtype != torch.bfloat16 or not aligned:
            return "loop"
        if hidden_act not in ("silu", "swish") or not kernels.runs_triton(device):
            return "grouped"
        # hopper is 2 % faster for small experts, 5 % slower for large ones; where no 64 divides a size it is as fast,
        # and takes 838 MiB at the peak in place of 1173
        return "fused"
    if name == "fused" and not kernels.runs_triton(device):
        lacking = "a GPU" if kernels.has_triton() else "the package triton"
        raise ConfigError(
            f"moe.backend (fused) is made of Triton kernels and needs {lacking}: set moe.backend to auto (to try it on "
            "a CPU, install triton and set TRITON_INTERPRET=1)"
        )
    if name == "hopper":
        _check_hopper(device, dtype)
    if name in ("grouped", "fused") and dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"moe.backend ({name}) takes bf16 or fp32, not {dtype}: set moe.backend to loop")
    if name in ("grouped", "fused", "hopper") and not aligned:
        raise ConfigError(
            f"moe.backend ({name}) needs hidden ({hidden}) and expert intermediate size on a rank ({intermediate}) to "
            f"be multiples of {unit} in {'bf16' if unit == 8 else 'fp32'}: change them under model.config, lower "
            "parallel.expert_tensor or set moe.backend to loop"
        )
    return name


def _check_hopper(device: torch.device, dtype: torch.dtype) -> None:
    instead = "set moe.backend to auto"
    if not kernels.has_quack():
        raise ConfigError(f"moe.backend (hopper) needs QuACK: pip install 'moe_train[hopper]', or {instead}")
    gpu = device.type == "cuda" and torch.cuda.is_available()  # a plan is made anywhere
    if not gpu or torch.cuda.get_device_capability(device)[0] != 9:
        found = torch.cuda.get_device_name(device) if gpu else "a CPU"
        raise ConfigError(f"moe.backend (hopper) needs a Hopper GPU (H100, H200), and this is {found}: {instead}")
    if dtype != torch.bfloat16:
        raise ConfigError(f"moe.backend (hopper) takes bf16, not {dtype}: set moe.backend to fused")
