"""Parameters and FLOPs of a model, counted on the meta device."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from moe_train.config import Recipe
from moe_train.model.build import check_hash_layers, find_blocks, meta_model
from moe_train.model.held import held_by
from moe_train.model.profiles import num_experts_of
from moe_train.moe import SlotPlan
from moe_train.parallel import Topology


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """dense: everything but routed experts. experts: all of them. active: used by one token. embedding: input table.

    per_rank: held by each rank of an EP group below ZeRO-3: its share of the dense part, its experts, redundant copies
    and shared experts where they lie.
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


def count_parameters(recipe: Recipe, config: PretrainedConfig, plan: SlotPlan, topology: Topology) -> ParameterCount:
    """Counts of the whole model, without memory for it."""
    model = meta_model(recipe, config)
    blocks = find_blocks(model)
    check_hash_layers(recipe, len(blocks))
    experts = sum(p.numel() for block in blocks for p in block.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    one_expert = experts // num_experts_of(config)
    table = model.get_input_embeddings().weight
    embedding = 0 if config.tie_word_embeddings else table.numel()  # type: ignore[operator]
    held = [held_by(rank, model, recipe, plan, topology) for rank in topology.expert_groups()[0]]
    return ParameterCount(
        dense=total - experts,
        experts=experts,
        active=total - experts + one_expert * config.num_experts_per_tok,
        embedding=embedding,
        per_rank=tuple(one.num_dense + one.num_stored for one in held),
        num_moe_layers=len(blocks),
    )
