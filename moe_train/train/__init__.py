"""The training run: resolve, assemble, loop, save."""

from moe_train.train.check import ResolvedRun, resolve_run
from moe_train.train.run import describe, run_recipes

__all__ = ["ResolvedRun", "describe", "resolve_run", "run_recipes"]
