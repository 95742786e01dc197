"""The training loop: step, accumulate, clip, log, evaluate, save."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_train.data.blend import BlendedDataset
from moe_train.diagnostics.drops import drop_shares, drop_summary
from moe_train.diagnostics.guards import Alarm, LoadGuards
from moe_train.diagnostics.layer_record import LayerRecorder
from moe_train.diagnostics.load import LoadHistory, layer_figures, summary
from moe_train.diagnostics.progress import NullProgress, Progress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker, Tracker
from moe_train.diagnostics.watchdog import first_nonfinite
from moe_train.errors import CheckpointError, DataError, TrainingError
from moe_train.moe import blend_bias_, global_batch_aux_loss, plan_slots, rank_shares, update_bias_
from moe_train.optim import StepResult, lr_factor
from moe_train.parallel import raise_together
from moe_train.train.assemble import Assembly
from moe_train.train.check import node_size
from moe_train.train.objective import ObjectiveScale
from moe_train.train.observe import Observer
from moe_train.train.readback import Readback
from moe_train.train.saver import Saver
from moe_train.train.state import Position
from moe_train.train.stop import StopRequest


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """One optimizer step, over ranks and micro-batches.

    loss: mean nats per token. writing: some rank is still writing a checkpoint. counts_LE: tokens per expert, as asked
    for. rows_LE: those that went there, the same unless some were dropped. logit_rms_L: root mean square of each
    layer's router logits, where a guard wants it. wanted_bias_LE: what quantile balancing asks for.
    """

    loss: float
    aux_loss: float
    z_loss: float
    stop: bool
    writing: bool
    counts_LE: torch.Tensor
    rows_LE: torch.Tensor
    logit_rms_L: np.ndarray | None = None
    wanted_bias_LE: torch.Tensor | None = None


class Trainer:
    """Runs an assembly from `position` to the end, or until told to stop."""

    def __init__(
        self,
        assembly: Assembly,
        position: Position,
        run_dir: Path,
        tracker: Tracker | NullTracker,
        progress: Progress | NullProgress,
        throughput: Throughput,
        stop: StopRequest,
    ):
        self.assembly, self.run_dir, self.stop = assembly, run_dir, stop
        self.tracker, self.progress, self.throughput = tracker, progress, throughput
        self.engine, self.built, self.groups = assembly.engine, assembly.built, assembly.groups
        self.run, self.recipe = assembly.run, assembly.run.recipe
        self.step, self.sequences, self.data_identity = position.step, position.sequences, position.data
        self.history = LoadHistory()
        if position.history:
            self.history.load_state_dict(position.history)
        self.counts_since_log = torch.zeros_like(self.built.context.counts_LE)
        if position.counts:
            self.counts_since_log.copy_(torch.tensor(position.counts))
        self.rows_since_log = self.counts_since_log.clone()
        if position.rows:
            self.rows_since_log.copy_(torch.tensor(position.rows))
        self.counts_since_plan = torch.zeros_like(self.built.context.counts_LE)
        if position.counts_since_plan:
            self.counts_since_plan.copy_(torch.tensor(position.counts_since_plan))
        self.observer = Observer(assembly, run_dir, position.step)
        interval = self.recipe.diagnostics.heatmap_interval
        self.record = LayerRecorder(interval, len(self.built.layers), self.built.num_experts)
        self.record.load_state_dict(position.record)
        rules = self.recipe.diagnostics.guards
        watched = [layer.index for layer in self.built.layers if layer.gate_router.balanced]
        self.guards = LoadGuards(rules, len(self.built.layers), self.built.num_experts, watched)
        self.guards.load_state_dict(position.guards)
        if any(rule.when == "router_logit_growth" for rule in rules):
            device = self.built.context.counts_LE.device
            self.built.context.logit_squares_L = torch.zeros(len(self.built.layers), dtype=torch.float64, device=device)
        self.replans = self.recipe.moe.replan_interval > 0 or any(rule.action == "replan" for rule in rules)
        self.bias_rate = self.recipe.moe.bias_update_rate
        if position.guards.get("first_rate") == self.bias_rate:  # else the recipe has been changed, and wins
            self.bias_rate = position.guards["bias_rate"]
        self.val_loss: float | None = None
        self.saver = Saver(assembly, run_dir / "checkpoints", tracker, progress, position.step or None)
        batch, length = self.recipe.batch, self.recipe.data.sequence_length
        self.scale = ObjectiveScale(
            tokens=batch.global_size * length,
            sequences=batch.global_size,
            num_moe_layers=max(self.built.num_balanced_layers, 1),
            aux_coef=self.run.aux_loss_coef,
            z_coef=self.recipe.moe.z_loss_coef,
        )
        self.balances_step = self.scale.aux_coef > 0 and self.recipe.moe.aux_loss == "global_batch"

    # ---- one step

    def micro_batches(self) -> list[torch.Tensor]:
        """This rank's samples of the next step, accumulation x [micro_size, sequence_length + 1]."""
        size = self.recipe.batch.micro_size
        return [torch.from_numpy(self.assembly.data.train.batch(start, size)) for start in self.starts()]

    def starts(self) -> list[int]:
        """Number of the first sequence of each of this rank's micro-batches, among all of the run."""
        size, data = self.recipe.batch.micro_size, self.groups.data
        return [
            self.sequences + (m * data.world_size + data.rank_in_group) * size for m in range(self.run.accumulation)
        ]

    def check_peers(self) -> None:
        """Ranks of a tensor group add up parts of one computation: they must read the same samples. Collective.

        Raises `TrainingError` on every rank, or `DataError` if one cannot read.
        """
        tensor = self.groups.tensor
        if tensor.world_size == 1:
            return
        samples, error = "", None
        try:
            samples = hashlib.sha256(self.micro_batches()[0].numpy().tobytes()).hexdigest()
        except OSError as caught:  # one host's disk must not leave the other hosts waiting
            error = DataError(f"{caught.filename or 'data.corpora'}: {caught.strerror or caught}")
        raise_together(self.groups.world, error)
        if len(set(tensor.gather_objects(samples))) > 1:
            error = TrainingError(
                f"ranks {list(tensor.ranks)} share the dense layers (parallel.tensor {tensor.world_size}) and read "
                "different samples: give all hosts the same files for data.corpora, and the same recipe"
            )
        raise_together(self.groups.world, error)

    def train_step(self) -> tuple[StepSums, StepResult]:
        batches = self.micro_batches()
        watched = 0 if self.built.context.logit_squares_L is None else len(self.built.layers)
        local = torch.zeros(5 + watched, dtype=torch.float64, device=self.assembly.device)
        # the ranks of a tensor group compute the same loss: one of them says it
        counts = float(self.groups.tensor.rank_in_group == 0)
        step_counts_LE = self.count_ahead(batches)
        self.observer.begin(self.step + 1)
        for number, (start, batch) in enumerate(zip(self.starts(), batches, strict=True)):
            with self.built.context.micro_batch(start):
                loss_sum = self.forward_loss(batch)
                router_losses = self.router_losses(step_counts_LE)
                objective = self.scale.objective(loss_sum, router_losses)
                # gradients are averaged over data-parallel ranks: times their number gives the sum that is wanted
                self.engine.backward(objective * self.groups.data.world_size, last=number == len(batches) - 1)
                local[0] += loss_sum.detach() * counts
                for slot, name in ((1, "aux_loss"), (2, "z_loss")):
                    if name in router_losses:
                        local[slot] += router_losses[name].detach() * counts
        packed = self.reduce(local)
        head = Readback(packed[: len(local)])
        rate = self.recipe.optimizer.lr * lr_factor(self.recipe.schedule, self.step, self.recipe.train.steps)
        result = self.engine.step(rate, packed[:3])
        # the decision to step or skip has waited for what comes after these numbers: reading them costs nothing
        sums = self.sums_of(head.read(), packed[len(local) :])
        if not np.isfinite([sums.loss, sums.aux_loss, sums.z_loss]).all():
            assert result.skipped, "a loss that is not finite must skip the step"
            self.explain_nonfinite(sums, batches)
        if result.skipped and self.recipe.precision.compute != "fp16":
            raise TrainingError(
                f"step {self.step + 1}: the gradient norm is not finite (the loss is: {sums.loss:.4f}); no weight was "
                f"changed. {self.where()} Lower optimizer.lr or look at the data"
            )
        if not result.skipped:
            self.update_biases(sums.counts_LE, sums.wanted_bias_LE)
        self.counts_since_plan += sums.rows_LE
        self.step += 1
        self.sequences += self.recipe.batch.global_size
        return sums, result

    def forward_loss(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self.assembly.device, non_blocking=True)
        return self.engine(input_ids=batch[:, :-1], labels=batch[:, 1:]).loss

    @torch.no_grad()
    def count_ahead(self, batches: list[torch.Tensor]) -> torch.Tensor | None:
        """Tokens per layer and expert of a whole step [L, E], which a loss over the global batch needs before the first
        backward: the same forwards, without gradient, from the same random numbers. None where one forward is all.
        Collective."""
        if not self.balances_step or len(batches) == 1:
            return None
        device = self.assembly.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for start, batch in zip(self.starts(), batches, strict=True):
                with self.built.context.micro_batch(start):
                    ids = batch[:, :-1].to(device, non_blocking=True)
                    self.engine(input_ids=ids, logits_to_keep=1)  # nobody looks at them
        self.built.context.take_kept()
        self.built.context.take_logit_squares()
        self.built.context.take_quantiles()
        return self.groups.world.all_reduce_(self.built.context.take_counts())

    def router_losses(self, step_counts_LE: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Sums over the micro-batch in flight, by name. Collective where a loss is over the global batch."""
        context = self.built.context
        if not self.balances_step:
            return context.losses
        if step_counts_LE is None:
            step_counts_LE = self.groups.world.all_reduce_(context.counts_LE.clone())
        top_k = self.built.layers[0].gate_router.top_k
        aux = global_batch_aux_loss(context.score_sums, step_counts_LE, top_k, self.scale.sequences)
        return {**context.losses, "aux_loss": aux}

    def reduce(self, local: torch.Tensor) -> torch.Tensor:
        """One packed all_reduce per step: losses, two flags, the counts of all layers, and what the observer looked at
        in a log step. Stays on the device."""
        context = self.built.context
        counts = [context.take_counts(), context.take_kept(), context.take_quantiles()]
        squares_L = context.take_logit_squares()
        if self.groups.tensor.rank_in_group == 0:  # its peers have seen the same tokens
            if squares_L is not None:
                local[5:] = squares_L
        elif counts[2] is not None:
            counts[2].zero_()
        local[3].fill_(float(self.stop.requested))  # an assignment would wait for the device
        local[4].fill_(float(self.saver.busy))
        parts = [local, *(each.flatten().to(local) for each in counts if each is not None)]
        return self.groups.world.all_reduce_(torch.cat([*parts, self.observer.end(self.step + 1)]))

    def sums_of(self, head: np.ndarray, counts: torch.Tensor) -> StepSums:
        """What `reduce` packed: losses and flags, read; the counts, with or without those that were kept; and what the
        observer looked at."""
        loss, aux, z, stop, writing = head[:5].tolist()
        layers = self.scale.num_moe_layers
        context, size = self.built.context, self.counts_since_log.numel()
        kinds = 1 + (context.kept_LE is not None) + (context.quantiles_LE is not None)
        self.observer.keep(counts[kinds * size :])
        by_kind = list(counts[: kinds * size].view(kinds, *self.counts_since_log.shape))
        wanted = by_kind.pop() / self.scale.sequences if context.quantiles_LE is not None else None
        by_kind = [found.round().to(torch.int64) for found in by_kind]
        return StepSums(
            loss=loss / self.scale.tokens,
            aux_loss=aux / (self.scale.sequences * layers),
            z_loss=z / (self.scale.tokens * layers),
            stop=stop > 0,
            writing=writing > 0,
            counts_LE=by_kind[0],
            rows_LE=by_kind[-1],
            wanted_bias_LE=wanted,
            logit_rms_L=np.sqrt(head[5:] / self.scale.tokens) if len(head) > 5 else None,
        )

    def update_biases(self, counts_LE: torch.Tensor, wanted_LE: torch.Tensor | None = None) -> None:
        if not self.bias_rate:
            return
        for layer, bias_E in enumerate(self.built.biases()):
            if bias_E is None:
                continue
            if wanted_LE is not None:
                blend_bias_(bias_E, wanted_LE[layer], self.bias_rate)
            else:
                update_bias_(bias_E, counts_LE[layer], self.bias_rate, self.recipe.moe.bias_update)

    def replan(self) -> None:
        """Place redundant experts by the loads since the last time. Moves weights; no number changes. Collective."""
        counts_LE, nodes = self.counts_since_plan.tolist(), node_size(self.run)
        for layer, counts_E in zip(self.built.layers, counts_LE, strict=True):
            old = layer.plan
            plan = plan_slots(old.num_experts, old.world_size, old.shared_ranks, old.num_redundant, counts_E, nodes)
            layer.set_plan(plan)
        self.engine.store.set_plans([layer.plan for layer in self.built.layers])
        self.counts_since_plan.zero_()

    def guard(self, sums: StepSums) -> None:
        """Do what the rules say of a step's loads. Collective: all ranks have the same counts and do the same.

        Raises `TrainingError` on every rank if one says stop.
        """
        if not self.guards.rules:
            return  # the counts need not leave the device
        for alarm in self.guards.look(sums.counts_LE.cpu().numpy(), self.step, sums.logit_rms_L):
            rule = alarm.rule
            text = f"step {self.step}: {alarm}"
            if rule.action == "raise_bias_rate":
                assert rule.max_rate is not None
                self.bias_rate = min(self.bias_rate * rule.factor, rule.max_rate)
                text += f"; the bias moves by {self.bias_rate:g} a step from now on"
            elif rule.action == "replan":
                self.replan()
                text += "; redundant experts are placed anew"
            self.tracker.event(
                "guard", step=self.step, when=rule.when, action=rule.action, layer=alarm.layer, found=alarm.found
            )
            self.tracker.alert(f"guard: {rule.when}", text)
            self.progress.message(f"warning: {text}")
            if rule.action == "stop":
                self.stop_at(alarm)

    def stop_at(self, alarm: Alarm) -> None:
        """Save, and end the run. Collective."""
        self.save()
        saved = "saved" if self.saved_step == self.step else f"NOT saved, last at step {self.saved_step or 0}"
        raise TrainingError(
            f"step {self.step}: {alarm}, and diagnostics.guards says stop ({saved}): look at the load, then start the "
            "same command to go on, with another moe.aux_loss_coef or moe.bias_update_rate if that is the cause"
        )

    def explain_nonfinite(self, sums: StepSums, batches: list[torch.Tensor]) -> None:
        """Find the first bad layer by running the step's forwards again, and stop. Collective."""
        found = None
        for number, (start, batch) in enumerate(zip(self.starts(), batches, strict=True)):
            with self.built.context.micro_batch(start):
                seen = first_nonfinite(self.built.model, lambda batch=batch: self.forward_loss(batch))
            if seen and found is None:
                found = (number, *seen)
        first = min(((f, r) for r, f in enumerate(self.groups.world.gather_objects(found)) if f), default=None)
        layer = f"first in the output of {first[0][2]} on rank {first[1]}" if first else "in the loss itself"
        raise TrainingError(
            f"step {self.step + 1}: the loss is {sums.loss} (router losses {sums.aux_loss}, {sums.z_loss}), {layer}. "
            f"{self.where()} No weight was changed by this step; the last checkpoint is whole"
        )

    def where(self) -> str:
        last = self.sequences + self.recipe.batch.global_size - 1
        return f"Data position: sequences {self.sequences} to {last}."

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss on the first `train.eval_sequences` held-out samples, the same ones at every layout. Collective."""
        validation: BlendedDataset | None = self.assembly.data.validation
        if validation is None:
            return None
        wanted, size = self.recipe.train.eval_sequences, self.recipe.batch.micro_size
        data = self.groups.data
        self.built.model.eval()
        chosen = self.observer.begin_evaluation()
        total = torch.zeros((), dtype=torch.float64, device=self.assembly.device)
        for start in range(data.rank_in_group * size, wanted + data.rank_in_group * size, size * data.world_size):
            # every rank does the same number of forwards; what lies beyond `wanted` counts nothing
            batch = torch.from_numpy(validation.batch(start, size))
            batch[max(wanted - start, 0) :, 1:] = -100
            self.observer.expect(chosen, start, size)
            batch = batch.to(self.assembly.device)
            total += self.engine(input_ids=batch[:, :-1].clamp(min=0), labels=batch[:, 1:]).loss
        self.built.model.train()
        data.all_reduce_(total)
        if problem := self.observer.end_evaluation(chosen, self.step):
            self.tracker.event("warning", step=self.step, text=problem)
            self.progress.message(f"warning: {problem}")
        return float(total) / (wanted * self.recipe.data.sequence_length)

    # ---- the run

    def train(self) -> bool:
        """Returns whether the last step was reached (False: stopped on request, after saving)."""
        try:
            finished = self.run_steps()
        except TrainingError:  # raised on every rank at the same step
            with suppress(CheckpointError):  # it has been told as a warning; the first error is the one to raise
                self.saver.finish()
            raise
        self.saver.finish()
        return finished

    def run_steps(self) -> bool:
        steps, train = self.recipe.train.steps, self.recipe.train
        if self.step < steps:
            self.check_peers()
        while self.step < steps:
            sums, result = self.train_step()
            self.throughput.add(self.scale.tokens)
            interval = self.recipe.moe.replan_interval
            if interval and self.step % interval == 0:
                self.replan()
            self.counts_since_log += sums.counts_LE
            self.rows_since_log += sums.rows_LE
            last = self.step == steps
            self.val_loss = None
            if last or (train.eval_interval and self.step % train.eval_interval == 0):
                with self.throughput.paused():
                    self.val_loss = self.evaluate()
            if self.observer.logs_at(self.step):
                self.log(sums, result, self.val_loss)
            self.guard(sums)
            interval = self.recipe.checkpoint.interval
            with self.throughput.paused():
                if not sums.writing:
                    self.saver.advance()
                if sums.stop or (interval and self.step % interval == 0) or (last and self.recipe.checkpoint.at_end):
                    self.save(wait=sums.stop or last)
            if sums.stop and not last:
                return False
        return True

    def log(self, sums: StepSums, result: StepResult, val_loss: float | None) -> None:
        rate = self.throughput.read()
        counts = self.counts_since_log.cpu().numpy().copy()  # on a CPU it would be a view of what is zeroed next
        rows = self.rows_since_log.cpu().numpy().copy()
        self.counts_since_log.zero_()
        self.rows_since_log.zero_()
        self.history.add(self.step, counts)
        self.record.add(counts)
        balance = summary(counts, self.tokens_per_rank(rows)) | self.observer.metrics(sums.counts_LE)
        if self.built.context.kept_LE is not None:
            balance |= drop_summary(counts, rows)
            if val_loss is not None or self.step == self.recipe.train.steps:
                self.tracker.event("dropped", step=self.step, shares=drop_shares(counts, rows).round(4).tolist())
        lr = self.engine.lr
        metrics = {
            "train/loss": sums.loss,
            "train/grad_norm": result.grad_norm,
            "train/clip_factor": result.clip_factor,
            "train/lr": lr,
            "train/tokens": self.sequences * self.recipe.data.sequence_length,
            "perf/tokens_per_s": rate.tokens_per_s,
            "perf/step_s": rate.seconds,
            **balance,
        }
        if rate.mfu is not None:
            metrics["perf/mfu"] = rate.mfu
        if self.assembly.device.type == "cuda":
            metrics["perf/peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.assembly.device)
        if self.scale.aux_coef:
            metrics["moe/aux_loss"] = sums.aux_loss
        if self.scale.z_coef:
            metrics["moe/z_loss"] = sums.z_loss
        if val_loss is not None:
            metrics["val/loss"] = val_loss
        if result.skipped:
            metrics["train/skipped"] = 1
        forced = self.recipe.moe.force_load
        if forced is not None:
            metrics["moe/forced_load"] = str(forced)
        self.tracker.log(self.step, metrics)
        figures = layer_figures(counts)
        self.tracker.layers(
            self.step, {"max_vio": figures.max_vio_L, "entropy": figures.entropy_L, **self.observer.layer_figures()}
        )
        if self.record.is_due(self.step, last=self.step == self.recipe.train.steps):
            self.tracker.heat_map(self.step, self.record.counts_LE)
            self.tracker.event("load", **self.record.take(self.step), **self.observer.figures)
        if self.observer.pairs is not None:
            self.tracker.event("coactivation", step=self.step, pairs=self.observer.pairs)
        self.progress.update(
            self.step,
            loss=sums.loss,
            lr=lr,
            tokens_per_s=rate.tokens_per_s,
            mfu=rate.mfu,
            max_vio=balance["moe/max_vio"],
            val_loss=val_loss,
            mark=f"FORCED LOAD ({forced})" if forced is not None else None,
        )

    def tokens_per_rank(self, counts_LE: np.ndarray) -> np.ndarray:
        """Expected rows of the routed experts on each rank of an EP group, by layer [L, R]."""
        nodes = node_size(self.run)
        # ranks that hold shared experts alone have other work
        shares = [rank_shares(layer.plan, nodes)[:, layer.plan.shared_ranks :] for layer in self.built.layers]
        return np.stack([counts_E @ shares_ER for counts_E, shares_ER in zip(counts_LE, shares, strict=True)])

    def save(self, wait: bool = True) -> None:
        """Save this step, once. Without `wait` it may be written while training goes on. Collective."""
        self.saver.save(self.step, self.position, wait)

    @property
    def saved_step(self) -> int | None:
        return self.saver.saved_step

    def position(self) -> Position:
        return Position(
            step=self.step,
            sequences=self.sequences,
            data=self.data_identity,
            run_id=self.groups.world.gather_objects(self.tracker.run_id)[0],
            history=self.history.state_dict(),
            counts=self.counts_since_log.tolist(),
            rows=self.rows_since_log.tolist() if self.built.context.kept_LE is not None else [],
            counts_since_plan=self.counts_since_plan.tolist() if self.replans else [],
            plans=[[list(experts) for experts in layer.plan.replicas] for layer in self.built.layers],
            guards={
                **self.guards.state_dict(),
                "bias_rate": self.bias_rate,
                "first_rate": self.recipe.moe.bias_update_rate,
            },
            val_loss=self.val_loss if self.val_loss is not None and np.isfinite(self.val_loss) else None,
            record=self.record.state_dict(),
        )
