"""`python launch/reshard.py SRC DST ...`: what `moe-train reshard` does, without an installation."""

import sys
from pathlib import Path

# run as a script, only this folder is on the path
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer  # noqa: E402

from moe_train.cli import reshard  # noqa: E402

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reshard)
    app()
