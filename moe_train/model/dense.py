"""The dense layers of a family by fewer and larger kernels: norms, rotary embedding, attention, head and loss.

Hugging Face's modules stay, with their names and parameters; only what some of them compute is replaced.
"""

import copy
import functools
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from moe_train.kernels import rms_norm, rotate
from moe_train.model.head import put_loss_in_head
from moe_train.model.profiles import profile_of

CAUSAL = "moe_train_causal"
"""Name of `causal_attention` among Hugging Face's attention implementations."""
KERNELS = ("rotary", "cross_entropy")
ROTARY = "apply_rotary_pos_emb"
"""What every family calls its rotary embedding; an interleaved one has another name, and stays."""


def fuse_dense_layers(model: PreTrainedModel, kernels: Sequence[str] | None, device: torch.device) -> None:
    """In place. kernels: `model.kernels` of the recipe. device: where the model will run."""
    if kernels is None:
        kernels = KERNELS if device.type == "cuda" else ()
    fuse_norms(model)
    use_causal_attention(model)
    put_loss_in_head(model, fused="cross_entropy" in kernels)
    if "rotary" in kernels:
        fuse_rotary(model)


def compile_attention(model: PreTrainedModel, **settings: Any) -> None:
    """In place, each layer's by itself: what is around it has hooks, and reads what the host knows.

    settings: of `torch.compile`.
    """
    for layer in model.model.layers:
        layer.self_attn.compile(**settings)


class FusedNorm(nn.Module):
    """Hugging Face's module, its parameter and its numbers, but for one rounding less in bf16."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def fuse_norms(model: PreTrainedModel) -> None:
    """One kernel forward and one backward for each norm, in place of five passes and more."""
    name = profile_of(model.config.model_type).norm
    found = [module for module in model.modules() if type(module).__name__ == name]
    assert found, f"{type(model).__name__} has no {name}"
    for module in found:
        assert [key for key, _ in module.named_parameters()] == ["weight"], f"{name} has other parameters"
        module.__class__ = FusedNorm


def fuse_rotary(model: PreTrainedModel) -> None:
    """One kernel for each of queries and keys: attention keeps its own forward, with another `apply_rotary_pos_emb`."""
    found = [module for module in model.modules() if ROTARY in _names(type(module).forward)]
    assert found, f"no module of {type(model).__name__} calls {ROTARY}"
    for module in found:
        module.forward = MethodType(_with_our_rotary(type(module).forward), module)


@functools.cache
def _with_our_rotary(theirs: Any) -> Any:
    """One for all layers: `torch.compile` keeps what it made among the globals of a function, and finds it again by the
    function's code."""
    ours = FunctionType(
        theirs.__code__, {**theirs.__globals__, ROTARY: _rotate_both}, theirs.__name__, theirs.__defaults__,
        theirs.__closure__,
    )  # fmt: skip
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return ours


def _names(function: Any) -> tuple[str, ...]:
    """Global names that a function uses."""
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _rotate_both(
    q_BNSD: torch.Tensor, k_BNSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(q_BNSD, cos, sin), rotate(k_BNSD, cos, sin)


def use_causal_attention(model: PreTrainedModel) -> None:
    """Attention that needs no mask: Hugging Face looks at the positions of every forward, on the host, before it leaves
    the mask out. Only where no layer has a window, and where torch's own attention is wanted."""
    config = model.config
    if config._attn_implementation != "sdpa" or _has_windows(config):
        return
    AttentionInterface.register(CAUSAL, causal_attention)
    ours = copy.deepcopy(config)  # the model's own stays: others build stock models from it
    ours._attn_implementation = CAUSAL
    for module in model.modules():
        if module is not model and getattr(module, "config", None) is config:
            module.config = ours  # type: ignore[assignment]


def _has_windows(config: PretrainedConfig) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(window) or kinds != {"full_attention"} or getattr(config, "attention_chunk_size", None) is not None


def causal_attention(
    module: nn.Module,
    query_BNSD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Each position sees itself and those before it, in its own sequence."""
    assert attention_mask is None, "the model's layers are causal, and take no other mask"
    grouped = query_BNSD.shape[1] != key.shape[1]
    y_BNSD = F.scaled_dot_product_attention(
        query_BNSD, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
    )
    return y_BNSD.transpose(1, 2).contiguous(), None
