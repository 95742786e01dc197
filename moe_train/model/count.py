"""Parameters and FLOPs of a model, counted on the meta device."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from moe_train.config import Recipe
from moe_train.model.build import check_hash_layers, find_blocks, meta_model
from moe_train.model.profiles import num_experts_of, profile_of
from moe_train.moe import SlotPlan


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """dense: everything but routed experts. experts: all of them. active: used by one token. embedding: input table.

    per_rank: held by each rank of an EP group below ZeRO-3, redundant copies and shared experts where they lie; the
    dense part counts whole, though tensor parallelism cuts most of it.
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


def count_parameters(
    recipe: Recipe, config: PretrainedConfig, plan: SlotPlan, expert_tensor: int = 1
) -> ParameterCount:
    """Counts of the whole model, without memory for it."""
    model = meta_model(recipe, config)
    blocks = find_blocks(model)
    check_hash_layers(recipe, len(blocks))
    experts = sum(p.numel() for block in blocks for p in block.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    num_experts = num_experts_of(config)
    one_expert = experts // num_experts
    shared = 0
    if plan.shared_ranks:
        names = profile_of(config.model_type).names
        parts = [name for name in (names.shared_experts, names.shared_experts_gate) if name]
        found = [model.get_submodule(f"{block.name}.{part}") for block in blocks for part in parts]
        shared = sum(p.numel() for module in found for p in module.parameters())
    table = model.get_input_embeddings().weight
    embedding = 0 if config.tie_word_embeddings else table.numel()  # type: ignore[operator]
    return ParameterCount(
        dense=total - experts,
        experts=experts,
        active=total - experts + one_expert * config.num_experts_per_tok,
        embedding=embedding,
        per_rank=tuple(
            total - experts - (shared if rank >= plan.shared_ranks else 0) + one_expert * slots // expert_tensor
            for rank, slots in enumerate(plan.slots_per_rank)
        ),
        num_moe_layers=len(blocks),
    )
