"""A checkpoint of any layout is exported as the stock model would be saved, and computes the same."""

import json

import pytest
import torch
from hub_runs import drawn, exported, recipe_of, save_drawn, stock_logits, tensors_of
from small_configs import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from moe_train.checkpoint import read_manifest
from moe_train.hub import FolderLayout
from moe_train.model import PROFILES
from moe_train.testing import run_distributed


def stock_of(config) -> torch.nn.Module:
    """The stock model with every weight drawn by its name."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stacked = FolderLayout(config).stacked
    state = {}
    for name, value in model.state_dict().items():
        if name in stacked:
            shape = tuple(value.shape[1:])
            state[name] = torch.stack([drawn(name, expert, shape) for expert in range(value.shape[0])])
        else:
            state[name] = drawn(name, None, tuple(value.shape))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_what_save_pretrained_writes_and_computes_the_same(family, tmp_path, corpus):
    recipe = recipe_of(corpus, family)
    (logits,) = run_distributed(save_drawn, 1, recipe, str(tmp_path / "run"))
    found = exported(tmp_path / "run", tmp_path / "out", shard_bytes=100_000)
    assert found.dtypes == ("F32",)
    assert (stock_logits(tmp_path / "out") - logits).abs().max() <= 1e-6 * logits.abs().max()

    stock = stock_of(AutoConfig.from_pretrained(tmp_path / "out"))
    stock.save_pretrained(tmp_path / "stock", max_shard_size=100_000)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "stock")
    assert_same_tensors(ours, theirs)
    assert found.tensors == len(theirs)
    experts = {name for name in ours if ".experts.0." in name}
    assert {name.rpartition(".0.")[2] for name in experts} == (
        {"w1.weight", "w2.weight", "w3.weight"}
        if family == "mixtral"
        else {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    )
    for name in ("config.json", "model.safetensors.index.json"):
        one, other = (json.loads((tmp_path / folder / name).read_text()) for folder in ("out", "stock"))
        published = PROFILES[family].published if name == "config.json" else {}
        assert {key: one.pop(key) for key in published} == published
        other = {key: value for key, value in other.items() if key not in published}
        for index in (one, other):  # tensors are in files of about this size, in another order
            index["weight_map"] = sorted(index.get("weight_map", ()))
        assert one == other
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


LAYOUTS = {
    "EP 2, ZeRO-1": (2, "qwen3_moe", {"parallel": {"expert": 2}, "zero": {"stage": 1}}),
    "ZeRO-3": (2, "qwen3_moe", {"parallel": {"expert": 1}, "zero": {"stage": 3}}),
    "EP 4 of 6, ZeRO-2": (4, "qwen3_moe", {"parallel": {"expert": 4}, "zero": {"stage": 2}}),
    "redundant": (2, "qwen3_moe", {"parallel": {"expert": 2, "redundant_experts": 4}, "zero": {"stage": 3}}),
    "TP 2": (2, "qwen3_moe", {"parallel": {"tensor": 2, "expert": 1}, "zero": {"stage": 0}}),
    "expert TP 2": (2, "qwen3_moe", {"parallel": {"expert_tensor": 2, "expert": 1}, "zero": {"stage": 1}}),
    "shared rank": (4, "deepseek_v3", {"parallel": {"expert": 4, "shared_expert_ranks": 1, "redundant_experts": 1}}),
    "TP 2, split shared": (
        2,
        "deepseek_v3",
        {"parallel": {"tensor": 2, "expert": 2, "shared_expert_tensor": True}, "zero": {"stage": 3}},
    ),
}


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    """family -> fingerprint of one process's export."""
    found = {}
    for family in ("qwen3_moe", "deepseek_v3"):
        folder = tmp_path_factory.mktemp(family)
        recipe = recipe_of(corpus, family, zero={"stage": 0})
        run_distributed(save_drawn, 1, recipe, str(folder / "run"))
        found[family] = exported(folder / "run", folder / "out")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_the_same_bytes(layout, tmp_path, corpus, one_process):
    world, family, sections = LAYOUTS[layout]
    run_distributed(save_drawn, world, recipe_of(corpus, family, **sections), str(tmp_path / "run"))
    found = exported(tmp_path / "run", tmp_path / "out", shard_bytes=50_000)
    expected = one_process[family]
    assert found.digests == expected.digests
    assert found.sha256 == expected.sha256


def test_bf16(tmp_path, corpus):
    """Training's own rounding of its float32 weights; what the family keeps in float32 stays so."""
    recipe = recipe_of(corpus, "deepseek_v3", precision={"compute": "bf16"}, zero={"stage": 1})
    (logits,) = run_distributed(save_drawn, 1, recipe, str(tmp_path / "run"))
    exported(tmp_path / "run", tmp_path / "wide", dtype="fp32")
    assert exported(tmp_path / "run", tmp_path / "out").dtypes == ("BF16", "F32")
    expected = {
        name: value if name.endswith("e_score_correction_bias") else value.bfloat16()
        for name, value in tensors_of(tmp_path / "wide").items()
    }
    assert_same_tensors(tensors_of(tmp_path / "out"), expected)
    loaded = stock_logits(tmp_path / "out")
    assert (loaded - logits).abs().max() < 0.02 * logits.abs().max()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), expected)


def test_tied_embeddings_are_written_once(tmp_path, corpus):
    recipe = recipe_of(corpus, "qwen3_moe", fields={"tie_word_embeddings": True})
    (logits,) = run_distributed(save_drawn, 1, recipe, str(tmp_path / "run"))
    exported(tmp_path / "run", tmp_path / "out")
    stock_of(AutoConfig.from_pretrained(tmp_path / "out")).save_pretrained(tmp_path / "stock")
    ours = tensors_of(tmp_path / "out")
    assert "lm_head.weight" not in ours
    assert_same_tensors(ours, tensors_of(tmp_path / "stock"))
    assert (stock_logits(tmp_path / "out") - logits).abs().max() <= 1e-6 * logits.abs().max()


def test_generation_stops_where_documents_end(tmp_path, corpus):
    recipe = recipe_of(corpus, "mixtral")  # whose own defaults, 1 and 2, are bytes here
    run_distributed(save_drawn, 1, recipe, str(tmp_path / "run"))
    exported(tmp_path / "run", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 256
    assert model.generation_config.bos_token_id is None
    assert model.config.use_cache
    assert model.config.dtype == torch.float32


def test_an_older_checkpoint_takes_its_configuration_from_its_recipe(tmp_path, corpus):
    run_distributed(save_drawn, 1, recipe_of(corpus), str(tmp_path / "run"))
    new = exported(tmp_path / "run", tmp_path / "new")
    step = tmp_path / "run" / "checkpoints" / "step_00000000"
    manifest = read_manifest(step)
    assert manifest.state.pop("model_config")["hidden_size"] == 32
    (step / "manifest.json").write_text(manifest.to_json())
    assert exported(step, tmp_path / "old").sha256 == new.sha256
    new_config, old_config = ((tmp_path / name / "config.json").read_text() for name in ("new", "old"))
    assert new_config == old_config
