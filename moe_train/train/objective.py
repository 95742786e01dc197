"""What is minimised: the mean over every valid token of the optimizer step, plus the router losses."""

from dataclasses import dataclass

import torch


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
