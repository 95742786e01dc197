"""`reference/cross_entropy.py`: a row is read from memory once, again from the cache, and written once.

B elements of a row at a time.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.triton.host import power_of_2

LARGEST_BLOCK = 8192


def cross_entropy_(logits_CV: torch.Tensor, labels_C: torch.Tensor, slope: bool) -> torch.Tensor:
    """See the reference."""
    tokens, vocabulary = logits_CV.shape
    assert logits_CV.is_contiguous()
    losses_C = torch.empty(tokens, dtype=torch.float32, device=logits_CV.device)
    if logits_CV.numel():
        block = min(power_of_2(vocabulary), LARGEST_BLOCK)
        _kernel[(tokens,)](logits_CV, labels_C, losses_C, V=vocabulary, SLOPE=slope, B=block, num_warps=8)
    return losses_C


@triton.jit
def _kernel(logits, labels, losses, V: tl.constexpr, SLOPE: tl.constexpr, B: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    row = logits + token * V
    picked = tl.load(row + label).to(tl.float32)
    largest = tl.full([B], float("-inf"), tl.float32)
    for start in range(0, V, B):
        column = start + tl.arange(0, B)
        largest = tl.maximum(largest, tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32))
    shift = tl.max(largest, axis=0)
    total = tl.zeros([B], tl.float32)
    for start in range(0, V, B):
        column = start + tl.arange(0, B)
        total += tl.exp(tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32) - shift)
    norm = shift + tl.log(tl.sum(total, axis=0))
    tl.store(losses + token, norm - picked)
    if SLOPE:
        for start in range(0, V, B):
            column = start + tl.arange(0, B)
            share = tl.exp(tl.load(row + column, mask=column < V, other=float("-inf")).to(tl.float32) - norm)
            share = tl.where(column == label, share - 1.0, share)
            tl.store(row + column, share.to(logits.dtype.element_ty), mask=column < V)
