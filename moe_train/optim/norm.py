"""One gradient norm over dense and expert parameters, inside each DeepSpeed optimizer.

DeepSpeed computes the dense norm, clips by it and skips on a value that is not finite. Each override below adds
the squared norm of the experts where that happens, so that norm, clip factor and skip are one decision for both.
They name DeepSpeed 0.19.8's methods; `attach` fails loudly when a version has moved one.

Under tensor parallelism the dense norm is a sum over the ranks of a tensor group: of parameters that are cut from each
rank, of whole ones from the first. The experts' is known to all ranks, and counted once.
"""

from collections.abc import Iterable

import deepspeed.comm as dist
import torch
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.utils import get_norm_dtype

from moe_train.parallel import ParallelGroup, tensor_part


def dense_squared_norm(parameters: Iterable[torch.Tensor], tensor: ParallelGroup) -> torch.Tensor:
    """Sum of squares of the dense gradients, each logical element once, a float64 scalar. Collective over `tensor`."""
    counted = [p.grad for p in parameters if tensor_part(p) is not None or tensor.rank_in_group == 0]
    squares = [torch.linalg.vector_norm(g).double().square() for g in counted if g is not None]
    return tensor.all_reduce_(torch.stack(squares).sum())


class ExpertNorm:
    """Squared gradient norm of all experts, set before each optimizer step (times the loss scale squared).

    Args:
        tensor: the tensor group, over which one of DeepSpeed's optimizers sums what it is given.
    """

    def __init__(self, tensor: ParallelGroup):
        self.squared = torch.zeros((), dtype=torch.float64)
        self.tensor = tensor
        self.calls = 0
        """How often DeepSpeed has asked: a version that goes round the override is noticed."""

    def value(self, like: torch.Tensor) -> torch.Tensor:
        """The norm as `like`'s type on its device."""
        self.calls += 1
        return self.squared.sqrt().to(like.device, like.dtype)

    def share(self, like: torch.Tensor) -> torch.Tensor:
        """What this rank adds to a sum over the tensor group: the norm on its first rank, else zero."""
        value = self.value(like)
        return value if self.tensor.rank_in_group == 0 else torch.zeros_like(value)


def attach(optimizer, experts: ExpertNorm) -> None:
    """Make a DeepSpeed ZeRO or BF16 optimizer count the experts in its norm."""
    for method, override in (
        ("scaled_global_norm", _stage_1_and_2),
        ("_get_norm_groups", _stage_3),
        ("get_grads_for_norm", _bf16),
    ):
        if hasattr(optimizer, method):
            setattr(optimizer, method, override(getattr(optimizer, method), experts))
            return
    raise AssertionError(
        f"{type(optimizer).__name__} has none of the norm methods this version of DeepSpeed should have"
    )


def _stage_1_and_2(original, experts: ExpertNorm):
    _look_once(original.__self__)

    def scaled_global_norm(norm_type=2):
        dense = original(norm_type)
        # an invalid dense norm is inf already; hypot keeps inf and nan, which DeepSpeed then treats as overflow
        return torch.hypot(dense, experts.value(dense))

    return scaled_global_norm


def _look_once(optimizer) -> None:
    """Let a ZeRO-1 or ZeRO-2 optimizer find out once whether a step is finite, by the norm.

    DeepSpeed looks at every gradient (14 launches each), at each parameter group's norm and at every clip, and waits
    for the device seven times a step. A norm over an infinity is one, over a nan too, and DeepSpeed skips such a step
    whatever it found before. With states in host memory it has looked already, and stays as it is.
    """
    if optimizer.cpu_offload:
        return

    def check_overflow(partition_gradients=True):
        """`overflow` is false when this is called, and set by the norm."""

    def get_grad_norm_direct(gradients, params, norm_type=2):
        """As DeepSpeed's, by a kernel for many gradients, and an invalid norm stays what it is."""
        assert norm_type == 2, f"norm {norm_type}"
        own = [gradient.detach() for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        squared = torch.zeros((), dtype=torch.float32, device=optimizer.device)
        if own:
            norms = torch.stack(torch._foreach_norm(own, 2, get_norm_dtype()))  # type: ignore[attr-defined]
            if optimizer.model_parallel_rank:
                # of whole parameters the first rank's count, yet none may be infinite anywhere: zero times that is nan
                counted = torch.tensor(
                    [float(is_model_parallel_parameter(p)) for _, p in zip(own, params, strict=False)]
                )
                norms = norms * counted.to(norms.device, non_blocking=True)
            squared = norms.square().sum().float()
        dist.all_reduce(squared, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=squared, op=dist.ReduceOp.SUM)
        return squared.sqrt()

    def unscale_and_clip_grads(groups, norm):
        """As DeepSpeed's, for a norm that is known to be finite."""
        divisor = optimizer.loss_scale
        if optimizer.clip_grad > 0.0:
            divisor = ((norm / optimizer.loss_scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0) * divisor
        elif divisor == 1.0:
            return
        for group in groups:
            for gradient in group if isinstance(group, list) else [group]:
                gradient.data.mul_(1.0 / divisor)

    for override in (check_overflow, get_grad_norm_direct, unscale_and_clip_grads):
        assert hasattr(optimizer, override.__name__), f"DeepSpeed has no {override.__name__} any more"
        setattr(optimizer, override.__name__, override)


def _stage_3(original, experts: ExpertNorm):
    def _get_norm_groups():
        groups = original()
        return [*groups, experts.value(groups[0])]  # combined as a root of squares, checked for finiteness

    return _get_norm_groups


def _bf16(original, experts: ExpertNorm):
    def get_grads_for_norm(for_clipping=False):
        grads = original(for_clipping)
        if for_clipping:
            return grads
        dense, by_expert_group = grads  # of this rank; their sum over the tensor group comes next
        like = dense[0].float() if dense else experts.squared.float()
        return [*dense, experts.share(like).view(1)], by_expert_group

    return get_grads_for_norm
