"""Every MoE block of the installed transformers: wrapped it is the same, or it is refused."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers.models
from hf_blocks import call
from torch import nn

from moe_train.errors import ConfigError
from moe_train.moe.block import MoELayer
from moe_train.moe.config import MoEConfig, MoEFieldNames
from moe_train.verify.float64 import Float64

HIDDEN, VOCAB = 16, 31
FIELDS = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), 8),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 12),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
}
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
KNOWN = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "olmoe", "granitemoe", "jamba", "phimoe"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v4", "glm4_moe", "glm_moe_dsa", "kimi_linear", "ernie4_5_moe"),
    *("gpt_oss", "hunyuan_v1_moe", "nemotron_h", "aria"),
}
"""Families that must not be among the refused."""


def block_classes():
    for folder in sorted(Path(transformers.models.__file__).parent.iterdir()):
        source = folder / f"modeling_{folder.name}.py"
        if not source.is_file() or "self.experts =" not in source.read_text():
            continue
        modeling = importlib.import_module(f"transformers.models.{folder.name}.modeling_{folder.name}")
        for name, value in vars(modeling).items():
            if (
                not inspect.isclass(value)
                or value.__module__ != modeling.__name__
                or name.endswith(("Experts", "Model"))
            ):
                continue
            body = inspect.getsource(value)
            if "self.experts =" in body and "def forward" in body and not re.search(r"(Decoder|Text)Layer$", name):
                yield folder.name, value


def build(family: str, block_class: type) -> nn.Module | None:
    """A small block with random weights, by whichever configuration of the family fits."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    configs = [value for name, value in vars(module).items() if name.endswith("Config") and inspect.isclass(value)]
    configs = [value for value in configs if value.__module__ == module.__name__]
    parameters = list(inspect.signature(block_class).parameters.values())
    more = [0] * (sum(p.default is p.empty for p in parameters) - 1)
    for config_class in sorted(configs, key=lambda c: ("Text" not in c.__name__, len(c.__name__))):
        try:
            config = config_class()
            for name, value in FIELDS.items():
                if hasattr(config, name):
                    setattr(config, name, value)
            config._experts_implementation = "eager"
            block = block_class(config, *more)
        except Exception:  # noqa: BLE001 - another configuration of the family, or none, is for this block
            continue
        torch.manual_seed(0)
        for tensor in [*block.parameters(), *block.buffers()]:
            nn.init.normal_(tensor.data, std=0.4) if tensor.is_floating_point() else tensor.data.random_(0, 6)
        return block.double()
    return None


def names_of(block: nn.Module) -> MoEFieldNames:
    children = [name for name, _ in block.named_children()]
    return MoEFieldNames(
        gate="gate" if "gate" in children else "router",
        shared_experts=next((name for name in SHARED if name in children), None),
        shared_experts_gate="shared_expert_gate" if "shared_expert_gate" in children else None,
    )


@pytest.mark.slow
def test_equal_or_refused():
    equal, refused = set(), {}
    for family, block_class in block_classes():
        block = build(family, block_class)
        if block is None:
            continue
        x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
        ids = torch.randint(VOCAB, (2, 5))
        try:
            layer = MoELayer(MoEConfig(module_name=block_class.__name__, field_names=names_of(block)), block)
            with Float64():
                y = layer(x, ids)
        except (ConfigError, ValueError, TypeError) as error:
            refused[family] = str(error)
            continue
        with Float64(), torch.no_grad():
            expected = call(block, x.clone(), ids)
        error = float(((y[0] if isinstance(y, tuple) else y).detach() - expected).abs().max())
        assert error <= 1e-10 * float(expected.abs().max()), f"{family} {block_class.__name__}: {error:.1e}"
        equal.add(family)
    assert equal >= KNOWN, {family: refused.get(family) for family in KNOWN - equal}
    assert {"llama4", "longcat_flash", "openai_privacy_filter", "cohere2_moe", "axk1", "zaya", "inkling"} <= set(
        refused
    )
