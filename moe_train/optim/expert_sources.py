"""What the layer fetches its weights from: expert tensors as differentiable values, for the length of a context."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from moe_train.moe import ExpertWeights, SlotPlan
from moe_train.optim.expert_tensor import ExpertTensor


class _Fetch(torch.autograd.Function):
    """A tensor's weights as a differentiable value; adjoint: hand the gradient to the tensor, which shards it."""

    @staticmethod
    def forward(ctx, anchor, tensor: ExpertTensor):
        ctx.tensor = tensor
        return tensor.gather()

    @staticmethod
    def backward(ctx, *grads):
        ctx.tensor.accumulate(grads[0])
        return None, None


@contextmanager
def fetched(tensors: Sequence[ExpertTensor], anchor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The slots of each tensor, [slots, *unit_shape]. At stage 3 backward gathers what it needs of them again.

    Do not nest: torch asks the innermost hooks alone, so the outer weights would be kept from forward to backward.

    Args:
        anchor: something that requires a gradient, so that the values are part of the graph.
    """
    values: list[torch.Tensor] = [_Fetch.apply(anchor, tensor) for tensor in tensors]  # type: ignore[misc]
    options = tensors[0].options if tensors else None
    if options is None or options.stage < 3 or options.keep_gathered or not torch.is_grad_enabled():
        yield values
        return
    owners = {
        value.untyped_storage().data_ptr(): tensor
        for value, tensor in zip(values, tensors, strict=True)
        if value.numel()
    }

    def pack(saved: torch.Tensor):
        owner = owners.get(saved.untyped_storage().data_ptr())
        return saved if owner is None else (owner, saved.size(), saved.stride(), saved.storage_offset())

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        owner, size, stride, offset = packed
        return owner.gather_again().as_strided(size, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield values


class LayerExperts:
    """One layer's `ExpertSource`: its two stacked parameters, fetched together."""

    def __init__(self, gate_up: ExpertTensor, down: ExpertTensor):
        self.tensors = (gate_up, down)
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def fetch(self) -> Iterator[ExpertWeights]:
        versions = tuple(tensor.version for tensor in self.tensors)
        with fetched(self.tensors, self._anchor) as values:
            yield ExpertWeights(*values, version=None if None in versions else versions)

    def set_plan(self, plan: SlotPlan) -> None:
        """See `ExpertTensor.set_plan`. Collective."""
        for tensor in self.tensors:
            tensor.set_plan(plan)


class SharedExpertSource:
    """The parameters of a whole module, held as expert tensors: a shared expert on ranks of its own, or cut by tensor
    parallelism.

    Args:
        tensors: by the name under which `fetch` gives the weights; all with the unit `None`, or all without units on a
            rank that holds nothing, where `fetch` gives nothing and issues nothing.
    """

    def __init__(self, tensors: Mapping[str, ExpertTensor]):
        self.tensors = dict(tensors)
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def fetch(self) -> Iterator[dict[str, torch.Tensor]]:
        """The weights, for the length of the context; gradients go back through them."""
        held = {name: tensor for name, tensor in self.tensors.items() if tensor.units}
        with fetched(list(held.values()), self._anchor) as values:
            yield {name: value.squeeze(0) for name, value in zip(held, values, strict=True)}
