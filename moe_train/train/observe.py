"""What a run looks at beside its loss: routing of the steps that are logged and of held-out tokens.

A step's sums travel in the step's own packed all_reduce and stay on the device until its line is written. Times of a
step are known only when it is over: those of the step before a log step travel with the log step.

L MoE layers, E logical experts, W ranks, N held-out tokens, K experts per token.
"""

from pathlib import Path

import numpy as np
import torch

from moe_train.diagnostics.load import layer_figures
from moe_train.diagnostics.routing_files import RoutingFiles
from moe_train.diagnostics.step_figures import rank_figures, router_figures, step_summary
from moe_train.moe import RANK_ROWS, ROUTER_SUMS, ChosenExperts, ExpertClock, StepStatistics
from moe_train.moe.statistics import on_device
from moe_train.train.assemble import Assembly

RANK_COLUMNS = (*RANK_ROWS, "timed_rows", "ms")


class Observer:
    """Args:
        first_step: where the run starts; files of later steps are removed.

    figures: of the last log step, fields of a `load` event [L] and [L, W]. pairs: its co-activation counts [L, E, E],
    if it was one with them. evaluation: metrics of the last evaluation.
    """

    def __init__(self, assembly: Assembly, run_dir: Path, first_step: int):
        self.run, self.groups, self.context = assembly.run, assembly.groups, assembly.built.context
        self.recipe, self.device = assembly.run.recipe, assembly.device
        self.layers = assembly.built.layers
        self.num_layers, self.num_experts = self.context.counts_LE.shape
        self.files = RoutingFiles(run_dir)
        if self.groups.rank == 0:
            self.files.rewind(first_step)
        self.evaluates = assembly.data.validation is not None
        self.step = StepStatistics(self.num_layers, self.num_experts, self.device)
        self.timed: tuple[ExpertClock, torch.Tensor] | None = None
        self.packed = torch.zeros(0)
        self.evaluation: dict[str, float] = {}
        self.figures: dict[str, list] = {}
        self.pairs: list | None = None

    # ---- training

    def logs_at(self, step: int) -> bool:
        """Whether a line is written after this optimizer step."""
        train = self.recipe.train
        evaluated = self.evaluates and train.eval_interval and step % train.eval_interval == 0
        return step == train.steps or bool(evaluated) or step % self.recipe.diagnostics.log_interval == 0

    def begin(self, step: int) -> None:
        """Watch the forwards of a step, if a figure of it is wanted."""
        logs, times = self.logs_at(step), self.logs_at(step + 1)
        if logs or times:
            interval = self.recipe.diagnostics.coactivation_interval
            pairs = logs and bool(interval) and step % interval == 0
            self.step = StepStatistics(self.num_layers, self.num_experts, self.device, routing=logs, pairs=pairs)
            self.context.watcher = self.step
        if times:
            self.context.clock = ExpertClock(self.num_layers, self.device)

    def end(self, step: int) -> torch.Tensor:
        """Stop watching. Returns what is to be summed over all ranks, float64; nothing but at log steps."""
        clock, timed = self.context.clock, self.timed
        self.context.watcher = self.context.clock = None
        logs = self.logs_at(step)
        rows_LQ = self.step.rows_LQ() if logs or clock else torch.zeros(0)
        self.timed = None if clock is None else (clock, rows_LQ[:, 0])
        if not logs:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        rank, world = self.groups.rank, self.groups.world.world_size
        ranks_LWQ = rows_LQ.new_zeros(self.num_layers, world, len(RANK_COLUMNS))
        ranks_LWQ[:, rank, : len(RANK_ROWS)] = rows_LQ
        if timed is not None:
            ms_L = torch.tensor(timed[0].milliseconds(), dtype=torch.float64)
            ranks_LWQ[:, rank, -2], ranks_LWQ[:, rank, -1] = timed[1], on_device(ms_L, self.device)
        parts = [self.step.sums_LF(self.num_experts), ranks_LWQ]
        if self.step.pairs_LEE is not None:
            parts.append(self.step.pairs_LEE)
        return torch.cat([part.flatten() for part in parts])

    def keep(self, packed: torch.Tensor) -> None:
        """What `end` gave, summed over ranks; still on the device."""
        self.packed = packed

    def metrics(self, counts_LE: torch.Tensor) -> dict[str, float]:
        """Figures of the log step whose sums are kept. Reads the device.

        Args:
            counts_LE: tokens per layer and expert of that step.
        """
        counts, packed = counts_LE.cpu().numpy(), self.packed.cpu().numpy()
        layers, world = self.num_layers, self.groups.world.world_size
        sizes = np.cumsum([layers * len(ROUTER_SUMS), layers * world * len(RANK_COLUMNS)])
        sums, ranks, pairs = np.split(packed, sizes)
        router = router_figures(dict(zip(ROUTER_SUMS, sums.reshape(layers, -1).T, strict=True)))
        columns = np.moveaxis(ranks.reshape(layers, world, len(RANK_COLUMNS)), -1, 0)
        topology = self.groups.topology
        by_rank = rank_figures(
            dict(zip(RANK_COLUMNS, columns, strict=True)),
            counts.sum(axis=1),
            topology.expert_groups(),
            shared_ranks=self.layers[0].plan.shared_ranks,
            copies=topology.expert_tensor,
            micro_batches=self.run.accumulation,
            row_bytes=self.run.row_bytes(),
        )
        self.pairs = pairs.astype(np.int64).reshape(layers, self.num_experts, -1).tolist() if pairs.size else None
        self.figures = {
            **{name: values_L.tolist() for name, values_L in router.items()},
            "max_vio_batch": layer_figures(counts).max_vio_L.tolist(),
            "drop_rate": by_rank.drop_rate_L.tolist(),
            "peak_rows": by_rank.peak_L.tolist(),
            "skew_ms": by_rank.lost_L.tolist(),
            "received": by_rank.received_LW.astype(np.int64).tolist(),
            "sent_bytes": by_rank.sent_LW.astype(np.int64).tolist(),
            "saved_bytes": by_rank.saved_LW.astype(np.int64).tolist(),
            "lost_ms": by_rank.lost_LW.tolist(),
            "expert_ms": columns[-1].tolist(),
        }
        evaluation, self.evaluation = self.evaluation, {}
        return {**step_summary(counts, router, by_rank), **evaluation}

    def layer_figures(self) -> dict[str, list[float]]:
        """Of `figures` those with one number per layer that a tracker draws as curves."""
        return {name: self.figures[name] for name in ("confidence", "logit_rms", "skew_ms") if name in self.figures}

    # ---- evaluation

    def begin_evaluation(self) -> ChosenExperts:
        """Watch held-out tokens; whoever runs the forwards says which of them count."""
        self.context.watcher = chosen = ChosenExperts(self.num_layers, self.num_experts, self.device)
        return chosen

    def expect(self, chosen: ChosenExperts, start: int, size: int) -> None:
        """The next forward is of `size` held-out sequences from number `start` on."""
        length, wanted = self.recipe.data.sequence_length, self.recipe.train.eval_sequences
        kept = min(wanted, -(-self.recipe.diagnostics.saturation_tokens // length))
        chosen.valid, chosen.keep = (min(max(most - start, 0), size) * length for most in (wanted, kept))

    def end_evaluation(self, chosen: ChosenExperts, step: int) -> str | None:
        """Make the evaluation's metrics and write its choices. Returns why they could not be written. Collective."""
        self.context.watcher = None
        figures = layer_figures(self.groups.world.all_reduce_(chosen.counts_LE).cpu().numpy())
        routed = max(int((figures.tokens_L > 0).sum()), 1)
        self.evaluation = {
            "moe/max_vio_global": float(figures.max_vio_L.max(initial=0.0)),
            "moe/max_vio_global_mean": float(figures.max_vio_L.sum() / routed),
        }
        if not self.recipe.diagnostics.saturation_tokens:
            return None
        mine = [torch.stack(parts).cpu().to(torch.int32).numpy() for parts in zip(*chosen.kept, strict=True)]
        everyone = self.groups.data.gather_objects(mine)
        if self.groups.rank:
            return None
        # the n-th forwards of all ranks are consecutive sequences
        ids_LNK = np.concatenate([part for forward in zip(*everyone, strict=True) for part in forward], axis=1)
        try:
            saturation_L = self.files.since_previous(step, ids_LNK)
            self.files.save(step, ids_LNK)
        except OSError as error:
            return f"{self.files.folder} cannot be written ({error.strerror}): no router saturation of step {step}"
        if saturation_L is not None:
            self.evaluation["moe/saturation"] = float(saturation_L.mean())
        return None
