"""Recipe -> frozen configuration. Nothing here imports torch."""

from moe_train.config.batch import accumulation_steps
from moe_train.config.load import dump_recipe, load_recipe, parse_recipe
from moe_train.config.schema import Recipe

__all__ = ["Recipe", "accumulation_steps", "dump_recipe", "load_recipe", "parse_recipe"]
