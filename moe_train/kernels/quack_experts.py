"""The experts with QuACK's GEMMs for Hopper: rows are gathered by the GEMM that reads them, and SwiGLU ends the first.

The extra `hopper` installs QuACK (github.com/Dao-AILab/quack, kernels in CuTe DSL). The same contract as `experts`:
saved are the tokens, the pre-activation, the weights and the maps. The outputs are weighted when a token's copies are
added up; in backward the GEMM that yields the activation's gradient weighs it, and gives <dA, A> beside it.

QuACK keeps the pre-activation as gate and up in turn, column by column; nobody else looks at it.

T tokens, K copies per token, R rows, L experts, H hidden size, I expert intermediate size.
"""

import functools
import importlib.util
from typing import Any

import torch

from moe_train.kernels.choose import implementation
from moe_train.kernels.operator import Operator, take_saved
from moe_train.kernels.row_maps import RowMaps

GATED = {"silu": "swiglu", "gelu_tanh": "geglu", "relu": "reglu"}
"""Our names of an activation -> QuACK's of the gated one."""


@functools.cache
def has_quack() -> bool:
    return importlib.util.find_spec("quack") is not None


def quack_tokens(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    maps: RowMaps,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """`experts.local_experts`, for activations of `GATED`."""
    place_TK, starts = maps.place_R.view(weights_TK.shape), _starts(maps.counts_D)
    weights = (gate_up_LIH, down_LHI)
    return _experts(x_TH, weights_TK, maps.order_R, place_TK, starts, *weights, GATED[activation])[0]


def forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    starts: torch.Tensor,
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H], and h [R, 2I]. starts: of `_starts`."""
    if not len(order_R):
        return torch.zeros_like(x_TH), x_TH.new_empty(0, gate_up_LIH.shape[1])
    h_R2I, a_RI = _up(x_TH.contiguous(), _tokens(order_R, place_TK), gate_up_LIH, starts, activation)
    y_RH = _down(a_RI, down_LHI, starts)
    del a_RI
    return implementation("rows", x_TH.device).gather_sum(y_RH, place_TK, weights_TK), h_R2I


def fake_forward(x_TH, weights_TK, order_R, place_TK, starts, gate_up_LIH, *rest):
    return torch.empty_like(x_TH), x_TH.new_empty(len(order_R), gate_up_LIH.shape[1])


def down_backward(
    dy_TH: torch.Tensor,
    h_R2I: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    place_TK: torch.Tensor,
    tokens_R: torch.Tensor,
    starts: torch.Tensor,
    down_LHI: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h, of the weights and of down. tokens_R: of `_tokens`."""
    if not len(h_R2I):
        return torch.zeros_like(h_R2I), torch.zeros_like(weights_TK), torch.zeros_like(down_LHI)
    dy_TH = dy_TH.contiguous()
    weights_R = weights_TK.reshape(-1)[order_R]
    dh_R2I, a_RI, dweights_R = _down_backward(dy_TH, tokens_R, h_R2I, weights_R, down_LHI, starts, activation)
    ddown_LHI = torch.empty_like(down_LHI)
    _weight_gradient(dy_TH, tokens_R, a_RI, ddown_LHI, starts)
    return dh_R2I, torch.where(place_TK < 0, 0.0, dweights_R[place_TK.clamp(min=0)]), ddown_LHI


def fake_down_backward(dy_TH, h_R2I, weights_TK, order_R, place_TK, tokens_R, starts, down_LHI, *rest):
    return torch.empty_like(h_R2I), torch.empty_like(weights_TK), torch.empty_like(down_LHI)


def up_backward(
    dh_R2I: torch.Tensor,
    x_TH: torch.Tensor,
    place_TK: torch.Tensor,
    tokens_R: torch.Tensor,
    starts: torch.Tensor,
    gate_up_LIH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of gate_up."""
    if not len(dh_R2I):
        return torch.zeros_like(x_TH), torch.zeros_like(gate_up_LIH)
    dx_RH = _up_backward(dh_R2I, gate_up_LIH, starts)
    dx_TH = implementation("rows", dx_RH.device).gather_sum(dx_RH, place_TK, None)
    dgate_up_LIH = torch.empty_like(gate_up_LIH)
    _weight_gradient(x_TH.contiguous(), tokens_R, dh_R2I, dgate_up_LIH.transpose(1, 2), starts, in_turn=True)
    return dx_TH, dgate_up_LIH


def fake_up_backward(dh_R2I, x_TH, place_TK, tokens_R, starts, gate_up_LIH):
    return torch.empty_like(x_TH), torch.empty_like(gate_up_LIH)


def _save(ctx, inputs, output):
    x_TH, *rest, activation = inputs
    ctx.save_for_backward(x_TH, output[1], *rest)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation = activation


def _adjoint(ctx, dy_TH, _):
    x_TH, h_R2I, weights_TK, order_R, place_TK, starts, gate_up_LIH, down_LHI = take_saved(ctx)
    maps = (order_R, place_TK, _tokens(order_R, place_TK), starts)
    dh_R2I, dweights_TK, ddown_LHI = _experts_down_backward(dy_TH, h_R2I, weights_TK, *maps, down_LHI, ctx.activation)
    del h_R2I
    dx_TH, dgate_up_LIH = _experts_up_backward(dh_R2I, x_TH, *maps[1:], gate_up_LIH)
    return dx_TH, dweights_TK, None, None, None, dgate_up_LIH, ddown_LHI, None


_experts_down_backward = Operator("quack_experts_down_backward", down_backward, fake_down_backward)
_experts_up_backward = Operator("quack_experts_up_backward", up_backward, fake_up_backward)
_experts = Operator("quack_experts", forward, fake_forward, _save, _adjoint)


# --------------------------------------------------------------------------------------------------- QuACK's functions


def _up(x, tokens_R, gate_up_LIH, starts, activation) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = len(tokens_R), gate_up_LIH.shape[1]
    h_R2I, a_RI = x.new_empty(rows, width), x.new_empty(rows, width // 2)
    _call(
        "up",
        (x, gate_up_LIH.transpose(1, 2), h_R2I, a_RI),
        activation=activation,
        cu_seqlens_m=starts,
        A_idx=tokens_R,
        concat_layout=("B",),
    )
    return h_R2I, a_RI


def _down(a_RI, down_LHI, starts) -> torch.Tensor:
    y_RH = a_RI.new_empty(len(a_RI), down_LHI.shape[1])
    _call("down", (a_RI, down_LHI.transpose(1, 2), y_RH), cu_seqlens_m=starts)
    return y_RH


def _down_backward(dy, tokens_R, h_R2I, weights_R, down_LHI, starts, activation) -> tuple[torch.Tensor, ...]:
    """dh, the weighted activation and <dA, A>."""
    dh_R2I, a_RI = torch.empty_like(h_R2I), h_R2I.new_empty(len(h_R2I), h_R2I.shape[1] // 2)
    dweights_R = _call(
        "down_backward",
        (dy, down_LHI, h_R2I, dh_R2I, a_RI),
        colvec_scale=weights_R,
        activation=activation,
        colvec_reduce=True,
        cu_seqlens_m=starts,
        A_idx=tokens_R,
        dynamic_scheduler=False,
    )
    return dh_R2I, a_RI, dweights_R


def _up_backward(dh_R2I, gate_up_LIH, starts) -> torch.Tensor:
    dx_RH = dh_R2I.new_empty(len(dh_R2I), gate_up_LIH.shape[2])
    _call("up_backward", (dh_R2I, gate_up_LIH, dx_RH), cu_seqlens_m=starts, concat_layout=("B",))
    return dx_RH


def _weight_gradient(left, tokens_R, right, out, starts, *, in_turn: bool = False) -> None:
    """Per expert, gathered left^T right -> out; in_turn: columns of right are gate and up in turn, those of out not."""
    layout = ("out",) if in_turn else None
    _call("weight", (left.t(), right, out), cu_seqlens_k=starts, A_idx=tokens_R, concat_layout=layout)


FUNCTIONS = {
    "up": "gemm_gated_tuned",
    "down": "gemm_tuned",
    "down_backward": "gemm_dgated_tuned",
    "up_backward": "gemm_tuned",
    "weight": "gemm_tuned",
}
WIDE = {"tile_m": 128, "tile_n": 256, "pingpong": False}
CONFIGS: dict[str, Any] = {"down_backward": WIDE, "weight": WIDE}
"""Fields of QuACK's `GemmConfig` for a product above, of those left out its default (128 x 192, ping-pong): the fastest
of eleven for qwen3 and olmoe on an H200. None: QuACK tries all, for every shape it meets. No run wants that: under
expert parallelism the number of rows is another one at every step."""


def _call(product: str, tensors: tuple[torch.Tensor, ...], **settings: Any) -> Any:
    tuned = getattr(importlib.import_module("quack.gemm_interface"), FUNCTIONS[product])
    fields = CONFIGS.get(product, {})
    if fields is None:
        return tuned(*tensors, **settings)
    return tuned.fn(*tensors, **settings, config=_config(**fields))


@functools.cache
def _config(**fields: Any) -> Any:
    return importlib.import_module("quack.gemm_config").GemmConfig(is_dynamic_persistent=False, **fields)


def _tokens(order_R: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """The token that each row is a copy of, int32."""
    return (order_R // place_TK.shape[1]).to(torch.int32)


def _starts(rows_per_expert: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows start, and where the last one's end, int32 [L + 1]."""
    starts = rows_per_expert.new_zeros(len(rows_per_expert) + 1, dtype=torch.int32)
    starts[1:] = rows_per_expert.cumsum(0)
    return starts
