"""Classic errors of MoE training systems, one function each: a context in which the package has the error.

They run inside the worker processes. A plant that no longer finds its target in the package raises AttributeError,
which the test reports as such.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from moe_train.model import build
from moe_train.moe import (
    ExpertChoiceRouter,
    MoEContext,
    ParallelMoELayer,
    SinkhornRouter,
    balance,
    balanced_choice,
    dispatch,
    domain,
    layer,
    route,
    router,
    shared,
    update_bias_,
)
from moe_train.moe.balance import global_batch_aux_loss, sequence_aux_loss
from moe_train.moe.domain import TokenDomain
from moe_train.moe.route import Routing, route_tokens
from moe_train.moe.sequences import Sequences
from moe_train.optim.expert_shard import ExpertStore
from moe_train.optim.expert_tensor import ExpertTensor
from moe_train.optim.replicas import Replicas
from moe_train.parallel import collectives, gather_rows_partial
from moe_train.train import loop
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
            with patch.object(self, "publish", lambda **_: None):
                original(self, grad_scale)

        return without_publish

    return replaced(ExpertStore, "step", step)


@error("no weight decay on experts")
def no_decay_on_experts():
    def init(original):
        return lambda self, tensors, make, decays, *rest: original(self, tensors, make, lambda *_: False, *rest)

    return replaced(ExpertStore, "__init__", init)


@error("learning rate does not reach the experts")
def rate_not_set():
    return patch.object(ExpertStore, "set_lr", lambda self, lr: None)


@error("initial weights drawn by position in the slice")
def drawn_by_slice():
    def write(original):
        # as if the generator had been seeded by the number within the slice
        return lambda self, expert, value: original(self, expert, value.roll(self.units[0]))

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
    def whole(routing, spec, num_sequences, sequence_T=None):
        return sequence_aux_loss(routing, spec, 1) * num_sequences

    return patch.object(layer, "sequence_aux_loss", whole)


@error("global-batch loss with the counts so far")
def global_counts_so_far():
    return patch.object(Trainer, "count_ahead", lambda self, batches: None)


@error("global-batch loss with this rank's counts")
def global_counts_of_this_rank():
    def losses(original):
        def with_local_counts(self: Trainer, step_counts_LE):
            return original(self, self.built.context.counts_LE)

        return with_local_counts

    return replaced(Trainer, "router_losses", losses)


@error("global-batch loss averaged per micro-batch")
def global_mean_of_micro_batch():
    def of_this_one(sums, counts_LE, top_k, num_sequences):
        tokens = sum(float(sums_E.sum()) for sums_E in sums.values()) / len(sums)
        share = tokens * top_k / float(counts_LE[0].sum())
        return global_batch_aux_loss(sums, counts_LE, top_k, num_sequences) / share

    return patch.object(loop, "global_batch_aux_loss", of_this_one)


@error("tokens of the forwards that only count are counted in the step")
def counted_ahead_kept():
    def ahead(original):
        def and_kept(self: Trainer, batches):
            found = original(self, batches)
            if found is not None:
                self.built.context.counts_LE += found // self.groups.world.world_size
            return found

        return and_kept

    return replaced(Trainer, "count_ahead", ahead)


@error("micro-batch loss per sequence")
def micro_batch_per_sequence():
    return patch.object(layer, "micro_batch_aux_loss", sequence_aux_loss)


@error("loss averaged per rank, then summed")
def loss_not_averaged():
    def objective(original):
        return lambda self, loss_sum, router_losses: original(self, loss_sum * 2, router_losses)

    return replaced(ObjectiveScale, "objective", objective)


# ---- routing, counts and bias


@error("counts committed again in recompute")
def counted_twice():
    def replay(original):
        def replay_and_count(self: MoEContext, index: int):
            found = original(self, index)
            if found is not None:
                self.counts_LE[index] += dispatch.count_ids(found.topk_ids, self.counts_LE.shape[1])
            return found

        return replay_and_count

    return replaced(MoEContext, "replay", replay)


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
            packed = original(self, local)
            self.update_biases(kept)
            step_counts_LE = packed[len(local) :][: kept.numel()].view_as(kept)
            for bias_E, counts_E in zip(self.built.biases(), step_counts_LE, strict=True):
                update_bias_(bias_E, counts_E, -self.recipe.moe.bias_update_rate)  # takes back what follows
            return packed

        return local_counts

    return replaced(Trainer, "reduce", reduce)


@error("proportional bias step in tokens, not in shares of the mean")
def bias_in_tokens():
    def update(original):
        def in_tokens(bias_E, counts_E, rate, form="sign"):
            original(bias_E, counts_E, rate * float(counts_E.double().mean()), form)

        return in_tokens

    return replaced(loop, "update_bias_", update)


@error("steps of the bias not centred")
def bias_not_centred():
    def update(original):
        return lambda bias_E, counts_E, rate, form="sign": original(bias_E, counts_E, rate, "sign")

    return replaced(loop, "update_bias_", update)


@error("bias added to the weights, not only to the choice")
def bias_in_weights():
    def biased(logits_TE, spec, bias_E=None, topk_ids_TK=None) -> Routing:
        routing = route_tokens(logits_TE, spec, bias_E, topk_ids_TK)
        weights_TK = (routing.scores_TE + bias_E).gather(1, routing.topk_ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.eps) * spec.scale
        return Routing(**{**vars(routing), "topk_weights_TK": weights_TK})

    return patch.object(router, "route_tokens", biased)


@error("bias left out of the choice")
def bias_not_in_choice():
    return replaced(router.ScoreRouter, "_bias", lambda original: lambda self, gate: original(self, gate) * 0)


@error("gate detached from the output")
def gate_detached():
    def detached(*args) -> Routing:
        routing = route_tokens(*args)
        return Routing(**{**vars(routing), "topk_weights_TK": routing.topk_weights_TK.detach()})

    return patch.object(router, "route_tokens", detached)


@error("router computed in bf16")
def router_in_bf16():
    def rounded(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(x_TH.bfloat16(), weight_EH.bfloat16())
        return logits.to(x_TH.dtype)

    return patch.object(build, "router_logits", rounded)


# ---- capacity


@error("capacity over the tokens of a micro-batch, not of a sequence")
def capacity_of_micro_batch():
    def of_all(num_tokens, count, index_T, device, first=0):
        return Sequences(count=1, index_T=torch.zeros(num_tokens, dtype=torch.int64, device=device), ragged=False)

    return patch.object(Sequences, "of", of_all)


@error("pads counted in capacity")
def capacity_of_pads():
    padded = property(lambda self: dispatch.count_ids(self.index_T, self.count) + 4)
    return patch.object(Sequences, "lengths_S", padded)


@error("weights scaled up after a drop")
def renormalised_after_drop():
    def weigh(original):
        def scaled(ranked_TE, ids_TK, spec):
            weights_TK = original(ranked_TE, ids_TK, spec)
            return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) * spec.scale

        return scaled

    return replaced(route, "weigh_choice", weigh)


@error("bias and loads from what found room")
def counts_of_kept():
    return replaced(ParallelMoELayer, "_count", lambda original: lambda *args: (original(*args)[1],) * 2)


# ---- quantile balancing


@error("quantiles over the tokens of a micro-batch")
def quantiles_of_micro_batch():
    def of_all(scores_TE, bias_E, top_k, sequences):
        together = Sequences(count=1, index_T=torch.zeros_like(sequences.index_T), ragged=False)
        return balance.quantile_sums(scores_TE, bias_E, top_k, together) * sequences.count

    return patch.object(layer, "quantile_sums", of_all)


@error("quantiles counted by every tensor rank")
def quantiles_of_every_peer():
    def reduce(original):
        def unmasked(self: Trainer, local):
            kept = self.built.context.quantiles_LE.clone()
            packed = original(self, local)
            start = len(local) + kept.numel() * (1 + (self.built.context.kept_LE is not None))
            packed[start : start + kept.numel()] += kept.flatten() * (self.groups.tensor.world_size - 1)
            return packed

        return unmasked

    return replaced(Trainer, "reduce", reduce)


@error("quantiles of the biased scores")
def quantiles_of_biased():
    original = balance.quantile_sums
    return patch.object(layer, "quantile_sums", lambda scores, bias, *rest: original(scores + bias, bias * 0, *rest))


# ---- other choices, jitter


@error("experts choose among all tokens of a micro-batch")
def experts_choose_among_all():
    return capacity_of_micro_batch()


@error("a token keeps top-k of the experts that took it")
def no_wider_than_top_k():
    def choose(original):
        return lambda self, logits_TE, sequences: original(self, logits_TE, sequences)[:, : self.top_k]

    return replaced(ExpertChoiceRouter, "choose", choose)


@error("sinkhorn over the tokens of a micro-batch")
def sinkhorn_of_micro_batch():
    return capacity_of_micro_batch()


@error("sinkhorn's shifts in the weights too")
def shifts_in_weights():
    def score(original):
        def shifted(self, gate, logits, num_tokens, replay_TK):
            index_T = torch.arange(num_tokens) // 16  # tokens of a sequence
            sequences = Sequences(count=num_tokens // 16, index_T=index_T, ragged=False)
            shifts_SE = balanced_choice.balancing_shifts(logits.detach(), sequences)
            return original(self, gate, logits + shifts_SE[index_T], num_tokens, replay_TK)

        return shifted

    return replaced(SinkhornRouter, "_score", score)


@error("jitter by the place in a rank's own batch")
def jitter_by_own_place():
    return patch.object(Sequences, "number_T", property(lambda self: self.index_T))


@error("forced load by the place in a rank's own batch")
def forced_by_own_place():
    return jitter_by_own_place()


@error("jitter of the router's input alone")
def jitter_of_router_alone():
    def forward(original):
        def kept(self, x_TH, ids_T, num_sequences, sequence_T):
            def plain(x_MH, weights_MK, plan, group):
                return dispatch.dispatch(x_TH, weights_MK, plan, group)

            with patch.object(layer, "dispatch", plain):
                return original(self, x_TH, ids_T, num_sequences, sequence_T)

        return kept

    return replaced(ParallelMoELayer, "_forward", forward)


@error("jitter drawn anew in recompute")
def jitter_anew():
    calls = itertools.count()
    original = layer.jitter
    return patch.object(layer, "jitter", lambda x_TH, width, key, sequences: original(
        x_TH, width, key + (next(calls) // 2 % 2) * 7, sequences
    ))  # fmt: skip


# ---- dispatch, combine, shared experts


@error("shared expert counted twice")
def shared_twice():
    return replaced(ParallelMoELayer, "_gated", lambda original: lambda self, y, x: 2 * original(self, y, x))


@error("all_to_all backward with split sizes not swapped")
def a2a_not_swapped():
    def backward(ctx, *grads):
        def back(gradient):
            rows = _fitted(gradient, sum(ctx.inputs))
            return _fitted(collectives._exchange(rows, ctx.group, ctx.outputs, ctx.inputs), sum(ctx.inputs))

        return None, None, None, *map(back, grads)

    return patch.object(collectives._AllToAllRows, "backward", staticmethod(backward))


def _fitted(rows: torch.Tensor, number: int) -> torch.Tensor:
    """Cut, or filled with zeros: what a buffer of the wrong size would do without a check."""
    filled = rows.new_zeros(number, *rows.shape[1:])
    filled[: min(number, len(rows))] = rows[:number]
    return filled


@error("gradients of weights that other ranks applied lost")
def weight_gradients_of_others_lost():
    def backward(original):
        def own(ctx, *grads):
            x, *weights = grads
            mine = torch.zeros(len(x), dtype=torch.bool)
            rank = ctx.group.rank_in_group
            mine.split(ctx.outputs)[rank].fill_(True)
            return original(ctx, x, *(torch.where(mine.unsqueeze(1), each, 0) for each in weights))

        return staticmethod(own)

    return replaced(collectives._AllToAllRows, "backward", backward)


@error("what other ranks make of a token lost")
def parts_of_other_ranks_lost():
    def combine(original):
        def own_part(y, plan, group):
            if plan.travel is not None:
                mine = torch.zeros(len(y), 1, dtype=y.dtype)
                mine.split(plan.travel.recv_rows)[plan.travel.rank].fill_(1.0)
                y = y * mine
            return original(y, plan, group)

        return own_part

    return replaced(layer, "combine", combine)


@error("combine without putting rows back in order")
def unsorted_combine():
    def total(original):
        return lambda rows, place, *rest, **options: original(rows, _in_order(place), *rest, **options)

    return replaced(dispatch.kernels, "sum_copies", total)


def _in_order(place: torch.Tensor) -> torch.Tensor:
    return torch.where(place < 0, -1, (place.view(-1) >= 0).cumsum(dim=0).view_as(place) - 1)


@error("rows not sorted by expert")
def rows_not_sorted():
    def plan(original):
        def unsorted(*given, **options):
            found = original(*given, **options)
            maps = dataclasses.replace(found.maps, place_R=_in_order(found.maps.place_R))
            return dataclasses.replace(found, maps=maps)

        return unsorted

    return replaced(layer, "plan_dispatch", plan)


@error("received tokens and their copies' numbers in different orders")
def numbers_of_other_tokens():
    def exchange(original):
        return lambda table, *rest: (
            original(table, *rest) if table.is_floating_point() else original(table, *rest).flip(0)
        )

    return replaced(dispatch, "all_to_all_rows", exchange)


@error("rows of two experts swapped")
def experts_swapped():
    def plan(original):
        def swapped(ids_MK, *rest, **options):
            other_MK = torch.where(ids_MK == 0, 1, torch.where(ids_MK == 1, 0, ids_MK))
            return original(other_MK, *rest, **options)

        return swapped

    return replaced(layer, "plan_dispatch", plan)


@error("one row of a micro-batch lost")
def row_lost():
    def run(original):
        def without_first(self: ParallelMoELayer, x_MH, weights_MK, plan):
            kept_MK = torch.ones_like(weights_MK)
            kept_MK[:1, :1] = 0
            return original(self, x_MH, weights_MK * kept_MK, plan)

        return without_first

    return replaced(ParallelMoELayer, "run_routed", run)


# ---- redundant experts, shared experts on ranks of their own


@error("gradients of redundant copies not brought home")
def copies_gradients_lost():
    return replaced(Replicas, "to_homes", lambda original: lambda self, rows: original(self, rows) * 0)


@error("redundant copies stale after the step")
def stale_copies():
    def refresh(original):
        def once(self: ExpertTensor) -> None:
            if not vars(self).setdefault("filled", False):
                self.filled = True  # type: ignore[attr-defined]
                original(self)

        return once

    return replaced(ExpertTensor, "refresh_copies", refresh)


@error("new plan for the rows, old weights in the slots")
def plan_without_weights():
    return patch.object(ExpertStore, "set_plans", lambda self, plans: None)


@error("external shared expert averaged over the ranks that hold it")
def external_shared_averaged():
    def finish(original):
        def finish_gradient(self: ExpertTensor, scale: float) -> None:
            original(self, scale / self.group.world_size if self.num_experts is None else scale)

        return finish_gradient

    return replaced(ExpertTensor, "finish_gradient", finish)


@error("external shared expert also on the other ranks")
def external_shared_everywhere():
    def run(original):
        return lambda self, *given: original(self, *given) * (2.0 if self.plan.shared_ranks else 1.0)

    return replaced(ParallelMoELayer, "run_routed", run)


# ---- tensor parallelism


@error("tensor peers dispatch the same tokens")
def peers_dispatch_the_same():
    def init(original):
        def without_slices(self: TokenDomain, groups: Any) -> None:
            original(self, groups)
            self.slicing = type(groups.world).single()

        return without_slices

    return replaced(TokenDomain, "__init__", init)


@error("pad rows routed, counted and lost")
def pads_routed():
    def forward(original):
        def padded(self, x_TH, ids_T, num_sequences, sequence_T):
            pad = x_TH.new_zeros(1, x_TH.shape[1])
            return original(self, torch.cat([x_TH, pad]), ids_T, 1, sequence_T)[:-1]

        return padded

    return replaced(ParallelMoELayer, "_forward", forward)


@error("gradient summed where tokens leave the layer, not sliced")
def leaving_summed():
    return patch.object(domain, "gather_rows", gather_rows_partial)


@error("gate gradient not summed over tensor ranks")
def gate_not_summed():
    return patch.object(ParallelMoELayer, "sum_partial_gradients", lambda self: None)


@error("parts of experts: gradients of their inputs not summed")
def parts_not_summed():
    return patch.object(TokenDomain, "to_experts", lambda self, x: x)


@error("split shared expert: sum over ranks left out")
def split_shared_partial():
    return patch.object(shared, "start_reduce", lambda x, group: (x, collectives.PendingSum()))


@error("tokens counted on every tensor rank")
def counted_by_peers():
    def init(original):
        def counting(self: TokenDomain, groups: Any) -> None:
            original(self, groups)
            self.counts = True

        return counting

    return replaced(TokenDomain, "__init__", init)


@error("auxiliary loss scaled by tp")
def aux_times_tp():
    return changed_objective(lambda scale, losses: {**losses, "aux_loss": losses["aux_loss"] * 2})


# ---- hashing


@error("hash table drawn from another seed than the recipe's")
def table_of_another_seed():
    def seed_of(original):
        return lambda seed, *names: original(seed + ("tid2eid" in names), *names)

    return replaced(build, "seed_of", seed_of)


# ---- data


@error("every rank reads the first rank's samples")
def same_samples():
    def micro_batches(self: Trainer) -> list[torch.Tensor]:
        size, data = self.recipe.batch.micro_size, self.groups.data.world_size
        starts = [self.sequences + m * data * size for m in range(self.run.accumulation)]
        return [torch.from_numpy(self.assembly.data.train.batch(start, size)) for start in starts]

    return patch.object(Trainer, "micro_batches", micro_batches)
