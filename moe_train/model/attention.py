"""Causal attention by SDPA's flag: no mask, and no look at the batch to find out whether there should be one."""

from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

CAUSAL = "moe_train_causal_sdpa"
"""A name that transformers has no mask for: its models then make none, as its documentation of `AttentionInterface`
says, and SDPA is causal by its flag."""


def attend_causally(model: PreTrainedModel) -> None:
    """Where `sdpa` was asked for and every layer sees all earlier tokens: the same numbers without a mask.

    Rows are whole and never padded here, which transformers finds out at every forward by reading the device; the host
    waits for it. Models with windows keep their masks.
    """
    config = model.config
    if config._attn_implementation == "sdpa" and not _has_windows(config) and getattr(config, "is_causal", True):
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        config._attn_implementation = CAUSAL


def _has_windows(config) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(window) or kinds != {"full_attention"} or getattr(config, "attention_chunk_size", None) is not None
