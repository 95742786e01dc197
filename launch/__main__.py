"""What `deepspeed launch RECIPE...` (or torchrun) runs on every rank: arguments -> one call."""

import gc
import sys
from pathlib import Path
from typing import Annotated

gc.disable()  # looking for garbage again and again is a sixth of importing thousands of modules
# the launcher runs this folder as a script, so the repository itself is not on the path
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer  # noqa: E402

from moe_train.cli import Overrides, Recipes, guarded  # noqa: E402
from moe_train.parallel import Ranks  # noqa: E402


def main(
    recipes: Recipes,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Everything of a run; default runs/<recipe>-<time>")] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    """Run one or more recipes, in order."""
    from moe_train.train import run_recipes

    gc.freeze()  # they stay, and no later collection needs to look at them; one object in 60 is garbage, and stays too
    gc.enable()
    ranks = Ranks.from_environment()
    guarded(lambda: run_recipes(recipes, overrides or (), run_dir, ranks), ranks)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
