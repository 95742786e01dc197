"""One parameter that DeepSpeed does not hold: weights, gradient and optimizer state, sharded over its equal holders.

What is at home here is flattened, padded and cut in equal shards over the group of ranks that hold the same. Redundant
copies of experts at home elsewhere lie before it and stay whole at every stage; they have weights and a gradient and
no state. Once per step their gradients go home, and fresh weights come from there.

stage  weights at home  gradients                       states
0      whole            all_reduce once per step        whole
1      whole            reduce_scatter once per step    shard (all_gather of weights once per step)
2      whole            reduce_scatter per micro-batch  shard (likewise)
3      shard            reduce_scatter per micro-batch  shard; forward all_gathers, backward gathers again
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_train.moe import SlotPlan
from moe_train.optim.fragments import Fragment, narrow_views
from moe_train.optim.replicas import Replicas
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import TensorSlice


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
    """One parameter of one layer: units of one shape, [slots, *unit_shape] in all.

    Args:
        name: Hugging Face name of the whole parameter.
        units: what is at home here: consecutive logical experts of a stacked [E, ...] parameter; `[None]` for a
            parameter without an expert dimension; nothing on a rank that holds none of it.
        logical_shape: of one unit, tensor parallelism undone.
        group: the ranks that hold the same. Where there are no units, nothing is issued over it.
        num_experts: E; None for a parameter without an expert dimension.
        part: what tensor parallelism leaves here of each unit. None: all of it.
        replicas: where the redundant copies are; no rank of its EP group may leave it out if another has it.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[int | None],
        logical_shape: tuple[int, ...],
        group: ParallelGroup,
        options: ShardOptions,
        *,
        num_experts: int | None = None,
        part: TensorSlice | None = None,
        replicas: Replicas | None = None,
    ):
        self.name, self.units, self.group, self.options = name, tuple(units), group, options
        self.num_experts = num_experts
        self.logical_units = (None,) if num_experts is None else tuple(range(num_experts))  # over all ranks
        assert set(self.units) <= set(self.logical_units), f"{name}: {units} are not among {num_experts} experts"
        self.logical_shape, self.part = tuple(logical_shape), part
        self.unit_shape = part.local_shape(self.logical_shape) if part else self.logical_shape
        self.replicas = replicas
        self.unit_numel = torch.Size(self.unit_shape).numel()
        self.numel = len(self.units) * self.unit_numel
        self.num_shards = group.world_size if options.stage >= 1 else 1
        self.shard_numel = -(-self.numel // self.num_shards)
        self.shard_start = self.shard_numel * (group.rank_in_group if self.num_shards > 1 else 0)
        self._allocate()
        self.gradient: torch.Tensor | None = None
        self._as_it_came = False  # the gradient is autograd's own, of one micro-batch: not to be written to
        self.reduced: torch.Tensor | None = None
        self.reduced_scale = 1.0
        self.copies_gradient: torch.Tensor | None = None
        self._regathered: torch.Tensor | None = None
        self._published = 0

    @classmethod
    def routed(
        cls,
        name: str,
        plan: SlotPlan,
        logical_shape: tuple[int, ...],
        expert_group: ParallelGroup,
        group: ParallelGroup,
        options: ShardOptions,
        part: TensorSlice | None = None,
    ) -> "ExpertTensor":
        """This rank's slice of a stacked parameter [E, *logical_shape], and its redundant copies, under a slot plan."""
        first, count = plan.home(expert_group.rank_in_group)
        replicas = Replicas(plan, expert_group) if plan.num_redundant else None
        units, num_experts = range(first, first + count), plan.num_experts
        return cls(name, units, logical_shape, group, options, num_experts=num_experts, part=part, replicas=replicas)

    def _allocate(self) -> None:
        """One buffer [copies | home | padding], of which stage 3 keeps the copies and a shard; the master weights."""
        options, copied = self.options, self.copied_numel
        master_dtype = torch.promote_types(options.compute_dtype, torch.float32)
        resident = options.stage < 3 or self.num_shards == 1
        kept = torch.zeros(
            copied + self.shard_numel * (self.num_shards if resident else 1),
            dtype=options.compute_dtype,
            device=options.device,
        )
        self.buffer = kept if resident else None
        self.copies, home = kept[:copied], kept[copied:]
        self.shard = home[self.shard_start : self.shard_start + self.shard_numel] if resident else home
        shared = master_dtype == options.compute_dtype and options.state_device == options.device
        master = self.shard if shared else self.shard.to(options.state_device, master_dtype)
        self.master = torch.nn.Parameter(master)

    @property
    def redundant(self) -> tuple[int, ...]:
        """Logical experts of the redundant slots here."""
        return self.replicas.experts if self.replicas else ()

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Units in the order of `gather`: redundant copies first."""
        return (*self.redundant, *self.units)

    @property
    def copied_numel(self) -> int:
        return len(self.redundant) * self.unit_numel

    @property
    def shard_stop(self) -> int:
        """End of the shard within what is at home, padding left out."""
        return min(self.shard_start + self.shard_numel, self.numel)

    @property
    def grad_dtype(self) -> torch.dtype:
        return torch.promote_types(self.options.grad_dtype, self.options.compute_dtype)

    def write_expert(self, expert: int | None, value: torch.Tensor) -> None:
        """Set the master weights of one unit at home from the whole logical tensor, as far as they are held here."""
        local = self.part.take(value) if self.part else value
        offset = self.units.index(expert) * self.unit_numel
        start, stop = max(offset, self.shard_start), min(offset + self.unit_numel, self.shard_stop)
        if start < stop:
            piece = local.reshape(-1)[start - offset : stop - offset]
            self.master.data[start - self.shard_start : stop - self.shard_start].copy_(piece)

    # ---- weights

    @property
    def version(self) -> tuple[int, int] | None:
        """Another one whenever the weights that forward uses may be others; None at stage 3, where they do not stay.

        Whoever writes them says so (`publish`, `refresh_copies`); torch's own count sees whoever does not.
        """
        return None if self.buffer is None else (self._published, self.buffer._version)

    def publish(self, written: bool = False) -> None:
        """Master weights -> the weights that forward uses, here and in redundant copies. written: those of the shard
        have their new values.

        Collective over the group at stages 1 and 2, and over the EP group where there are copies.
        """
        if self._is_apart and not written:
            self.shard.copy_(self.master.data)
        if self.buffer is not None and self.num_shards > 1 and self.numel:
            self.group.all_gather_(self.buffer[self.copied_numel :], self.shard)
        self.refresh_copies()

    def refresh_copies(self) -> None:
        """Weights of the home ranks -> redundant copies. Collective over the EP group, at stage 3 over both groups."""
        self._published += 1
        if self.replicas is None:
            return
        # the ranks of the group are home to the same experts, so all of them are asked for copies or none is
        asked = len(self.units) if self.replicas.asked else 0
        home = self._whole()[self.copied_numel :] if asked else self.shard
        arrived = self.replicas.to_copies(home[: asked * self.unit_numel].view(asked, self.unit_numel))
        self.copies.copy_(arrived.view(-1))

    def set_plan(self, plan: SlotPlan) -> None:
        """Other redundant experts in as many slots, between two steps: weights move, states never do. Collective."""
        gradients = [self.gradient, self.copies_gradient, self.reduced, self.master.grad]
        assert all(g is None for g in gradients), (
            f"{self.name}: a new plan in the middle of a step would mix up gradients"
        )
        if self.replicas is not None:
            self.replicas = self.replicas.moved_to(plan)
            self.refresh_copies()

    def _whole(self) -> torch.Tensor:
        """[copies | home | padding]; collective at stage 3."""
        if self.buffer is not None:
            return self.buffer
        whole = self.shard.new_empty(self.copied_numel + self.shard_numel * self.num_shards)
        whole[: self.copied_numel] = self.copies
        if self.numel:
            self.group.all_gather_(whole[self.copied_numel :], self.shard)
        return whole

    def gather(self) -> torch.Tensor:
        """All slots [slots, *unit_shape]; collective at stage 3."""
        return self._whole()[: self.copied_numel + self.numel].view(len(self.slots), *self.unit_shape)

    def gather_again(self) -> torch.Tensor:
        """Stage 3, in backward: kept until this tensor's own gradient arrives."""
        if self._regathered is None:
            self._regathered = self.gather()
        return self._regathered

    # ---- gradients

    def accumulate(self, grad: torch.Tensor) -> None:
        """Take one micro-batch's gradient [slots, *unit_shape], which nobody may change afterwards. Collective over the
        group at stages 2 and 3."""
        self._regathered = None
        borrowed = len(self.redundant)
        if borrowed:
            if self.copies_gradient is None:
                self.copies_gradient = grad.new_zeros(self.copied_numel, dtype=self.grad_dtype)
            self.copies_gradient.add_(grad[:borrowed].reshape(-1))
        if not self.numel:
            return
        home = grad[borrowed:].reshape(-1)
        if self.options.stage >= 2 and self.num_shards > 1:
            shard = self.group.reduce_scatter(self._padded(home))
            self.gradient = shard if self.gradient is None else self.gradient.add_(shard)
        elif self.gradient is None:
            self.gradient, self._as_it_came = home, True  # a step of one micro-batch needs no sum
        else:
            self._sum()[: self.numel].add_(home)

    def finish_gradient(self, scale: float) -> None:
        """End of the optimizer step's last backward: reduce what is left; `reduced` times `reduced_scale` is then the
        gradient of the master weights.

        Collective over the group at stages 0 and 1, and over the EP group where there are copies (then at each stage).
        """
        alone = self.group.world_size == 1 and self.replicas is None
        gradient = self.gradient if alone and self.gradient is not None else self._sum()
        if self.replicas is not None:
            self._add_copies(gradient, self.replicas)
        if self.options.stage == 0 and self.numel:
            self.group.all_reduce_(gradient)
        elif self.options.stage == 1 and self.numel:
            gradient = self.group.reduce_scatter(gradient)
        self.gradient = None
        self.reduced, self.reduced_scale = gradient, scale

    def squared_norm(self) -> torch.Tensor:
        """Of the gradient at hand, a float64 scalar on its device."""
        assert self.reduced is not None
        norm = torch.linalg.vector_norm(self.reduced, dtype=self.master.dtype)
        return (norm.to(torch.float64) * self.reduced_scale).square()

    def hand_over(self, factor: torch.Tensor) -> None:
        """Give the master weights their gradient, times a factor [1] in their type."""
        assert self.reduced is not None
        scaled = self.reduced * (factor * self.reduced_scale).to(self.reduced.device)
        self.reduced, self.master.grad = None, scaled.to(self.master.device)

    def update(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same for an optimizer that scales by itself: gradient, factor [1], and the weights to write."""
        assert self.reduced is not None
        return self.reduced, factor * self.reduced_scale, self.shard if self._is_apart else None

    @property
    def _is_apart(self) -> bool:
        """Whether the master weights are other memory than the shard."""
        return self.shard.data_ptr() != self.master.data_ptr()

    def _sum(self) -> torch.Tensor:
        """The gradient so far, in a buffer of its own that can be added to and reduced; zero if there is none."""
        if self.gradient is None:
            self.gradient = self._zero_gradient(self.num_shards if self.options.stage < 2 else 1)
        elif self._as_it_came:
            self.gradient = self._padded(self.gradient)
        self._as_it_came = False
        return self.gradient

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of what is at home, in the type and size of the reduction."""
        whole = self.shard.new_empty(self.shard_numel * self.num_shards, dtype=self.grad_dtype)
        whole[: self.numel].copy_(values)
        whole[self.numel :].zero_()
        return whole

    def _add_copies(self, gradient: torch.Tensor, replicas: Replicas) -> None:
        """Send the gradients of copies home; add those that arrive to this rank's gradient, which is the whole slice
        or, at stages 2 and 3, a shard already summed over the group."""
        copies = self.copies_gradient
        if copies is None:
            copies = gradient.new_zeros(self.copied_numel)
        arrived = replicas.to_homes(copies.view(len(self.redundant), self.unit_numel))
        self.copies_gradient = None
        if not replicas.asked:
            return
        whole = gradient if self.options.stage < 2 else self._zero_gradient(self.num_shards)
        home = whole[: self.numel].view(len(self.units), self.unit_numel)
        for place, row in zip(replicas.asked, arrived, strict=True):  # in rank order: the same bits each time
            home[place].add_(row)
        if self.options.stage >= 2:
            gradient.add_(self.group.reduce_scatter(whole))

    def _zero_gradient(self, shards: int) -> torch.Tensor:
        return self.shard.new_zeros(self.shard_numel * shards, dtype=self.grad_dtype)

    def drop_gradients(self) -> None:
        self.master.grad = self.gradient = self.reduced = self.copies_gradient = None

    # ---- what the store, a checkpoint and measurements need

    @property
    def owner(self) -> bool:
        """This rank counts and saves the shard; at stage 0 all ranks of the group hold the same one."""
        return self.num_shards > 1 or self.group.rank_in_group == 0

    def fragments(self, views: dict[str, torch.Tensor]) -> Iterator[Fragment]:
        """The shard, cut at the borders of units."""
        for position, unit in enumerate(self.units):
            offset = position * self.unit_numel
            start, stop = max(offset, self.shard_start), min(offset + self.unit_numel, self.shard_stop)
            if start < stop:
                yield Fragment(
                    name=self.name,
                    expert=unit,
                    shape=self.logical_shape,
                    start=start - offset,
                    stop=stop - offset,
                    views=narrow_views(views, start - self.shard_start, stop - self.shard_start),
                    owner=self.owner,
                    part=self.part,
                )

    def bytes_held(self) -> dict[str, int]:
        """Bytes of weights, of gradients at their peak, and of master weights beside them."""
        gradients = self.copied_numel + self.shard_numel * (self.num_shards if self.options.stage < 2 else 1)
        return {
            "weights": self.copies.nbytes + self.shard.nbytes if self.buffer is None else self.buffer.nbytes,
            "gradients": gradients * self.grad_dtype.itemsize,
            "states": self.master.nbytes if self._is_apart else 0,
        }
