"""torch's AdamW, which can also update in one pass: gradients as they came, the weights in use written with it."""

import torch

from moe_train.kernels import AdamWRule, adamw_step_


class OnePassAdamW(torch.optim.AdamW):
    """States, options and `step` are those of torch, in whose checkpoints nothing changes."""

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see each step, which is `step` with gradients on the parameters."""
        return bool(self._optimizer_step_post_hooks or self._optimizer_step_pre_hooks)

    @torch.no_grad()
    def update(self, updates: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> None:
        """One step for some of the parameters, flat ones.

        Args:
            updates: gradient in any type, what it is multiplied by [1], and where to write the new weights in the type
                of forward, or None.
        """
        for group in self.param_groups:
            mine = [parameter for parameter in group["params"] if parameter in updates]
            if not mine:
                continue
            beta_1, beta_2 = group["betas"]
            rule = AdamWRule(
                lr=group["lr"], beta_1=beta_1, beta_2=beta_2, eps=group["eps"], weight_decay=group["weight_decay"]
            )
            for parameter in mine:
                self._make_state(parameter)
                self.state[parameter]["step"] += 1
            corrections = _corrections(self.state[mine[0]]["step"], beta_1, beta_2).to(mine[0])
            for parameter in mine:
                gradient, factor, used = updates[parameter]
                state = self.state[parameter]
                moments = state["exp_avg"], state["exp_avg_sq"]
                adamw_step_(parameter.detach(), *moments, gradient, factor, corrections, used, rule)

    def _make_state(self, parameter: torch.nn.Parameter) -> None:
        """As the first `step` does."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


def _corrections(count: torch.Tensor, beta_1: float, beta_2: float) -> torch.Tensor:
    """1 - beta_1^t and sqrt(1 - beta_2^t) in float64, on the device of the count."""
    betas = torch.full((2,), beta_1, dtype=torch.float64, device=count.device)
    betas[1:].fill_(beta_2)  # filled on the device: a copy from the host would wait
    left = 1 - betas ** count.double()
    left[1:].sqrt_()
    return left
