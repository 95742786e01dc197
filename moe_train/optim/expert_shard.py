"""The expert slices of one rank: weights, gradients and optimizer states, sharded over the ranks that hold the same.

Megatron's distributed optimizer for the experts, beside DeepSpeed ZeRO for everything else. The weights are no
registered parameters, so DeepSpeed's loops never see them. Each stacked expert parameter of a layer is one
`ExpertTensor`: its local experts, flattened, padded and cut in equal shards over the expert-data-parallel group.

stage  weights          gradients                       states
0      whole slice      all_reduce once per step        whole slice
1      whole slice      reduce_scatter once per step    shard (all_gather of weights once per step)
2      whole slice      reduce_scatter per micro-batch  shard (likewise)
3      shard            reduce_scatter per micro-batch  shard; forward all_gathers, backward gathers again
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe_train.moe import ExpertWeights
from moe_train.optim.factory import OptimizerFactory
from moe_train.optim.fragments import Fragment, allocate_state, narrow_views, scalar_state, state_views
from moe_train.parallel import ParallelGroup


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How expert tensors are stored.

    compute_dtype: of forward and backward. grad_dtype: of accumulation and reduction. state_device: where master
    weights and moments live (the host, when offloaded). keep_gathered: at stage 3, leave gathered weights to whoever
    saves activations (activation checkpointing drops and recomputes them) instead of gathering again in backward.
    """

    stage: int
    compute_dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    state_device: torch.device
    keep_gathered: bool = False


class ExpertTensor:
    """One stacked expert parameter of one layer: `count` experts from `first` on, each of `expert_shape`.

    Args:
        name: Hugging Face name of the whole [E, ...] parameter.
        group: the expert-data-parallel group, whose ranks hold the same experts.
    """

    def __init__(
        self,
        name: str,
        first: int,
        count: int,
        expert_shape: tuple[int, ...],
        group: ParallelGroup,
        options: ShardOptions,
    ):
        self.name, self.first, self.count, self.expert_shape = name, first, count, tuple(expert_shape)
        self.group, self.options = group, options
        self.expert_numel = torch.Size(expert_shape).numel()
        self.numel = count * self.expert_numel
        self.num_shards = group.world_size if options.stage >= 1 else 1
        self.shard_numel = -(-self.numel // self.num_shards)
        self.shard_start = self.shard_numel * (group.rank_in_group if self.num_shards > 1 else 0)
        master_dtype = torch.promote_types(options.compute_dtype, torch.float32)
        shard_range = slice(self.shard_start, self.shard_start + self.shard_numel)
        padded = self.shard_numel * self.num_shards
        kept = torch.zeros(
            padded if options.stage < 3 else self.shard_numel, dtype=options.compute_dtype, device=options.device
        )
        self.full = kept if options.stage < 3 else None
        self.part = kept[shard_range] if options.stage < 3 else kept
        shared = master_dtype == options.compute_dtype and options.state_device == options.device
        master = self.part if shared else self.part.to(options.state_device, master_dtype)
        self.master = torch.nn.Parameter(master)
        self.gradient: torch.Tensor | None = None
        self._regathered: torch.Tensor | None = None

    def write_expert(self, expert: int, value: torch.Tensor) -> None:
        """Set the master weights of one logical expert, as far as this rank's shard holds them."""
        offset = (expert - self.first) * self.expert_numel
        start, stop = max(offset, self.shard_start), min(offset + self.expert_numel, self.shard_stop)
        if start < stop:
            piece = value.reshape(-1)[start - offset : stop - offset]
            self.master.data[start - self.shard_start : stop - self.shard_start].copy_(piece)

    @property
    def shard_stop(self) -> int:
        """End of the shard within the slice, padding left out."""
        return min(self.shard_start + self.shard_numel, self.numel)

    def publish(self) -> None:
        """Master weights -> the weights that forward uses. Collective over the group at stages 1 and 2."""
        if self.part.data_ptr() != self.master.data_ptr():
            self.part.copy_(self.master.data)
        if self.full is not None and self.num_shards > 1 and self.numel:
            self.group.all_gather_(self.full, self.part)

    def gather(self) -> torch.Tensor:
        """The whole slice [count, *expert_shape]; collective at stage 3."""
        full = self.full
        if full is None and self.num_shards == 1:
            full = self.part
        elif full is None:
            full = self.part.new_empty(self.shard_numel * self.num_shards)
            if self.numel:
                self.group.all_gather_(full, self.part)
        return full[: self.numel].view(self.count, *self.expert_shape)

    def gather_again(self) -> torch.Tensor:
        """Stage 3, in backward: kept until this tensor's own gradient arrives."""
        if self._regathered is None:
            self._regathered = self.gather()
        return self._regathered

    def accumulate(self, grad: torch.Tensor) -> None:
        """Take one micro-batch's gradient of the slice. Collective over the group at stages 2 and 3."""
        self._regathered = None
        if not self.numel:
            return
        dtype = torch.promote_types(self.options.grad_dtype, grad.dtype)
        if self.options.stage < 2:
            if self.gradient is None:
                self.gradient = grad.new_zeros(self.shard_numel * self.num_shards, dtype=dtype)
            self.gradient[: self.numel].add_(grad.reshape(-1))
            return
        padded = grad.new_zeros(self.shard_numel * self.num_shards, dtype=dtype)
        padded[: self.numel].copy_(grad.reshape(-1))
        shard = self.group.reduce_scatter(padded)
        self.gradient = shard if self.gradient is None else self.gradient.add_(shard)

    def finish_gradient(self, scale: float) -> None:
        """End of the optimizer step's last backward: reduce what is left, scale, hand it to the master weights."""
        gradient = self.gradient
        if gradient is None:
            gradient = self.part.new_zeros(
                self.shard_numel * (self.num_shards if self.options.stage < 2 else 1),
                dtype=torch.promote_types(self.options.grad_dtype, self.part.dtype),
            )
        if self.options.stage == 0:
            self.group.all_reduce_(gradient)
        elif self.options.stage == 1 and self.numel:
            gradient = self.group.reduce_scatter(gradient)
        self.gradient = None
        self.master.grad = gradient.to(self.master.device, self.master.dtype).mul_(scale)

    @property
    def owner(self) -> bool:
        """This rank counts and saves the shard; at stage 0 all ranks of the group hold the same one."""
        return self.num_shards > 1 or self.group.rank_in_group == 0

    def fragments(self, views: dict[str, torch.Tensor]) -> Iterator[Fragment]:
        """The shard, cut at the borders of logical experts."""
        for expert in range(self.count):
            offset = expert * self.expert_numel
            start, stop = max(offset, self.shard_start), min(offset + self.expert_numel, self.shard_stop)
            if start < stop:
                yield Fragment(
                    name=self.name,
                    expert=self.first + expert,
                    shape=self.expert_shape,
                    start=start - offset,
                    stop=stop - offset,
                    views=narrow_views(views, start - self.shard_start, stop - self.shard_start),
                    owner=self.owner,
                )


class _Fetch(torch.autograd.Function):
    """A slice's weights as a differentiable value; adjoint: hand the gradient to the store, which shards it."""

    @staticmethod
    def forward(ctx, anchor, tensor: ExpertTensor):
        ctx.tensor = tensor
        return tensor.gather()

    @staticmethod
    def backward(ctx, *grads):
        ctx.tensor.accumulate(grads[0])
        return None, None


class LayerExperts:
    """One layer's `ExpertSource`: its two stacked parameters, fetched together."""

    def __init__(self, gate_up: ExpertTensor, down: ExpertTensor):
        self.tensors = (gate_up, down)
        # something that requires a gradient, so that the fetch is part of the graph
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def fetch(self) -> Iterator[ExpertWeights]:
        values = [_Fetch.apply(self._anchor, tensor) for tensor in self.tensors]
        options = self.tensors[0].options
        if options.stage < 3 or options.keep_gathered or not torch.is_grad_enabled():
            yield ExpertWeights(*values)  # type: ignore[arg-type]
            return
        owners = {
            value.untyped_storage().data_ptr(): tensor
            for value, tensor in zip(values, self.tensors, strict=True)
            if value.numel()  # type: ignore[union-attr]
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
            yield ExpertWeights(*values)  # type: ignore[arg-type]


class ExpertStore:
    """All expert slices of this rank and their optimizer.

    Args:
        tensors: one per layer and stacked parameter, in the same order on every rank.
        make_optimizer: param groups -> a torch optimizer over the master shards.
        decays: whether weight decay applies, by parameter name.
        world: all ranks: gradients are summed over the copies and divided by its whole size, as the dense part's are.
    """

    def __init__(
        self,
        tensors: list[ExpertTensor],
        make_optimizer: OptimizerFactory,
        decays: Callable[[str, int], bool],
        world: ParallelGroup,
    ):
        self.tensors, self.world = tensors, world
        held = [tensor for tensor in tensors if tensor.numel]
        groups = [
            {"params": [t.master for t in held if decays(t.name, len(t.expert_shape)) == decay], "decay": decay}
            for decay in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        # a rank without experts has nothing to optimize, and torch refuses an empty optimizer
        self.optimizer = make_optimizer(groups) if groups else None

    def finish_gradients(self) -> None:
        """Reduce over the copies and average over the world. Collective."""
        for tensor in self.tensors:
            tensor.finish_gradient(1.0 / self.world.world_size)

    def squared_norm(self) -> torch.Tensor:
        """Sum of squares of all expert gradients, each logical element once, a float64 scalar. Collective."""
        device = self.tensors[0].options.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for tensor in self.tensors:
            if tensor.numel and tensor.owner:
                assert tensor.master.grad is not None
                total += torch.linalg.vector_norm(tensor.master.grad).to(device, torch.float64).square()
        return self.world.all_reduce_(total)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = lr

    def step(self, grad_scale: float) -> None:
        """Scale the gradients (clip factor, loss scale), update the shards, publish the new weights. Collective."""
        for tensor in self.tensors:
            if tensor.master.grad is not None and grad_scale != 1.0:
                tensor.master.grad.mul_(grad_scale)
        if self.optimizer:
            self.optimizer.step()
        self.drop_gradients()
        self.publish()

    def drop_gradients(self) -> None:
        for tensor in self.tensors:
            tensor.master.grad = tensor.gradient = None

    def publish(self) -> None:
        for tensor in self.tensors:
            tensor.publish()

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
        """Bytes of weights, gradients and optimizer states of the experts on this rank (gradients: at their peak)."""
        weights = states = gradients = 0
        for tensor in self.tensors:
            weights += (tensor.full if tensor.full is not None else tensor.part).nbytes
            states += 0 if tensor.master.data_ptr() == tensor.part.data_ptr() else tensor.master.nbytes
            for value in self.optimizer.state.get(tensor.master, {}).values() if self.optimizer else ():
                states += value.nbytes if isinstance(value, torch.Tensor) and value.dim() else 0
            whole = tensor.shard_numel * (tensor.num_shards if tensor.options.stage < 2 else 1)
            gradients += whole * torch.promote_types(tensor.options.grad_dtype, tensor.part.dtype).itemsize
        return {"weights": weights, "gradients": gradients, "states": states}
