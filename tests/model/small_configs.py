"""Small members of every supported family."""

import torch

from moe_train.config import Recipe, parse_recipe
from moe_train.model import build_model
from moe_train.moe import ResidentExperts
from moe_train.parallel import Topology, build_groups
from moe_train.train.check import ResolvedRun

ALONE = Topology(world=1, expert=1)
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}

FAMILIES: dict[str, dict] = {
    "mixtral": COMMON | {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": COMMON
    | {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "norm_topk_prob": True},
    "qwen2_moe": COMMON
    | {
        "moe_intermediate_size": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
    },
    "olmoe": COMMON | {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3},
    "deepseek_v3": COMMON
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def small_recipe(family: str, **sections) -> Recipe:
    tree = {
        "model": {"model_type": family, "config": FAMILIES[family]},
        "precision": {"compute": "fp32"},
        "optimizer": {"lr": 0.01, "grad_clip": 0.1},
        "data": {"corpora": [{"prefix": "unused"}], "sequence_length": 16},
        "batch": {"global_size": 8, "micro_size": 2},
        "train": {"steps": 10},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return parse_recipe(tree)


class Resident:
    """A `Keeper` for one process: all experts, stacked, as leaves in `held` by Hugging Face name."""

    def __init__(self):
        self.held: dict[str, torch.Tensor] = {}

    def experts(self, block, draw, plan):
        drawn = [draw(expert=e) for e in range(plan.num_experts)]
        stacked = {k: torch.stack([d[k] for d in drawn]).requires_grad_() for k in drawn[0]}
        self.held |= {f"{block.experts_name}.{k}": v for k, v in stacked.items()}
        return ResidentExperts(stacked["gate_up_proj"], stacked["down_proj"])

    def shared(self, block, draw):
        raise AssertionError("one process keeps its shared experts in the model")


def build_alone(recipe):
    """(built model on one process, its experts by name)."""
    run = ResolvedRun.at(recipe, ALONE)
    keeper = Resident()
    groups = build_groups(ALONE)
    built = build_model(recipe, run.model_config, groups, run.plan, torch.device("cpu"), keeper)
    return built, keeper.held
