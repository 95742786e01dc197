"""Classic errors of MoE training systems, one function each: a context in which the package has the error.

They run inside the worker processes. A plant that no longer finds its target in the package raises AttributeError,
which the test reports as such.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from moe_train.model import build
from moe_train.moe import MoEContext, ParallelMoELayer, dispatch, layer, update_bias_
from moe_train.moe.balance import sequence_aux_loss
from moe_train.moe.route import Routing, route_tokens
from moe_train.optim.expert_shard import ExpertStore, ExpertTensor
from moe_train.parallel import collectives
from moe_train.train.loop import Trainer
from moe_train.train.objective import ObjectiveScale

ERRORS: dict[str, Callable[[], Any]] = {}
"""What is wrong, in words -> its plant."""


def error(words: str):
    def register(function):
        ERRORS[words] = function
        return function

    return register


def replaced(target: Any, name: str, make: Callable[[Any], Any]):
    """Patch `target.name` by what `make` returns for the original."""
    return patch.object(target, name, make(getattr(target, name)))


# ---- gradients of experts


def scaled_experts(factor: Callable[[ExpertTensor, int], float]):
    def finish_gradients(self: ExpertStore) -> None:
        for tensor in self.tensors:
            tensor.finish_gradient(factor(tensor, self.world.world_size))

    return patch.object(ExpertStore, "finish_gradients", finish_gradients)


@error("expert gradients ep times too large")
def expert_gradients_times_ep():
    return scaled_experts(lambda tensor, world: (world // tensor.group.world_size) / world)


@error("expert gradients divided by the number of copies")
def expert_gradients_by_copies():
    return scaled_experts(lambda tensor, world: 1 / tensor.group.world_size)


@error("expert gradients not summed over copies")
def copies_not_summed():
    def finish(original):
        def finish_gradient(self: ExpertTensor, scale: float) -> None:
            with patch.object(self.group, "all_reduce_", lambda tensor, op="sum": tensor):
                original(self, scale)

        return finish_gradient

    return replaced(ExpertTensor, "finish_gradient", finish)


@error("only the last micro-batch's expert gradient kept")
def last_micro_batch_only():
    def accumulate(original):
        def keep_last(self: ExpertTensor, grad: torch.Tensor) -> None:
            self.gradient = None
            original(self, grad)

        return keep_last

    return replaced(ExpertTensor, "accumulate", accumulate)


@error("first expert tensor frozen: in no optimizer")
def expert_frozen():
    def init(original):
        def without_first(self: ExpertStore, *args: Any) -> None:
            original(self, *args)
            if self.optimizer is not None:
                del self.optimizer.param_groups[0]["params"][0]

        return without_first

    return replaced(ExpertStore, "__init__", init)


# ---- norm and clip


@error("experts left out of the norm")
def experts_not_in_norm():
    return patch.object(ExpertStore, "squared_norm", lambda self: torch.zeros((), dtype=torch.float64))


@error("copies of experts counted once each in the norm")
def copies_in_norm():
    def norm(original):
        def every_copy(self: ExpertStore) -> torch.Tensor:
            with patch.object(ExpertTensor, "owner", property(lambda tensor: True)):
                return original(self)

        return every_copy

    return replaced(ExpertStore, "squared_norm", norm)


@error("experts not clipped")
def experts_not_clipped():
    return replaced(ExpertStore, "step", lambda original: lambda self, grad_scale: original(self, 1.0))


# ---- the optimizer's step


@error("weights not published after the step")
def stale_weights():
    def step(original):
        def without_publish(self: ExpertStore, grad_scale: Any) -> None:
            with patch.object(self, "publish", lambda: None):
                original(self, grad_scale)

        return without_publish

    return replaced(ExpertStore, "step", step)


@error("no weight decay on experts")
def no_decay_on_experts():
    def init(original):
        return lambda self, tensors, make, decays, world: original(self, tensors, make, lambda *_: False, world)

    return replaced(ExpertStore, "__init__", init)


@error("learning rate does not reach the experts")
def rate_not_set():
    return patch.object(ExpertStore, "set_lr", lambda self, lr: None)


@error("initial weights drawn by position in the slice")
def drawn_by_slice():
    def write(original):
        # as if the generator had been seeded by the number within the slice
        return lambda self, expert, value: original(self, expert, value.roll(self.first))

    return replaced(ExpertTensor, "write_expert", write)


# ---- losses


def changed_objective(change: Callable[[ObjectiveScale, dict[str, torch.Tensor]], dict[str, torch.Tensor]]):
    def objective(original):
        return lambda self, loss_sum, router_losses: original(self, loss_sum, change(self, router_losses))

    return replaced(ObjectiveScale, "objective", objective)


@error("auxiliary loss scaled by the number of ranks")
def aux_times_ranks():
    # 2, as many as run it
    return changed_objective(lambda scale, losses: {**losses, "aux_loss": losses["aux_loss"] * 2})


@error("z-loss summed over layers, not averaged")
def z_not_averaged():
    return changed_objective(lambda scale, losses: {**losses, "z_loss": losses["z_loss"] * scale.num_moe_layers})


@error("auxiliary loss per micro-batch, not per sequence")
def aux_per_micro_batch():
    def whole(routing, spec, num_sequences):
        return sequence_aux_loss(routing, spec, 1) * num_sequences

    return patch.object(layer, "sequence_aux_loss", whole)


@error("loss averaged per rank, then summed")
def loss_not_averaged():
    def objective(original):
        return lambda self, loss_sum, router_losses: original(self, loss_sum * 2, router_losses)

    return replaced(ObjectiveScale, "objective", objective)


# ---- routing, counts and bias


@error("counts committed again in recompute")
def counted_twice():
    def record(original):
        def record_always(self: MoEContext, index: int, replay: Any, training: bool) -> None:
            if self._recomputing:
                self.counts_LE[index] += replay.plan.counts_E
            original(self, index, replay, training)

        return record_always

    return replaced(MoEContext, "record", record)


@error("bias updated per micro-batch")
def bias_per_micro_batch():
    def forward(original):
        def forward_loss(self: Trainer, batch: torch.Tensor) -> torch.Tensor:
            loss = original(self, batch)
            for bias_E, counts_E in zip(self.built.biases(), self.built.context.counts_LE, strict=True):
                update_bias_(bias_E, counts_E, self.recipe.moe.bias_update_rate)
            return loss

        return forward_loss

    return replaced(Trainer, "forward_loss", forward)


@error("bias updated from this rank's counts alone")
def bias_from_local_counts():
    def reduce(original):
        def local_counts(self: Trainer, local: torch.Tensor):
            kept = self.built.context.counts_LE.clone()
            sums = original(self, local)
            self.update_biases(kept)
            for bias_E, counts_E in zip(self.built.biases(), sums.counts_LE, strict=True):
                update_bias_(bias_E, counts_E, -self.recipe.moe.bias_update_rate)  # takes back what follows
            return sums

        return local_counts

    return replaced(Trainer, "reduce", reduce)


@error("bias added to the weights, not only to the choice")
def bias_in_weights():
    def biased(logits_TE, spec, bias_E=None, topk_ids_TK=None) -> Routing:
        routing = route_tokens(logits_TE, spec, bias_E, topk_ids_TK)
        weights_TK = (routing.scores_TE + bias_E).gather(1, routing.topk_ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.eps) * spec.scale
        return Routing(**{**vars(routing), "topk_weights_TK": weights_TK})

    return patch.object(layer, "route_tokens", biased)


@error("gate detached from the output")
def gate_detached():
    def detached(*args) -> Routing:
        routing = route_tokens(*args)
        return Routing(**{**vars(routing), "topk_weights_TK": routing.topk_weights_TK.detach()})

    return patch.object(layer, "route_tokens", detached)


@error("router computed in bf16")
def router_in_bf16():
    def rounded(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x_TH.bfloat16(), weight_EH.bfloat16())
        return logits.to(x_TH.dtype)

    return patch.object(build, "router_logits", rounded)


# ---- dispatch, combine, shared experts


@error("shared expert counted twice")
def shared_twice():
    return replaced(ParallelMoELayer, "run_shared_experts", lambda original: lambda self, x: 2 * original(self, x))


@error("all_to_all backward with split sizes not swapped")
def a2a_not_swapped():
    def backward(ctx, *grads):
        outputs, inputs = ctx.output_split_sizes, ctx.input_split_sizes
        rows = _fitted(grads[0], sum(inputs))
        received = collectives._exchange(rows, ctx.group, outputs, inputs)
        return _fitted(received, sum(inputs)), None, None, None

    return patch.object(collectives._AllToAllRows, "backward", staticmethod(backward))


def _fitted(rows: torch.Tensor, number: int) -> torch.Tensor:
    """Cut, or filled with zeros: what a buffer of the wrong size would do without a check."""
    filled = rows.new_zeros(number, *rows.shape[1:])
    filled[: min(number, len(rows))] = rows[:number]
    return filled


@error("combine without putting rows back in order")
def unsorted_combine():
    def combine(original):
        def unsorted(rows, weights, plan, group):
            same = torch.arange(len(plan.order_R))
            return original(rows, weights, dispatch.DispatchPlan(**{**vars(plan), "place_R": same}), group)

        return unsorted

    return replaced(layer, "combine", combine)


@error("received rows not sorted by expert")
def rows_not_expert_major():
    def major(original):
        def unsorted(received, num_rows):
            same = torch.arange(num_rows)
            return same, same

        return unsorted

    return replaced(dispatch, "_expert_major", major)


# ---- data


@error("every rank reads the first rank's samples")
def same_samples():
    def micro_batches(self: Trainer) -> list[torch.Tensor]:
        size, world = self.recipe.batch.micro_size, self.groups.world.world_size
        starts = [self.sequences + m * world * size for m in range(self.run.accumulation)]
        return [torch.from_numpy(self.assembly.data.train.batch(start, size)) for start in starts]

    return patch.object(Trainer, "micro_batches", micro_batches)
