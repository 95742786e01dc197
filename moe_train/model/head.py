"""The output head and the loss as one: hidden states -> summed cross-entropy, without the logits of all tokens at once.

A model given `labels` answers with `loss`, a sum over tokens, and makes no `logits`; without labels it does what
Hugging Face's does. The head's weight is only used inside of the head's own forward, which is where ZeRO-3 has it.

B sequences, S tokens, T = B * S, C tokens at once, V vocabulary, H hidden size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from moe_train.kernels import cross_entropy_

LOGITS_AT_ONCE = 1 << 27
"""So many logits are made at a time, but never fewer than those of `FEWEST_ROWS` tokens."""
FEWEST_ROWS = 1024
"""With fewer, adding up the weight's gradient costs more than the GEMM it comes from."""
IGNORED = -100
"""The label of a token that counts nothing."""
UNSUPPORTED = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""Fields of families that do more to their logits than multiply hidden states with the head."""


class LossHead(nn.Linear):
    """The family's own head, which computes the loss instead of logits while it has labels."""

    labels_BS: torch.Tensor | None = None
    fused = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.labels_BS is None:
            return super().forward(input)
        return linear_cross_entropy(input.flatten(0, -2), self.weight, self.labels_BS.flatten(), self.fused)


def put_loss_in_head(model: PreTrainedModel, fused: bool = False) -> None:
    """From now on the model takes `labels` [B, S], the next token of each, -100 for those that count nothing.

    Args:
        fused: see `linear_cross_entropy`.
    """
    head: Any = model.get_output_embeddings()
    kind = type(head)
    assert kind is nn.Linear, kind
    assert head.bias is None
    assert not any(getattr(model.config, name, None) for name in UNSUPPORTED), f"{model.config.model_type}: its logits"
    head.__class__ = LossHead
    head.fused = fused
    model.register_forward_pre_hook(partial(_take_labels, head), with_kwargs=True)
    model.register_forward_hook(partial(_give_loss, head))


def _take_labels(head: LossHead, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    head.labels_BS = kwargs.get("labels")
    return args, {name: value for name, value in kwargs.items() if name != "labels"}


def _give_loss(head: LossHead, model: nn.Module, args: tuple, output: Any) -> Any:
    if head.labels_BS is None:
        return output
    head.labels_BS = None
    return replace(output, loss=output.logits, logits=None)


def linear_cross_entropy(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, fused: bool = False
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of x @ weight.T in nats, in float32 or the wider type of x.

    Gradients are made with the loss, chunk by chunk, where they are wanted at all; the weight's is added up in float32.

    Args:
        fused: a GPU makes losses and slopes of the logits by one kernel.
    """
    with_gradients = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(x_TH, weight_VH, labels_T, fused, with_gradients)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the gradients of what was given, for a loss gradient of 1; backward scales them."""

    @staticmethod
    def forward(ctx, x_TH, weight_VH, labels_T, fused, with_gradients):
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        for_x, for_weight = (with_gradients and ctx.needs_input_grad[i] for i in (0, 1))
        loss = torch.zeros((), dtype=wide, device=x_TH.device)
        dx_TH = torch.empty_like(x_TH) if for_x else None
        dweight_VH = None
        rows = max(LOGITS_AT_ONCE // weight_VH.shape[0], FEWEST_ROWS)
        for start in range(0, x_TH.shape[0], rows):
            x_CH, labels_C = x_TH[start : start + rows], labels_T[start : start + rows]
            counted_C = labels_C != IGNORED
            logits_CV = F.linear(x_CH, weight_VH)
            with_slope = for_x or for_weight
            losses_C = cross_entropy_(logits_CV, labels_C.clamp(min=0), slope=with_slope, fused=fused)
            loss += torch.where(counted_C, losses_C, 0.0).sum()
            slope_CV, counted_C1 = logits_CV, counted_C.unsqueeze(1)  # in the memory of the logits
            if dx_TH is not None:
                torch.mul(slope_CV @ weight_VH, counted_C1, out=dx_TH[start : start + rows])
            if for_weight:
                dweight_VH = _added(dweight_VH, slope_CV.t(), x_CH * counted_C1, wide, rows < x_TH.shape[0])
        if for_weight and dweight_VH is None:
            dweight_VH = torch.zeros_like(weight_VH)
        ctx.save_for_backward(dx_TH, None if dweight_VH is None else dweight_VH.to(weight_VH.dtype))
        return loss

    @staticmethod
    def backward(ctx, *grads):
        dx_TH, dweight_VH = ctx.saved_tensors
        return *(None if saved is None else saved * grads[0] for saved in (dx_TH, dweight_VH)), None, None, None


def _added(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, wide: torch.dtype, more: bool) -> torch.Tensor:
    """total + a @ b, in place; the first of several products is made wide, so that it can be added to."""
    if total is None:
        return (a @ b).to(wide) if more else a @ b
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)
