"""Parameters and FLOPs of a model, counted on the meta device."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from moe_train.config import Recipe
from moe_train.model.build import find_blocks, meta_model
from moe_train.model.profiles import num_experts_of
from moe_train.moe import Placement


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """dense: everything but routed experts. experts: all of them. active: used by one token. embedding: input table.

    per_rank: held by each rank of an EP group below ZeRO-3.
    """

    dense: int
    experts: int
    active: int
    embedding: int
    per_rank: tuple[int, ...]
    num_moe_layers: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def count_parameters(recipe: Recipe, config: PretrainedConfig, expert_parallel: int) -> ParameterCount:
    """Counts of the whole model, without memory for it."""
    model = meta_model(recipe, config)
    blocks = find_blocks(model)
    experts = sum(p.numel() for block in blocks for p in block.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    num_experts = num_experts_of(config)
    one_expert = experts // num_experts
    placement = Placement(num_experts=num_experts, world_size=expert_parallel)
    table = model.get_input_embeddings().weight
    embedding = 0 if config.tie_word_embeddings else table.numel()  # type: ignore[operator]
    return ParameterCount(
        dense=total - experts,
        experts=experts,
        active=total - experts + one_expert * config.num_experts_per_tok,
        embedding=embedding,
        per_rank=tuple(total - experts + one_expert * count for count in placement.experts_per_rank),
        num_moe_layers=len(blocks),
    )
