"""Small MoE blocks: Hugging Face's own with random weights, and one as remote code writes them (a list of experts)."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig

from moe_train.moe.config import MoEConfig, MoEFieldNames, Scoring

HIDDEN, INNER, EXPERTS, TOP_K, VOCAB = 8, 8, 6, 2, 29
DEEPSEEK = {
    "n_routed_experts": 8,
    "moe_intermediate_size": INNER,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
QWEN_SHARED = {"shared_experts": "shared_expert", "shared_experts_gate": "shared_expert_gate"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """module: of transformers.models. fields: of the configuration. names, config: of MoEFieldNames and MoEConfig."""

    module: str
    block: str
    fields: dict[str, Any]
    names: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""

    def make(self) -> nn.Module:
        config = AutoConfig.for_model(
            self.model_type or self.module,
            **{"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "vocab_size": VOCAB, **self.fields},
        )
        config._experts_implementation = "eager"
        modeling = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        block_class = getattr(modeling, self.block)
        return (
            block_class(config, 0) if "layer_idx" in block_class.__init__.__code__.co_varnames else block_class(config)
        )


FAMILIES = {
    "mixtral": Family(
        module="mixtral",
        block="MixtralSparseMoeBlock",
        fields={"num_local_experts": EXPERTS, "intermediate_size": INNER},
    ),
    "qwen3_moe": Family(
        module="qwen3_moe",
        block="Qwen3MoeSparseMoeBlock",
        fields={"num_experts": EXPERTS, "moe_intermediate_size": INNER, "norm_topk_prob": True},
    ),
    "qwen2_moe": Family(
        module="qwen2_moe",
        block="Qwen2MoeSparseMoeBlock",
        fields={"num_experts": EXPERTS, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": 12},
        names=QWEN_SHARED,
    ),
    "deepseek_v3": Family(module="deepseek_v3", block="DeepseekV3MoE", fields=DEEPSEEK),
    "glm4_moe": Family(module="glm4_moe", block="Glm4MoeMoE", fields={**DEEPSEEK, "norm_topk_prob": False}),
    "gpt_oss": Family(
        module="gpt_oss",
        block="GptOssMLP",
        fields={"num_local_experts": EXPERTS, "intermediate_size": INNER},
        names={"gate": "router"},
    ),
    "aria": Family(
        module="aria",
        block="AriaTextMoELayer",
        model_type="aria_text",
        fields={
            "moe_num_experts": EXPERTS,
            "moe_topk": TOP_K,
            "intermediate_size": INNER,
            "moe_num_shared_experts": 2,
            "num_attention_heads": 2,
        },
        names={"gate": "router"},
    ),
    "nemotron_h": Family(
        module="nemotron_h",
        block="NemotronHMoE",
        fields={
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 12,
        },
    ),
    "deepseek_v4": Family(
        module="deepseek_v4",
        block="DeepseekV4SparseMoeBlock",
        fields={
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "mlp_layer_types": ["moe"],
            "num_hidden_layers": 1,
        },
    ),
    "deepseek_v4 hash": Family(
        module="deepseek_v4",
        block="DeepseekV4SparseMoeBlock",
        fields={
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "mlp_layer_types": ["hash_moe"],
            "num_hidden_layers": 1,
        },
    ),
    "minimax_m3_vl": Family(
        module="minimax_m3_vl",
        block="MiniMaxM3VLSparseMoeBlock",
        model_type="minimax_m3_vl_text",
        fields={"num_local_experts": EXPERTS, "intermediate_size": INNER, "routed_scaling_factor": 2.5},
        names={"bias": "e_score_correction_bias", "scale": "routed_scaling_factor"},
        config={
            "gate_returns_raw_logits": True,
            "scoring": Scoring(score="sigmoid", normalize=True, eps=1e-20),
        },
    ),
}


class GatedMLP(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(nn.Module):
    """Remote code's way: a Linear gate that gives logits, a list of experts, shared experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(GatedMLP(INNER) for _ in range(EXPERTS))
        self.shared_experts = GatedMLP(12)
        self.top_k, self.norm_topk_prob = TOP_K, True

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, HIDDEN)
        weights, ids = self.gate(x).softmax(dim=-1).topk(self.top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        routed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            routed = routed + (weights * (ids == number)).sum(dim=1, keepdim=True) * expert(x)
        return routed.view(hidden_states.shape) + self.shared_experts(hidden_states)


def make_block(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights whenever it is called; far enough from zero for clamps, biases and gates to matter."""
    block = ListBlock() if family == "list" else FAMILIES[family].make()
    generator = torch.Generator().manual_seed(11)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        with torch.no_grad():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.rand(VOCAB, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K])
            elif tensor.is_floating_point():
                scale = 0.2 if "bias" in name else 0.6
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return block.to(dtype)


def make_config(family: str, **options: Any) -> MoEConfig:
    if family == "list":
        scoring = {"gate_returns_raw_logits": True, "scoring": Scoring(score="softmax")}
        return MoEConfig(module_name="ListBlock", **scoring, **options)
    entry = FAMILIES[family]
    return MoEConfig(module_name=entry.block, field_names=MoEFieldNames(**entry.names), **entry.config, **options)


def call(block: nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of a block of Hugging Face."""
    takes_ids = "input_ids" in type(block).forward.__code__.co_varnames
    y = block(x, input_ids=ids) if takes_ids else block(x)
    return y[0] if isinstance(y, tuple) else y


def tokens(*leading: int, dtype: torch.dtype = torch.float64):
    """Hidden states [..., H], ids [...], gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(*leading, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, torch.randint(VOCAB, leading, generator=generator), dy


def routed(x: torch.Tensor):
    """Some choice of two experts per token, and weights."""
    ids = torch.stack([torch.arange(x[..., 0].numel()) % EXPERTS, torch.arange(x[..., 0].numel()) // 2 % EXPERTS], 1)
    return ids, torch.linspace(0.1, 2, ids.numel(), dtype=torch.float64).view(ids.shape)
