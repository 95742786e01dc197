"""`moe-train`: one thin command per verb. Errors are one sentence and an exit code."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from moe_train.errors import ConfigError, MoeTrainError
from moe_train.parallel import Ranks

if TYPE_CHECKING:
    from moe_train.checkpoint import Manifest
    from moe_train.checkpoint.threads import Crew, Report
    from moe_train.hub.upcycle import UpcycleOptions
    from moe_train.model.cuts import FamilyCuts

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Corpora.")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, e.g. --set optimizer.lr=3e-4")]
Recipes = Annotated[list[Path], typer.Argument(help="YAML files, run in this order")]


def guarded(action: Callable[[], int | None], ranks: Ranks | None = None) -> NoReturn:
    """Run a command: its errors become one message on stderr and their exit code.

    With several ranks the first rank of a host speaks; another one only if that one has not failed too, because the
    launcher ends all of them as soon as one has.
    """
    try:
        code = action() or 0
    except MoeTrainError as error:
        if ranks is not None and ranks.local_rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler would outlive the launcher's word
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    if code and ranks is not None and ranks.world > 1:
        os._exit(code)  # process groups may still be open: gloo's threads abort the interpreter's exit, and its code
    sys.exit(code)


@app.command()
def check(
    recipes: Recipes,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Number of ranks; default: the recipe's first, or 1")] = None,
    per_node: Annotated[int, typer.Option(min=1, help="Ranks per host")] = 8,
) -> None:
    """Validate recipes without starting anything, and print what they resolve to."""
    from moe_train.config import load_recipe
    from moe_train.model import count_parameters
    from moe_train.train import describe, resolve_run

    def action() -> None:
        for path in recipes:
            recipe = load_recipe(path, overrides or ())
            number = world or (recipe.world_sizes[0] if recipe.world_sizes else 1)
            run = resolve_run(path, tuple(overrides or ()), number, per_node)
            count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
            print(f"{path}: ok\n{describe(run, count)}\n", flush=True)

    guarded(action)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML file")],
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(min=1, help="Number of ranks; default: the recipe's first, or 1")] = None,
    per_node: Annotated[int, typer.Option(min=1, help="Ranks per host")] = 8,
    skew: Annotated[str, typer.Option(help="Rows of the fullest rank, in fair shares")] = "1,1.5,2",
    gpu: Annotated[str, typer.Option(help="As torch names it")] = "NVIDIA H200",
    peak_tflops: Annotated[float | None, typer.Option(min=0.001, help="Of one device; default: the GPU's")] = None,
    efficiency: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of the peak that is reached; default: 0.17")
    ] = None,
    link_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s that a rank sends within a host")] = None,
    network_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s that a rank sends between hosts")] = None,
    run_dir: Annotated[Path | None, typer.Option("--run", help="A run of this recipe, to compare with")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every number here")] = None,
) -> None:
    """Say what a recipe will cost on a rank: memory, bytes on the wire, FLOPs, seconds of a step. Starts nothing."""
    from moe_train.budget import Hardware, compare_with_run, plan_run
    from moe_train.budget.report import print_plan, write_json
    from moe_train.config import load_recipe
    from moe_train.train import resolve_run

    def action() -> None:
        given = load_recipe(recipe, overrides or ())
        number = world or (given.world_sizes[0] if given.world_sizes else 1)
        run = resolve_run(recipe, tuple(overrides or ()), number, per_node)
        hardware = Hardware.of(
            gpu,
            given.precision.compute,
            flops=peak_tflops and peak_tflops * 1e12,
            efficiency=efficiency,
            link=link_gbs and link_gbs * 1e9,
            network=network_gbs and network_gbs * 1e9,
        )
        found = plan_run(run, hardware, _numbers("--skew", skew))
        compared = compare_with_run(found, run_dir) if run_dir else []
        print_plan(found, compared, str(recipe))
        if json_file is not None:
            write_json(found, compared, json_file)

    guarded(action)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < number < math.inf for number in found):
        raise ConfigError(f"{option} ({text}) must be numbers above 0 with commas between them, such as 1,1.5,2")
    return found


@app.command()
def train(recipes: Recipes, overrides: Overrides = None, run_dir: Path | None = None) -> None:
    """Train on this process alone (or under torchrun); several ranks: `deepspeed launch RECIPE...`."""
    from moe_train.train import run_recipes

    ranks = Ranks.from_environment()
    guarded(lambda: run_recipes(recipes, overrides or (), run_dir, ranks), ranks)


@app.command()
def verify(
    recipes: Recipes,
    overrides: Overrides = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Every layout, or a dozen that cover each choice")
    ] = False,
    world: Annotated[
        str, typer.Option(help="Numbers of ranks, such as 1,2,4; on GPUs those up to their number are run")
    ] = "1,2,3,4",
    device: Annotated[
        str, typer.Option(help="cpu: gloo; cuda: NCCL, or gloo where ranks share a GPU; bf16 and fp32")
    ] = "cpu",
    precision: Annotated[
        str | None, typer.Option(help="Only layouts that compute in some of fp64,fp32,bf16", show_default="all")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every number here")] = None,
) -> None:
    """Prove that the layout does not change a recipe's numbers: a small model of its kind, against one process.

    That process is stock transformers in float64. A bf16 layout may differ from it by 2.5 times what one plain process
    in bf16 does, and 1/256.
    """
    from moe_train.verify import certify, parse_precisions, parse_worlds

    guarded(
        lambda: certify(
            recipes,
            overrides or (),
            worlds=parse_worlds(world),
            full=full,
            device=device,
            precisions=parse_precisions(precision),
            json_path=json_file,
        )
    )


@data_app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Text file, .jsonl, folder, or python-stdlib")],
    output: Annotated[Path, typer.Argument(help="Prefix of the .bin and .idx files")],
    tokenizer: Annotated[
        str, typer.Option(help="byte, or a Hugging Face tokenizer's folder or tokenizer.json")
    ] = "byte",
    glob: Annotated[str, typer.Option(help="Which files of a folder")] = "**/*",
    jsonl_field: Annotated[str, typer.Option(help="Field of a .jsonl line")] = "text",
) -> None:
    """Turn text into Megatron's .bin/.idx."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    from moe_train.data.prepare import prepare as prepare_corpus
    from moe_train.data.tokenizer import load_tokenizer

    def action() -> None:
        with Bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), transient=True) as bar:
            task = bar.add_task("reading", total=None)

            done = prepare_corpus(
                source,
                output,
                load_tokenizer(tokenizer),
                glob=glob,
                jsonl_field=jsonl_field,
                progress=lambda read, total: bar.update(task, completed=read, total=total),
            )
        print(
            f"{output}.bin, {output}.idx: {done.num_documents} documents, {done.num_tokens} tokens "
            f"of {done.num_bytes} bytes",
            flush=True,
        )

    guarded(action)


Size = Annotated[int | None, typer.Option(min=1)]


@app.command()
def reshard(
    source: Annotated[
        Path, typer.Argument(help="A step_<N> folder, checkpoints/best, or checkpoints (newest whole one)")
    ],
    destination: Annotated[Path, typer.Argument(help="The new folder, .../checkpoints/step_<N> to resume from it")],
    world: Annotated[int | None, typer.Option(min=1, help="Ranks; what is left out stays as in the source")] = None,
    expert_parallel: Size = None,
    tensor: Size = None,
    expert_tensor: Size = None,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage")] = None,
    redundant: Annotated[int | None, typer.Option(min=0, help="Redundant experts of each EP group")] = None,
    shared_ranks: Annotated[int | None, typer.Option(min=0, help="Ranks of an EP group for the shared expert")] = None,
    shared_tensor: Annotated[bool | None, typer.Option(help="Cut shared experts over the tensor ranks")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Files at once; default: twice the cores")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, from the manifest alone")] = False,
    check: Annotated[bool, typer.Option("--check", help="Prove that both hold the same; exit code 1 if not")] = False,
) -> None:
    """Write a checkpoint anew for another layout, on a CPU. A run loads one of any layout without this too."""
    from moe_train.checkpoint.compare import compare
    from moe_train.checkpoint.reshard import plan_reshard
    from moe_train.checkpoint.reshard import reshard as write_anew

    changes = {
        **{"world": world, "expert": expert_parallel, "tensor": tensor, "expert_tensor": expert_tensor, "zero": zero},
        **{"redundant": redundant, "shared_ranks": shared_ranks, "shared_tensor": shared_tensor},
    }

    def action() -> int:
        if check:
            if plan or any(value is not None for value in changes.values()):
                raise ConfigError("--check compares two checkpoints as they are: leave the other options out")
            with _byte_bars() as report:
                found = compare(source, destination, jobs, report)
            print(found, flush=True)
            return 0 if found.equal else 1
        if plan:
            print(plan_reshard(source, destination, changes, _cuts).describe(), flush=True)
            return 0
        started = time.monotonic()
        with _byte_bars() as report:
            done = write_anew(source, destination, changes, _cuts, jobs, report)
        for reason in done.passed_over:
            print(f"warning: passed over a checkpoint: {reason}", flush=True)
        seconds = max(time.monotonic() - started, 1e-3)
        print(
            f"{done.source.directory} -> {destination}: {done.layout}; {len(done.files)} files, "
            f"{sum(file.nbytes for file in done.files)} bytes in {seconds:.1f} s",
            flush=True,
        )
        return 0

    guarded(action)


def _cuts(manifest: "Manifest") -> "FamilyCuts":
    """Asked for by layouts that depend on the model's family alone: it takes transformers to know one."""
    from moe_train.model.cuts import FamilyCuts

    return FamilyCuts(manifest.model_type, manifest.recipe)


@contextmanager
def _byte_bars() -> "Iterator[Report]":
    """A bar per phase with bytes, speed and time left; where nobody watches, a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    tasks: dict[str, Any] = {}
    lock, told = threading.Lock(), {"at": time.monotonic()}
    with Bars(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bars:

        def report(phase: str, done: int, total: int) -> None:
            with lock:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done)
                if console.is_terminal or time.monotonic() - told["at"] < 10:
                    return
                told["at"] = time.monotonic()
            left = bars.tasks[tasks[phase]].time_remaining
            print(
                f"{phase}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
                + ("" if left is None else f", {left:.0f} s left"),
                file=sys.stderr,
                flush=True,
            )

        yield report


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, finished or not")],
    vs: Annotated[Path | None, typer.Option(help="Another run's folder, shown beside it")] = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in RUN_DIR")] = None,
    png: Annotated[Path | None, typer.Option(help="A folder for pictures, one per run")] = None,
) -> None:
    """Show a run as one HTML file: loss, speed, load per layer and expert over time, events. Needs no network."""
    from moe_train.diagnostics.report import write_pictures, write_report

    def action() -> None:
        target = out or run_dir / "report.html"
        runs = write_report(run_dir, vs, target)
        for run in runs:
            if run.num_damaged:
                print(
                    f"warning: {run.name}: {run.num_damaged} damaged lines of metrics.jsonl were left out", flush=True
                )
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB", flush=True)
        for path in write_pictures(runs, png) if png is not None else []:
            print(path, flush=True)

    guarded(action)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A step_<N> folder, checkpoints/best, or a run (newest whole one)")],
    out: Annotated[Path, typer.Argument(help="The new folder, for transformers, vLLM, lm-eval")],
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: what the run computed in")] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Of one file, in GB")] = 4.0,
    tokenizer: Annotated[
        str | None, typer.Option(help="In place of the recipe's: byte, a folder, a tokenizer.json, or none")
    ] = None,
) -> None:
    """Write a checkpoint of any layout as a Hugging Face folder, in the family's own files."""
    from moe_train.checkpoint.threads import Crew
    from moe_train.hub.export import export as write_out
    from moe_train.hub.export import plan_export

    def action() -> None:
        if dtype not in (None, "bf16", "fp32"):
            raise ConfigError(f"--dtype ({dtype}) must be bf16 or fp32")
        with _byte_bars() as report:
            crew = Crew(report=report)
            plan = plan_export(source, out, dtype, int(shard_size * 10**9), tokenizer, crew)
            found = write_out(plan, crew)
        for reason in plan.passed_over:
            print(f"warning: passed over a checkpoint: {reason}", flush=True)
        for reason in plan.differs:
            print(f"warning: {reason}; the model in {out} chooses the top k", flush=True)
        written = ", ".join(plan.folder.config.architectures or ())
        print(f"{plan.source.directory} -> {out}: {written}, {plan.tokenizer.what}")
        print(f"{out}: {found}", flush=True)

    guarded(action)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors, or a DeepSpeed checkpoint")],
    out: Annotated[Path | None, typer.Argument(help="The new folder, for --upcycle and for DeepSpeed's")] = None,
    upcycle: Annotated[bool, typer.Option("--upcycle", help="Make an MoE of a dense model, in OUT")] = False,
    experts: Annotated[int, typer.Option(min=1, help="--upcycle: copies of each MLP")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="--upcycle: copies that a token meets")] = 2,
    granularity: Annotated[int, typer.Option(min=1, help="--upcycle: experts that each copy is cut into")] = 1,
    noise: Annotated[float, typer.Option(min=0, help="--upcycle: added to experts, relative to their spread")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="--upcycle: of router and noise")] = 0,
    config: Annotated[Path | None, typer.Option(help="DeepSpeed: a config.json of the model's family")] = None,
    tag: Annotated[str | None, typer.Option(help="DeepSpeed: which save; default: what its `latest` says")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of OUT: bf16 or fp32; default: as the source")] = None,
) -> None:
    """Prove that a run can start from a folder's weights, and say how; make such a folder of other weights first."""
    from moe_train.checkpoint.threads import Crew
    from moe_train.hub.deepspeed_folder import is_deepspeed
    from moe_train.hub.fingerprint import inspect_folder
    from moe_train.hub.upcycle import UpcycleOptions

    options = UpcycleOptions(copies=experts, copies_per_token=top_k, granularity=granularity, noise=noise, seed=seed)

    def action() -> None:
        if dtype not in (None, "bf16", "fp32"):
            raise ConfigError(f"--dtype ({dtype}) must be bf16 or fp32")
        converts = upcycle or is_deepspeed(folder)
        if converts != (out is not None):
            what = "--upcycle" if upcycle else f"{folder}, a DeepSpeed checkpoint,"
            raise ConfigError(
                f"{what} needs OUT, the folder to write" if converts
                else f"OUT ({out}) is for --upcycle and DeepSpeed checkpoints, and {folder} is neither"
            )  # fmt: skip
        with _byte_bars() as report:
            crew = Crew(report=report)
            if out and upcycle:
                print(_write_upcycled(folder, out, options, dtype, crew))
            elif out:
                print(_write_deepspeed(folder, out, config, tag, dtype, crew))
            ready = out or folder
            found = inspect_folder(ready, crew)
        print(f"{ready}: {type(found.layout.model).__name__}, {found.fingerprint}")
        if found.ignored:
            print(f"fields of its config.json that transformers does not know, ignored: {', '.join(found.ignored)}")
        print(f"start from it with this in a recipe, in place of model_type or path:\n\nmodel:\n  weights: {ready}")

    guarded(action)


def _write_upcycled(folder: Path, out: Path, options: "UpcycleOptions", dtype: str | None, crew: "Crew") -> str:
    from moe_train.hub.upcycle import plan_upcycle, upcycle

    plan = plan_upcycle(folder, out, options, dtype)
    upcycle(plan, crew)
    made = plan.layout.model.config
    return (
        f"{folder} -> {out}: {plan.source} to {made.model_type}, {options.copies * options.granularity} experts, "
        f"top-{made.num_experts_per_tok}; upcycle.json in it says where each field comes from"
    )


def _write_deepspeed(
    folder: Path, out: Path, config: Path | None, tag: str | None, dtype: str | None, crew: "Crew"
) -> str:
    from moe_train.hub.deepspeed_folder import import_deepspeed, plan_deepspeed

    if config is None:
        raise ConfigError(f"{folder} is DeepSpeed's, which saves no configuration: give one with --config config.json")
    plan = plan_deepspeed(folder, out, config, tag, dtype)
    import_deepspeed(plan, crew)
    return f"{plan.source} -> {out}: weights of {plan.kind}; optimizer files are pickle and were not opened"


def main() -> None:
    app()
