"""Tokens per second and model FLOPs utilisation (MFU).

MFU = tokens/s x FLOPs per token / peak FLOP/s of all devices (PaLM, arXiv 2204.02311, appendix B). FLOPs are those the
model needs, forward and backward: recomputation for activation checkpointing is not counted.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Dense (no structured sparsity) tensor-core peaks in FLOP/s from the vendors' data sheets; bf16 and fp16 are equal on
# all of these. All words must occur in the device's name; the first row that fits wins: variants before their family.
HALF_PRECISION_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("gb200",), 2500e12),
    (("b200",), 2250e12),
    (("h200", "nvl"), 835.5e12),
    (("h200",), 989.4e12),
    (("gh200",), 989.4e12),
    (("h100", "pcie"), 756.5e12),
    (("h100", "nvl"), 835.5e12),
    (("h100",), 989.4e12),
    (("h800", "pcie"), 756.5e12),
    (("h800",), 989.4e12),
    (("h20",), 148e12),
    (("a100",), 312e12),
    (("a800",), 312e12),
    (("a40",), 149.7e12),
    (("a30",), 165e12),
    (("l40s",), 362e12),
    (("l40",), 181e12),
    (("l4",), 121e12),
    (("mi300x",), 1307.4e12),
    (("mi325x",), 1307.4e12),
    (("mi250x",), 383e12),
)

# fp32 outside the tensor cores, which is what torch uses unless TF32 is switched on
FP32_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("h200", "nvl"), 60e12),
    (("h200",), 67e12),
    (("gh200",), 67e12),
    (("h100", "pcie"), 51e12),
    (("h100", "nvl"), 60e12),
    (("h100",), 67e12),
    (("a100",), 19.5e12),
)

# a slice of a GPU, or one under another power limit, does not reach its family's peak
UNLIKE_THEIR_FAMILY = {"mig", "laptop", "max"}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of one device; None where it is not known, so that no MFU is made up.

    `device_name` as torch.cuda.get_device_name gives it, `dtype` one of bf16, fp16, fp32 (else ValueError).
    """
    if dtype not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"dtype {dtype!r} is not one of bf16, fp16, fp32")
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & UNLIKE_THEIR_FAMILY:
        return None
    table = FP32_PEAKS if dtype == "fp32" else HALF_PRECISION_PEAKS
    return next((peak for needed, peak in table if words.issuperset(needed)), None)


def active_matmul_params(
    *, total_params: int, embedding_params: int, expert_params: int, num_experts: int, top_k: int
) -> float:
    """Parameters that one token is multiplied with.

    `embedding_params`: the input embedding, a look-up; 0 where it is tied to the output head, which does multiply.
    `expert_params`: all routed experts of all layers; a token meets top_k / num_experts of them. Shared experts, router
    and head are part of the rest. Norm weights are counted although they are no matmul: under 0.1 % of any real model.
    """
    return total_params - embedding_params - expert_params * (1.0 - top_k / num_experts)


def model_flops_per_token(
    *,
    active_matmul_params: float,
    num_layers: int,
    num_heads: int,
    head_dim: float,
    sequence_length: int,
    causal: bool = True,
) -> float:
    """FLOPs to train on one token: 6 N + 12 L H Q S (PaLM, arXiv 2204.02311, appendix B), forward and backward.

    N active parameters, L layers with attention, H query heads, Q head size, S sequence length. A causal token sees
    S / 2 others on average, which halves the second term. Where query-key and value heads differ in size (latent
    attention), `head_dim` is their mean.
    """
    seen = sequence_length / 2 if causal else sequence_length
    return 6.0 * active_matmul_params + 12.0 * num_layers * num_heads * head_dim * seen


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed over one window."""

    tokens_per_s: float
    """Of all ranks together."""
    mfu: float | None
    """0 to 1; None where FLOPs per token or the device's peak is unknown."""
    seconds: float
    """Length of the window without pauses."""


class Throughput:
    """Counts tokens between two readings.

    The caller reads after the step's loss has reached the host; without that wait a GPU's queue would be measured.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        peak_flops_per_device: float | None = None,
        num_devices: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.flops_per_token = flops_per_token
        self.peak = None if peak_flops_per_device is None else peak_flops_per_device * num_devices
        self.clock = clock
        self.num_tokens = 0
        self.paused_s = 0.0
        self.started = clock()

    def add(self, num_tokens: int) -> None:
        """Count tokens trained on, over all ranks."""
        self.num_tokens += num_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside: evaluation, saving."""
        began = self.clock()
        try:
            yield
        finally:
            self.paused_s += self.clock() - began

    def read(self) -> Rate:
        """Rate since the previous reading (or since construction); starts a new window."""
        now = self.clock()
        seconds = now - self.started - self.paused_s
        tokens_per_s = self.num_tokens / seconds if seconds > 0 else 0.0
        mfu = None
        if self.flops_per_token is not None and self.peak is not None:
            mfu = tokens_per_s * self.flops_per_token / self.peak
        self.num_tokens, self.paused_s, self.started = 0, 0.0, now
        return Rate(tokens_per_s=tokens_per_s, mfu=mfu, seconds=seconds)
