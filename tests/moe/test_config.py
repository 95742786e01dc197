"""Which modules are MoE blocks, what their parts are called, and which settings do not fit each other."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moe_train.errors import ConfigError, RoutingError
from moe_train.moe.config import MoEConfig, MoEFieldNames, Scoring, find_modules
from moe_train.moe.wrapper import LAYOUTS

SMALL = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 4, "mlp_only_layers": [0, 2], "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 4},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 4},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 4},
}


def model(family):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **FAMILIES[family]))


QWEN3 = MoEConfig(module_name="Qwen3MoeSparseMoeBlock")


def block(family="qwen3_moe"):
    return model(family).model.layers[1].mlp


# --------------------------------------------------------------------------------------------------------- defaults


def test_names_and_defaults():
    names = {entry.name: entry.default for entry in dataclasses.fields(MoEFieldNames)}
    assert names == {
        "gate": "gate",
        "experts": "experts",
        "shared_experts": "shared_experts",
        "shared_experts_gate": "shared_experts_gate",
        "top_k": "top_k",
        "norm_topk_prob": "norm_topk_prob",
        "bias": None,
        "scale": None,
    }
    config = MoEConfig(module_name="Block")
    assert config.field_names == MoEFieldNames()
    assert config.num_experts_key == "num_experts"
    off = [entry.name for entry in dataclasses.fields(config) if entry.type is bool]
    assert len(off) == 6
    assert not any(getattr(config, name) for name in off)
    unset = ("fused_moe_cls", "scoring", "gate_router", "expert_layout")
    assert all(getattr(config, name) is None for name in unset)
    assert {*off, *unset, "module_name", "field_names", "num_experts_key"} == {
        entry.name for entry in dataclasses.fields(config)
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.module_name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.field_names.gate = "other"
    with pytest.raises(TypeError, match="module_name"):
        MoEConfig()


# ---------------------------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        ("Qwen3MoeSparseMoeBlock", [1, 3]),
        ("model.layers.*.mlp", [0, 1, 2, 3]),
        ("model.layers.[13].mlp", [1, 3]),
        ("model.layers.3.mlp", [3]),
        ("*.*.1.mlp", [1]),
    ],
)
def test_blocks_by_class_or_pattern(wanted, layers):
    whole = model("qwen3_moe")
    found = find_modules(whole, MoEConfig(module_name=wanted))
    assert [name for name, _ in found] == [f"model.layers.{layer}.mlp" for layer in layers]
    assert all(module is whole.get_submodule(name) for name, module in found)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("MixtralSparseMoeBlock", "no module is of this class in Qwen3MoeForCausalLM; candidates: Qwen3MoeSparseMoeB"),
        ("Qwen3MoeMPL", "Qwen3MoeSparseMoeBlock, Qwen3MoeMLP"),
        ("layers.*.mlp", "no name of a module matches.*candidates: model.layers.1.mlp, model.layers.3.mlp"),
        ("model.*.mlp", "candidates: model.layers.1.mlp, model.layers.3.mlp"),
    ],
)
def test_no_block_lists_candidates(wanted, said):
    config = MoEConfig(module_name=wanted)
    with pytest.raises(ConfigError, match=said) as error:
        find_modules(model("qwen3_moe"), config)
    assert f"MoEConfig.module_name ({wanted})" in str(error.value)


def test_a_star_is_one_part_of_a_name():
    assert [name for name, _ in find_modules(model("qwen3_moe"), MoEConfig(module_name="*"))] == ["model", "lm_head"]


def test_a_model_without_experts():
    with pytest.raises(ConfigError, match="none, as no module has experts"):
        find_modules(nn.Sequential(nn.Linear(2, 2)), QWEN3)


# ----------------------------------------------------------------------------------------------------------- fields


def named(**names):
    return MoEConfig(module_name="Block", field_names=MoEFieldNames(**names))


def test_fields_by_the_family_s_names():
    qwen2 = block("qwen2_moe")
    names = named(shared_experts="shared_expert", shared_experts_gate="shared_expert_gate")
    assert names.field(qwen2, "shared_experts") is qwen2.shared_expert
    assert names.field(qwen2, "shared_experts_gate") is qwen2.shared_expert_gate
    assert names.required(qwen2, "gate") is qwen2.gate
    assert names.required(qwen2, "experts") is qwen2.experts
    assert named().field(qwen2, "shared_experts", "absent") == "absent"
    deep = named(shared_experts="shared_expert.up_proj")
    assert deep.field(qwen2, "shared_experts") is qwen2.shared_expert.up_proj


def test_none_means_absent():
    module = block("mixtral")
    module.shared_experts = nn.Linear(2, 2)
    assert named().field(module, "shared_experts") is module.shared_experts
    assert named(shared_experts=None).field(module, "shared_experts", 7) == 7
    module.shared_experts = None
    assert named().field(module, "shared_experts", 7) == 7
    assert named().field(module, "never_heard_of", 7) == 7
    assert named().field(None, "gate", 7) == 7


@pytest.mark.parametrize(
    ("names", "part", "said"),
    [
        ({"gate": "gat"}, "gate", r"MoEFieldNames.gate \(gat\): Qwen3MoeSparseMoeBlock has no such part"),
        ({"gate": "gat"}, "gate", "candidates: experts, gate; did you mean gate"),
        ({"experts": "expert"}, "experts", "did you mean experts"),
        ({"gate": "router"}, "gate", "candidates: experts, gate"),
        ({"experts": "gate.experts"}, "experts", "did you mean experts"),
    ],
)
def test_a_required_part_that_is_misspelt(names, part, said):
    with pytest.raises(ConfigError, match=said):
        named(**names).required(block(), part)


def test_a_required_part_of_nothing():
    with pytest.raises(ConfigError, match="it has nothing like it"):
        named().required(nn.Identity(), "gate")


def test_top_k_and_normalisation_of_the_block_or_its_gate():
    module = block()
    assert not hasattr(module, "top_k")
    assert (named().top_k(module), named().norm_topk_prob(module)) == (3, module.gate.norm_topk_prob)
    module.top_k, module.norm_topk_prob = 2, False
    assert (named().top_k(module), named().norm_topk_prob(module)) == (2, False)
    module.gate.norm_topk_prob = True
    assert named().norm_topk_prob(module) is False, "False is said, not missing"
    module.k = 1
    assert named(top_k="k").top_k(module) == 1
    assert named(top_k="gate.top_k").top_k(module) == 3
    module.gate.routed_scaling_factor = 2.5
    assert named().scale(module) is None
    with pytest.raises(ConfigError, match="scale"):
        named(scale="routed_scaling_factor")
    scoring = Scoring(score="softmax")
    scaled = MoEConfig(module_name="B", scoring=scoring, field_names=MoEFieldNames(scale="routed_scaling_factor"))
    assert scaled.scale(module) == 2.5
    del module.gate.routed_scaling_factor
    with pytest.raises(ConfigError, match="neither Qwen3MoeSparseMoeBlock nor its gate"):
        scaled.scale(module)


@pytest.mark.parametrize("value", [None, 0, "2", 2.0, True])
def test_top_k_that_nobody_says(value):
    module = block()
    module.gate.top_k = value
    said = rf"Missing required parameter 'top_k': `top_k` is {value} on Qwen3MoeSparseMoeBlock and its gate \(Qwen3Mo"
    with pytest.raises(ValueError, match=said):
        named().top_k(module)
    with pytest.raises(ValueError, match="set MoEFieldNames"):
        named(top_k="k").top_k(block())
    with pytest.raises(ValueError, match="`None` is None"):
        named(top_k=None).top_k(block())
    assert named(norm_topk_prob=None).norm_topk_prob(block()) is None


def test_parts_that_nobody_claims():
    """Whoever replaces the block would lose them."""
    qwen2 = block("qwen2_moe")
    assert named().unclaimed(qwen2) == ["shared_expert", "shared_expert_gate"]
    assert named(shared_experts="shared_expert", shared_experts_gate="shared_expert_gate").unclaimed(qwen2) == []
    assert named().unclaimed(block()) == []
    granite = model("granitemoe").model.layers[0].block_sparse_moe
    assert named(gate="router").unclaimed(granite) == []
    qwen2.free = nn.Parameter(torch.zeros(2))
    qwen2.activation = nn.SiLU()
    assert named().unclaimed(qwen2) == ["shared_expert", "shared_expert_gate", "free"]
    deep = named(gate="gate.inner", shared_experts="shared_expert.up_proj", shared_experts_gate=None)
    assert deep.unclaimed(qwen2) == ["shared_expert_gate", "free"]


# ------------------------------------------------------------------------------------------------ number of experts


class Settings:
    def __init__(self, **values):
        vars(self).update(values)


def with_key(key):
    return MoEConfig(module_name="Block", num_experts_key=key)


@pytest.mark.parametrize(
    "key", ["text_config.num_experts", ["text_config", "num_experts"], ("text_config", "num_experts")]
)
def test_the_number_of_experts_along_a_path(key):
    assert with_key(key).num_experts(Settings(text_config=Settings(num_experts=8))) == 8
    assert with_key(key).num_experts(Settings(text_config={"num_experts": 8})) == 8
    assert hash(with_key(key)) == hash(with_key(key))


def test_the_number_of_experts_of_a_family():
    config = AutoConfig.for_model("mixtral", num_local_experts=5)
    assert with_key("num_local_experts").num_experts(config) == 5
    with pytest.raises(ConfigError, match=r"num_experts_key \(num_expert\): MixtralConfig.*num_local_experts"):
        with_key("num_expert").num_experts(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Settings(experts_per_token=2), "Settings has no `num_experts`; candidates: experts_per_token"),
        (Settings(hidden=2), "it has nothing like it"),
        (Settings(num_experts="8"), "leads to '8'"),
        (Settings(num_experts=0), "leads to 0"),
        (Settings(num_experts=True), "leads to True"),
        (Settings(num_experts=[4, 8]), r"leads to \[4, 8\]"),
    ],
)
def test_a_number_of_experts_that_is_none(config, said):
    with pytest.raises(ConfigError, match=said):
        with_key("num_experts").num_experts(config)


# ----------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"enable_shared_expert_tp": True, "enable_external_shared_experts": True}, "takes them from: set one of them"),
        (
            {"enable_shared_expert_tp": True, "field_names": MoEFieldNames(shared_experts=None)},
            r"enable_shared_expert_tp \(True\) needs shared experts",
        ),
        (
            {"enable_external_shared_experts": True, "field_names": MoEFieldNames(shared_experts=None)},
            r"enable_external_shared_experts \(True\) needs shared experts",
        ),
        ({"gate_returns_raw_logits": True}, r"gate_returns_raw_logits \(True\) needs a scoring"),
        ({"gate_router": print, "scoring": Scoring(score="softmax")}, "scoring would never be used"),
        ({"gate_router_gives_logits": True}, "needs a gate_router"),
        ({"field_names": MoEFieldNames(bias="bias")}, r"MoEFieldNames.bias \(bias\) is read for a scoring only"),
        ({"field_names": MoEFieldNames(scale="factor")}, r"MoEFieldNames.scale \(factor\) is read for a scoring only"),
        (
            {"field_names": MoEFieldNames(scale="factor"), "scoring": Scoring(score="softmax", scale=2.0)},
            r"MoEFieldNames.scale \(factor\) and Scoring.scale \(2.0\) both say",
        ),
        ({"host_external_shared_experts": True}, "which rank a simulator stands on.*enable_external_shared_experts"),
        ({"module_name": ""}, r"module_name \(''\)"),
        ({"module_name": "layers..mlp"}, "module_name"),
        ({"module_name": nn.Linear}, "module_name"),
        ({"module_name": None}, r"module_name \(None\)"),
        ({"fused_moe_cls": 3}, r"fused_moe_cls \(3\) must be a class, a registered name or None"),
        ({"field_names": {"gate": "gate"}}, "field_names .* must be MoEFieldNames"),
        ({"field_names": None}, r"field_names \(None\)"),
        ({"scoring": "softmax"}, r"scoring \('softmax'\)"),
        ({"gate_router": "softmax"}, r"gate_router \('softmax'\) must be a function"),
        ({"expert_layout": "L0"}, r"expert_layout \('L0'\)"),
        ({"enable_redundant_experts": 1}, r"enable_redundant_experts \(1\) must be True or False"),
        ({"route_after_dp_transform": "yes"}, r"route_after_dp_transform \('yes'\)"),
        ({"num_experts_key": ""}, r"num_experts_key \(''\)"),
        ({"num_experts_key": []}, "num_experts_key"),
        ({"num_experts_key": ["text_config", 3]}, "num_experts_key"),
        ({"num_experts_key": 3}, r"num_experts_key \(3\)"),
        ({"num_experts_key": None}, r"num_experts_key \(None\)"),
    ],
)
def test_settings_that_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        MoEConfig(**{"module_name": "Block", **fields})


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as error:
        MoEConfig(module_name="", gate_returns_raw_logits=True, enable_redundant_experts=None)
    assert len(str(error.value).splitlines()) == 3


def test_settings_that_fit():
    scoring = Scoring(score="sigmoid")
    for fields in (
        {"enable_shared_expert_tp": True, "enable_redundant_experts": True, "route_after_dp_transform": True},
        {"enable_external_shared_experts": True, "enable_redundant_experts": True},
        {"gate_returns_raw_logits": True, "scoring": scoring, "field_names": MoEFieldNames(bias="b", scale="s")},
        {"gate_returns_raw_logits": True, "gate_router": print},
        {"fused_moe_cls": "grouped", "expert_layout": LAYOUTS["L0*"]},
        {"fused_moe_cls": nn.Linear, "host_external_shared_experts": False},
        {"field_names": MoEFieldNames(shared_experts=None)},
    ):
        config = MoEConfig(module_name="Block", **fields)
        assert dataclasses.replace(config) == config


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"gate": None}, r"MoEFieldNames.gate \(None\): every block has one"),
        ({"experts": None}, r"MoEFieldNames.experts \(None\)"),
        ({"gate": ""}, "must name an attribute"),
        ({"shared_experts": "a..b"}, "must name an attribute"),
        ({"top_k": 2}, r"top_k \(2\) must name an attribute"),
    ],
)
def test_names_that_are_refused(names, said):
    with pytest.raises(ConfigError, match=said):
        MoEFieldNames(**names)


def test_a_scoring_is_checked_when_it_is_written():
    with pytest.raises(RoutingError, match=r"score \(softmx\)"):
        Scoring(score="softmx")
    with pytest.raises(RoutingError, match=r"topk_group \(5\)"):
        Scoring(score="sigmoid", num_groups=4, topk_groups=5)
    with pytest.raises(ValueError, match="set Scoring"):
        Scoring(score="sigmoid").spec(8, 2, None)
    assert Scoring(score="softmax_after_topk").spec(8, 2, None).normalize is False
    assert Scoring(score="sigmoid", normalize=False).spec(8, 2, True).normalize is False
