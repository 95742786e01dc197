"""All parameters of one rank that DeepSpeed does not hold, and their optimizer.

Megatron's distributed optimizer for the experts, beside DeepSpeed ZeRO for everything else. The weights are no
registered parameters, so DeepSpeed's loops never see them. `ExpertTensor` says how one of them is sharded.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from moe_train.moe import SlotPlan
from moe_train.optim.adamw import OnePassAdamW
from moe_train.optim.expert_tensor import ExpertTensor
from moe_train.optim.factory import OptimizerFactory
from moe_train.optim.fragments import Fragment, allocate_state, scalar_state, state_views
from moe_train.parallel import ParallelGroup


class ExpertStore:
    """Args:
    tensors: one per layer and parameter, in the same order on every rank, those without units here included.
    make_optimizer: param groups -> a torch optimizer over the master shards.
    decays: whether weight decay applies, by parameter name and number of dimensions (of one expert).
    world: all ranks.
    average_over: gradients are summed over all holders and divided by this, the number of ranks that read different
        sequences, as the dense part's are.
    """

    def __init__(
        self,
        tensors: list[ExpertTensor],
        make_optimizer: OptimizerFactory,
        decays: Callable[[str, int], bool],
        world: ParallelGroup,
        average_over: int,
    ):
        self.tensors, self.world, self.average_over = tensors, world, average_over
        held = [tensor for tensor in tensors if tensor.numel]
        groups = [
            {"params": [t.master for t in held if decays(t.name, len(t.logical_shape)) == decay], "decay": decay}
            for decay in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        # a rank without experts has nothing to optimize, and torch refuses an empty optimizer
        self.optimizer = make_optimizer(groups) if groups else None

    def finish_gradients(self) -> None:
        """Sum over all holders, redundant copies included, and average. Collective."""
        for tensor in self.tensors:
            tensor.finish_gradient(1.0 / self.average_over)

    def squared_norm(self) -> torch.Tensor:
        """Sum of squares of all gradients here, each logical element once, a float64 scalar. Collective."""
        device = self.tensors[0].options.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for tensor in self.tensors:
            if tensor.numel and tensor.owner:
                total += tensor.squared_norm().to(device)
        return self.world.all_reduce_(total)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = lr

    def step(self, grad_scale: torch.Tensor | float) -> None:
        """Scale the gradients (clip factor, loss scale), update the shards, publish the new weights. Collective.

        A scale that is a tensor on the device is not waited for, but by states that are kept on the host.
        """
        given = [tensor for tensor in self.tensors if tensor.reduced is not None]
        factors = {t: torch.as_tensor(grad_scale, device=t.options.device).to(t.master.dtype).view(1) for t in given}
        one_pass = isinstance(self.optimizer, OnePassAdamW) and not self.optimizer.watched
        if one_pass:
            self.optimizer.update({t.master: t.update(factors[t]) for t in given if t.numel})  # type: ignore[union-attr]
        else:
            for tensor in given:
                tensor.hand_over(factors[tensor])
            if self.optimizer:
                self.optimizer.step()
        self.drop_gradients()
        self.publish(written=one_pass)

    def drop_gradients(self) -> None:
        for tensor in self.tensors:
            tensor.drop_gradients()

    def publish(self, written: bool = False) -> None:
        """Master weights -> all weights that forward uses. Collective. written: an optimizer has written the shards."""
        for tensor in self.tensors:
            tensor.publish(written)

    def set_plans(self, plans: Sequence[SlotPlan]) -> None:
        """Other redundant experts, between two steps: one plan per MoE layer, in model order. Collective."""
        layers: dict[str, list[ExpertTensor]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.num_experts is not None:
                layers[tensor.name.rpartition(".")[0]].append(tensor)
        for tensors, plan in zip(layers.values(), plans, strict=True):
            for tensor in tensors:
                tensor.set_plan(plan)

    def fragments(self) -> Iterator[Fragment]:
        for tensor in self.tensors:
            if tensor.numel:
                assert self.optimizer is not None
                yield from tensor.fragments(state_views(self.optimizer, tensor.master))

    def scalars(self) -> dict[str, float]:
        return scalar_state(self.optimizer) if self.optimizer else {}

    def allocate_state(self, kinds: set[str], scalars: dict[str, float]) -> None:
        if self.optimizer:
            allocate_state(self.optimizer, [t.master for t in self.tensors if t.numel], kinds, scalars)

    def bytes_held(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer states on this rank (gradients: at their peak)."""
        held = {"weights": 0, "gradients": 0, "states": 0}
        for tensor in self.tensors:
            for kind, size in tensor.bytes_held().items():
                held[kind] += size
            for value in self.optimizer.state.get(tensor.master, {}).values() if self.optimizer else ():
                held["states"] += value.nbytes if isinstance(value, torch.Tensor) and value.dim() else 0
        return held
