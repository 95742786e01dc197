"""One or more recipes, start to end: validate all, then assemble, resume, train and report each."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_train import __version__
from moe_train.config import dump_recipe
from moe_train.data.baseline import unigram_loss
from moe_train.diagnostics.metrics_file import read_curve, read_lines
from moe_train.diagnostics.progress import NullProgress, Progress
from moe_train.diagnostics.report import write_report
from moe_train.diagnostics.throughput import Throughput, active_matmul_params, model_flops_per_token, peak_flops
from moe_train.diagnostics.tracker import NullTracker, Tracker
from moe_train.errors import CheckpointError, ConfigError
from moe_train.model import ParameterCount, count_parameters, num_experts_of
from moe_train.parallel import (
    Groups,
    Ranks,
    build_groups,
    close_process_group,
    init_process_group,
    raise_together,
)
from moe_train.train.assemble import Assembly, assemble
from moe_train.train.check import ResolvedRun, check_hardware, pick_device, resolve_run
from moe_train.train.lock import LOCK, RunLock
from moe_train.train.loop import Trainer
from moe_train.train.state import Position, find_checkpoint, load_state, load_weights
from moe_train.train.stop import STOPPED_EXIT_CODE, StopRequest

UNIGRAM_TOKENS = 500_000_000
"""The unigram baseline reads the whole training split; beyond this many tokens it is left out."""


def run_recipes(paths: Sequence[Path], overrides: Sequence[str], run_dir: Path | None, ranks: Ranks) -> int:
    """Every recipe is validated before the first one starts. Returns the exit code; errors are raised."""
    say = print if ranks.rank == 0 else _silent
    device = pick_device(ranks)
    runs = [resolve_run(path, tuple(overrides), ranks.world, ranks.per_node) for path in paths]
    for run in runs:
        check_hardware(run, device)
    for number, run in enumerate(runs, 1):
        say(f"recipe {number} of {len(runs)}: {run.path}", flush=True)
    _use_cores(ranks, device)
    stop = StopRequest()
    timeout = max(run.recipe.parallel.timeout_s for run in runs)
    init_process_group(ranks, device, timeout)
    groups = build_groups(runs[0].topology, timeout)
    folders = _run_folders(runs, run_dir, groups)
    code = 0
    for number, run in enumerate(runs):
        if number:
            groups = build_groups(run.topology, timeout)
        finished = run_one(run, groups, device, folders[number], stop)
        _free_memory(device)
        if not finished or (run is not runs[-1] and any(groups.world.gather_objects(stop.requested))):
            code = STOPPED_EXIT_CODE
            break
    groups.world.barrier()
    close_process_group()  # left to the interpreter's exit, gloo's threads may abort and replace the exit code
    return code


def run_one(run: ResolvedRun, groups: Groups, device: torch.device, run_dir: Path, stop: StopRequest) -> bool:
    """Returns whether the run reached its last step. Collective."""
    lead = groups.rank == 0
    say: Callable[..., None] = print if lead else _silent
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    say(describe(run, count, device), flush=True)
    with _prepare_folder(run_dir, groups):
        return _run_in(run_dir, run, count, groups, device, stop)


def _run_in(
    run_dir: Path, run: ResolvedRun, count: ParameterCount, groups: Groups, device: torch.device, stop: StopRequest
) -> bool:
    """In a folder that is this job's alone. Collective."""
    lead = groups.rank == 0
    say: Callable[..., None] = print if lead else _silent
    assembly = assemble(run, groups, device, _preparation_lines(say))
    say(f"experts    {_experts_line(assembly)}", flush=True)
    position = _resume(assembly, run_dir, say)
    if lead:
        (run_dir / "recipe.yaml").write_text(dump_recipe(run.recipe))
    stop.install()  # before the first recipe's loop a signal ends the process: there is nothing to save
    steps = run.recipe.train.steps
    if position.step >= steps and _has_ended(run_dir, groups):
        say(f"{run_dir}: all {steps} steps are done; nothing to do", flush=True)
        return True
    config = {"recipe": run.recipe.model_dump(mode="json"), "layout": vars(run.topology)}
    tracker = (
        Tracker(run_dir, run.recipe.tracking, config, resume_id=position.run_id or None) if lead else NullTracker()
    )
    progress = Progress(steps, position.step) if lead else NullProgress()
    throughput = Throughput(
        flops_per_token=flops_per_token(run, count),
        peak_flops_per_device=_peak(run, device),
        num_devices=groups.world.world_size,
    )
    with tracker, progress:
        tracker.rewind(position.step or -1)  # a run killed before its first checkpoint starts its curve again
        trainer = Trainer(assembly, position, run_dir, tracker, progress, throughput, stop)
        tracker.event("start", step=position.step, **_setting(run, count, device))
        baselines = _baselines(trainer, run_dir, resumed=position.step > 0)
        with trainer.saver:
            finished = trainer.train()
        if not finished:
            saved = (
                "saved" if trainer.saved_step == trainer.step else f"NOT saved, last at step {trainer.saved_step or 0}"
            )
            progress.message(f"stopped at step {trainer.step} ({stop.reason or 'another rank was told to'}); {saved}")
            tracker.event("stopped", step=trainer.step, saved=trainer.saved_step == trainer.step)
            return False
        summary = _report(trainer, run_dir, baselines) if lead else {}
        tracker.finish(summary)
    return True


def describe(run: ResolvedRun, count: ParameterCount, device: torch.device | None = None) -> str:
    """The resolved run in a few lines: model, layout, groups, batch, parameters."""
    recipe, topology = run.recipe, run.topology
    experts = num_experts_of(run.model_config)
    per_rank = sorted(set(count.per_rank))
    held = f"{_millions(per_rank[0])}" + (f" to {_millions(per_rank[-1])}" if len(per_rank) > 1 else "")
    lines = [
        f"model      {run.model_config.model_type}, {count.num_moe_layers} MoE layers of {experts} experts, "
        f"top-{run.model_config.num_experts_per_tok}",
        f"parameters {_millions(count.total)} total, {_millions(count.active)} active per token, {held} on a rank",
        f"layout     {topology.world} ranks = {topology.expert_data} x EP {topology.expert}{_wide(run)}, "
        f"ZeRO-{recipe.zero.stage}, {recipe.precision.compute}"
        + (", experts fp8" if recipe.precision.experts == "fp8" else "")
        + (f", {device.type}" if device else ""),
        f"groups     EP {_short(topology.expert_groups())}; expert data {_short(topology.expert_data_groups())}"
        + (f"; TP {_short(topology.tensor_groups())}" if topology.tensor > 1 else ""),
        f"batch      {recipe.batch.global_size} sequences of {recipe.data.sequence_length} = {run.tokens_per_step} "
        f"tokens: {topology.data} ranks x {run.accumulation} micro-batches of {recipe.batch.micro_size}",
    ]
    if recipe.moe.force_load is not None:
        lines.append(
            f"FORCED LOAD  moe.force_load ({recipe.moe.force_load}): tokens go where they are told and not where the "
            "router wants them; for benchmarks, not for training"
        )
    lines += [
        f"WARNING    {setting}: which expert a token gets depends on later tokens of its sequence, which a model that "
        "generates has not; evaluations choose by top_k and drop nothing"
        for setting in recipe.moe.not_causal
    ]
    return "\n".join(lines)


def _experts_line(assembly: Assembly) -> str:
    options = assembly.built.layers[0].options
    line = f"moe.backend {options.backend}"
    return line if options.fp8 is None else f"{line}, precision.experts fp8: {options.fp8.describe()}"


def _setting(run: ResolvedRun, count: ParameterCount, device: torch.device) -> dict[str, Any]:
    """What a reader of metrics.jsonl needs to know of a run: model, layout, where it ran."""
    topology, config = run.topology, run.model_config
    return {
        "about": describe(run, count, device).splitlines(),
        "steps": run.recipe.train.steps,
        "tokens_per_step": run.tokens_per_step,
        "top_k": config.num_experts_per_tok,
        "world": topology.world,
        "expert_parallel": topology.expert,
        "expert_groups": topology.expert_groups(),
        "shared_expert_ranks": run.plan.shared_ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"moe_train": __version__, "torch": torch.__version__},
    }


def _wide(run: ResolvedRun) -> str:
    """What else a layout has, where it has it."""
    topology, plan = run.topology, run.plan
    parts = {
        "expert TP": topology.expert_tensor if topology.expert_tensor > 1 else 0,
        "TP": topology.tensor if topology.tensor > 1 else 0,
        "shared-expert ranks": plan.shared_ranks,
        "redundant experts": plan.num_redundant,
    }
    return "".join(f" x {name} {size}" if "TP" in name else f", {size} {name}" for name, size in parts.items() if size)


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _short(groups: list[list[int]]) -> str:
    shown = ", ".join(str(ranks) for ranks in groups[:2])
    return shown + (f", ... ({len(groups)})" if len(groups) > 2 else "")


def _silent(*args, **kwargs) -> None:
    """Every rank but 0."""


def _use_cores(ranks: Ranks, device: torch.device) -> None:
    """Ranks on one CPU share its cores; without this each would start a thread per core."""
    import os

    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // max(ranks.per_node, 1), 1))


def _run_folders(runs: list[ResolvedRun], run_dir: Path | None, groups: Groups) -> list[Path]:
    """One folder per recipe; rank 0's clock names them, so that all ranks agree. Collective."""
    stamp = groups.world.gather_objects(time.strftime("%Y%m%d-%H%M%S"))[0]
    if run_dir is None:
        return [Path("runs") / f"{run.path.stem}-{stamp}" for run in runs]
    return [run_dir] if len(runs) == 1 else [run_dir / run.path.stem for run in runs]


def _prepare_folder(run_dir: Path, groups: Groups) -> AbstractContextManager:
    """Make the run's folder, and lock it; refuse at the start what would fail at the first save. Collective."""
    token, error = run_dir / "checkpoints" / ".shared", None
    try:
        if groups.rank == 0:
            token.parent.mkdir(parents=True, exist_ok=True)
            token.write_text("every rank must see this file\n")
    except OSError as caught:
        error = ConfigError(f"--run-dir {run_dir}: cannot be written ({caught.strerror}: {caught.filename})")
    raise_together(groups.world, error)
    if not token.exists():
        error = ConfigError(f"--run-dir {run_dir}: not the same folder on every host; give one on a shared file system")
    raise_together(groups.world, error)
    groups.world.barrier()
    lock: AbstractContextManager = nullcontext()
    if groups.rank == 0:
        token.unlink()
        try:
            lock = RunLock(run_dir)
        except OSError as caught:
            error = ConfigError(f"{run_dir / LOCK}: cannot be written ({caught.strerror})")
        except ConfigError as caught:
            error = caught
    raise_together(groups.world, error)
    return lock


def _free_memory(device: torch.device) -> None:
    """The next recipe of this process must not start with this one's memory held: engines are full of cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _preparation_lines(say: Callable[..., None]):
    last = [0.0]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 2:
            last[0] = time.monotonic()
            say(f"preparing the corpus: {done / 1e6:.1f} of {total / 1e6:.1f} MB", flush=True)

    return progress


def _resume(assembly: Assembly, run_dir: Path, say: Callable[..., None]) -> Position:
    fresh = Position(step=0, sequences=0, data=assembly.data.identity, run_id="", history={}, counts=[])
    wanted = assembly.run.recipe.checkpoint.resume
    directory, passed_over = find_checkpoint(run_dir / "checkpoints", assembly.groups)
    if wanted == "never" and directory is not None:
        raise CheckpointError(
            f"checkpoint.resume (never): {directory} is of an earlier run, which this one would overwrite and could "
            "later resume by mistake; give another --run-dir or remove it"
        )
    for reason in passed_over:
        say(f"warning: passed over a checkpoint: {reason}", flush=True)
    if directory is None:
        if passed_over:  # starting again would erase this run's curve; perhaps its disk is only away for a moment
            raise CheckpointError(
                f"none of the {len(passed_over)} checkpoints in {run_dir} is whole (above); give another --run-dir to "
                "start again"
            )
        if wanted == "must":
            raise CheckpointError(
                f"checkpoint.resume (must): {run_dir}/checkpoints holds no complete checkpoint; give its --run-dir"
            )
        weights = assembly.run.recipe.model.weights
        if weights is not None:
            load_weights(Path(weights), assembly.engine, assembly.built, assembly.groups)
            say(f"starting from the weights in {weights}", flush=True)
        return fresh
    position = load_state(directory, assembly.engine, assembly.built, assembly.groups, assembly.data.identity)
    say(f"resuming from {directory}", flush=True)
    return position


def _has_ended(run_dir: Path, groups: Groups) -> bool:
    """Whether metrics.jsonl has its end: a run may be killed between its last checkpoint and its report. Collective."""
    metrics = run_dir / "metrics.jsonl"
    ended = metrics.exists() and any(line and line.get("event") == "end" for line in read_lines(metrics))
    return groups.world.gather_objects(ended)[0]


def flops_per_token(run: ResolvedRun, count: ParameterCount) -> float:
    """To train on one token, forward and backward, recomputation left out."""
    config = run.model_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "v_head_dim") and hasattr(config, "qk_nope_head_dim"):  # latent attention: unequal heads
        head_dim = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    return model_flops_per_token(
        active_matmul_params=active_matmul_params(
            total_params=count.total,
            embedding_params=count.embedding,
            expert_params=count.experts,
            num_experts=num_experts_of(config),
            top_k=config.num_experts_per_tok,
        ),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        head_dim=head_dim,
        sequence_length=run.recipe.data.sequence_length,
    )


def _peak(run: ResolvedRun, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), run.recipe.precision.compute)


def _baselines(trainer: Trainer, run_dir: Path, resumed: bool) -> dict[str, float]:
    """What training has to beat, in nats per token: a unigram model and the untrained start. Collective."""
    baselines: dict[str, float] = {}
    if resumed:
        for key in ("untrained", "unigram"):
            curve = read_curve(run_dir / "metrics.jsonl", f"val/{key}") if trainer.groups.rank == 0 else []
            if curve:
                baselines[key] = curve[-1][1]
        return baselines
    untrained = trainer.evaluate()
    data = trainer.assembly.data
    if untrained is None or trainer.groups.rank != 0 or data.validation is None:
        return baselines
    baselines["untrained"] = untrained
    if sum(dataset.num_tokens for dataset in data.train.datasets) <= UNIGRAM_TOKENS:
        baselines["unigram"] = unigram_loss(data.train, data.validation, trainer.recipe.train.eval_sequences)
    trainer.tracker.log(0, {f"val/{key}": value for key, value in baselines.items()})
    shown = ", ".join(f"{key} {value:.4f}" for key, value in baselines.items())
    trainer.progress.message(f"validation loss before training (nats per token): {shown}")
    return baselines


def _report(trainer: Trainer, run_dir: Path, baselines: dict[str, float]) -> dict[str, float]:
    """The last lines of a run and its picture. Rank 0."""
    metrics = run_dir / "metrics.jsonl"
    validation = read_curve(metrics, "val/loss")
    losses = read_curve(metrics, "train/loss")
    summary = {f"val/{key}": value for key, value in baselines.items()}
    if validation:
        summary["val/loss"] = validation[-1][1]
        rows = [*baselines.items(), ("trained", validation[-1][1])]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {value:.4f}   ({np.exp(value):.1f} choices)" for name, value in rows]
        trainer.progress.message("validation loss, nats per token:\n" + "\n".join(lines))
    if trainer.recipe.diagnostics.load_picture:
        path = run_dir / "load.png"
        from moe_train.diagnostics.picture import load_picture  # matplotlib: half a second of every start

        load_picture(trainer.history, losses, validation, path, run_dir.name, baselines)
        trainer.tracker.image(path, "moe/load")
        trainer.progress.message(f"load per layer and expert: {path}")
    if trainer.recipe.diagnostics.report:
        try:
            write_report(run_dir, None, run_dir / "report.html")
            trainer.tracker.artifact(run_dir / "report.html", "report")
            trainer.progress.message(f"report: {run_dir / 'report.html'}")
        except ConfigError as error:  # a full disk: the run itself is done and saved
            trainer.progress.message(f"warning: {error}")
    trainer.progress.message(f"metrics: {metrics}")
    return summary
