"""`moe.force_load` -> what share of the rows each expert gets."""

import json
from pathlib import Path

from transformers import PretrainedConfig

from moe_train.config import Recipe
from moe_train.errors import ConfigError, RoutingError
from moe_train.model.profiles import num_experts_of
from moe_train.moe import expert_shares


def forced_shares(recipe: Recipe, config: PretrainedConfig) -> tuple[float, ...] | None:
    """By expert, the first one most for a Zipf load; None: all alike, or nothing is forced.

    Raises `ConfigError` for a histogram that does not fit the model.
    """
    load = recipe.moe.force_load
    if load is None or load.balanced:
        return None
    experts, top_k = num_experts_of(config), config.num_experts_per_tok
    if load.zipf is not None:
        return expert_shares([(1 + rank) ** -load.zipf for rank in range(experts)], top_k)
    assert load.histogram is not None
    try:
        return expert_shares(_histogram(Path(load.histogram), experts), top_k)
    except RoutingError as error:
        raise ConfigError(f"moe.force_load.histogram ({load.histogram}): {error}") from None


def _histogram(path: Path, experts: int) -> list[float]:
    start = f"moe.force_load.histogram ({path})"
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"{start} cannot be read ({reason}): it is a JSON list of one number per expert") from None
    numbers = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < float("inf") for w in weights)
    if not numbers:
        raise ConfigError(f"{start} must be a JSON list of numbers of at least 0, one per expert")
    if len(weights) != experts:
        raise ConfigError(
            f"{start} has {len(weights)} numbers, and the model has {experts} experts: give one number per expert"
        )
    return weights
