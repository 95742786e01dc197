"""Cross-entropy of logits and its slope, in float32 or wider, rounded once.

C tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F


def cross_entropy_(logits_CV: torch.Tensor, labels_C: torch.Tensor, slope: bool) -> torch.Tensor:
    """Nats of each token [C]. With `slope`, the logits become the gradient of their sum."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    log_p_CV = F.log_softmax(logits_CV, dim=-1, dtype=wide)
    picked_C1 = log_p_CV.gather(1, labels_C.unsqueeze(1))
    if slope:  # probabilities, less 1 at the label: subtracted before it is rounded
        torch.exp(log_p_CV, out=logits_CV)
        logits_CV.scatter_(1, labels_C.unsqueeze(1), torch.expm1(picked_C1).to(logits_CV.dtype))
    return -picked_C1.squeeze(1)
