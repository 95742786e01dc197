"""What is minimised: the mean over every valid token of the optimizer step, plus the router losses.

B sequences, S tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 27
"""float32 logits beyond this many are recomputed in backward, chunk by chunk, instead of kept."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveScale:
    """Denominators of one optimizer step, over all ranks and micro-batches.

    aux_coef, z_coef: weights of the auxiliary loss (mean over sequences and layers) and of the z-loss (mean over tokens
    and layers).
    """

    tokens: int
    sequences: int
    num_moe_layers: int
    aux_coef: float
    z_coef: float

    def objective(self, loss_sum: torch.Tensor, router_losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """This micro-batch's share of the step's objective; the shares of all ranks and micro-batches add up to it."""
        total = loss_sum / self.tokens
        if "aux_loss" in router_losses:
            total = total + router_losses["aux_loss"] * (self.aux_coef / (self.sequences * self.num_moe_layers))
        if "z_loss" in router_losses:
            total = total + router_losses["z_loss"] * (self.z_coef / (self.tokens * self.num_moe_layers))
        return total


def token_loss_sum(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the cross-entropy in nats, in float32; a label of -100 counts nothing."""
    logits, labels = logits_BSV.flatten(0, -2), labels_BS.flatten()
    rows = max(LOGITS_AT_ONCE // logits.shape[-1], 1)
    if logits.shape[0] <= rows:
        return _cross_entropy(logits, labels)
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.stack([checkpoint(_cross_entropy, *part, use_reentrant=False) for part in parts]).sum()  # type: ignore


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, reduction="sum", ignore_index=-100)
