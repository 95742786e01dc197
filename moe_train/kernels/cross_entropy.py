"""Cross-entropy of logits and its slope, in the memory of the logits."""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.reference import cross_entropy as reference


def cross_entropy_(logits_CV: torch.Tensor, labels_C: torch.Tensor, *, slope: bool, fused: bool) -> torch.Tensor:
    """Nats of each token [C], in float32 or the wider type of the logits.

    Args:
        logits_CV: [C, V], contiguous. slope: turn them into the gradient of the sum of the losses, in place.
        fused: by one kernel on a GPU, not by several of torch's.
    """
    chosen = dense_implementation("cross_entropy", logits_CV) if fused else reference
    return chosen.cross_entropy_(logits_CV, labels_C, slope)
