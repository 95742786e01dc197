"""`moe-train`: one thin command per verb. Errors are one sentence and an exit code."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from moe_train.errors import MoeTrainError
from moe_train.parallel import Ranks

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
            count = count_parameters(run.recipe, run.model_config, run.plan, run.topology.expert_tensor)
            print(f"{path}: ok\n{describe(run, count)}\n", flush=True)

    guarded(action)


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
    world: Annotated[str, typer.Option(help="Numbers of processes, such as 1,2,4")] = "1,2,3,4",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every number here")] = None,
) -> None:
    """Prove that the layout does not change a recipe's numbers: a small model of its kind, against one process."""
    from moe_train.verify import certify, parse_worlds

    guarded(lambda: certify(recipes, overrides or (), worlds=parse_worlds(world), full=full, json_path=json_file))


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


def main() -> None:
    app()
