"""What QuACK 0.4.1's `gemm_interface` promises, in plain torch, expert by expert: the wiring is tested without a GPU.

QuACK itself ran against float32 on a GPU: tests/bench/check_gpu_kernels.py. Its gated products keep columns of gate and
up in turn; `concat_layout` names the tensors that have them one above the other instead.
"""

import itertools
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F

ACTIVATIONS = {"swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh"), "reglu": F.relu}
SLOPES = {
    "swiglu": torch.ops.aten.silu_backward,
    "geglu": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "reglu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
}
"""Gradient of the output, input -> gradient of the input."""


def in_turn(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Halves along `dim` -> one of each in turn."""
    return torch.stack(tensor.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def parts(starts: torch.Tensor) -> list[tuple[int, slice]]:
    ends = starts.tolist()
    return [(e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise(ends))]


def gemm(A, B, out, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, concat_layout=None, config=None):
    concat = concat_layout or ()
    if cu_seqlens_m is not None:
        rows = A if A_idx is None else A[A_idx]
        weight = in_turn(B, 1) if "B" in concat else B  # [L, K, N]; K is what is not contiguous here
        for e, part in parts(cu_seqlens_m):
            out[part] = rows[part] @ weight[e]
        return
    left = A if A_idx is None else A[:, A_idx]
    for e, part in parts(cu_seqlens_k):
        found = left[:, part] @ B[part]
        out[e] = torch.cat([found[:, 0::2], found[:, 1::2]], dim=1) if "out" in concat else found


def gemm_gated(A, B, preact, postact, activation, cu_seqlens_m, A_idx=None, concat_layout=None, config=None):
    assert concat_layout == ("B",)
    gemm(A, in_turn(B, 2), preact, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
    end = int(cu_seqlens_m[-1])
    postact[:end] = ACTIVATIONS[activation](preact[:end, 0::2]) * preact[:end, 1::2]


def gemm_dgated(
    A,
    B,
    preact,
    dx_out,
    postact,
    colvec_scale=None,
    activation="swiglu",
    colvec_reduce=False,
    cu_seqlens_m=None,
    A_idx=None,
    dynamic_scheduler=True,
    config=None,
):
    end = int(cu_seqlens_m[-1])
    dout = preact.new_empty(len(preact), B.shape[2])
    gemm(A, B, dout, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
    gate, up = preact[:end, 0::2], preact[:end, 1::2]
    value = ACTIVATIONS[activation](gate) * up
    scale = 1.0 if colvec_scale is None else colvec_scale[:end, None].to(dout.dtype)
    given = dout[:end] * scale
    dx_out[:end, 0::2] = SLOPES[activation](given * up, gate)
    dx_out[:end, 1::2] = given * ACTIVATIONS[activation](gate)
    postact[:end] = value * scale
    if not colvec_reduce:
        return None
    dscale = dout.new_full((len(preact),), float("nan"))
    dscale[:end] = (dout[:end] * value).sum(dim=1)
    return dscale


def modules() -> dict[str, ModuleType]:
    """`quack.gemm_interface` and `quack.gemm_config`, for `sys.modules`."""
    interface, config = ModuleType("quack.gemm_interface"), ModuleType("quack.gemm_config")
    for name, function in (("gemm", gemm), ("gemm_gated", gemm_gated), ("gemm_dgated", gemm_dgated)):
        setattr(interface, f"{name}_tuned", SimpleNamespace(fn=function))
    config.GemmConfig = SimpleNamespace  # type: ignore[attr-defined]
    return {"quack": ModuleType("quack"), "quack.gemm_interface": interface, "quack.gemm_config": config}
