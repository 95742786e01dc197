"""Runs start from a folder's weights at any layout, to the bit, and go on from their own checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_runs import exported, recipe_of, save_as_started, save_drawn, stock_logits, tensors_of
from safetensors.torch import save_file
from small_configs import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from moe_train.checkpoint import CheckpointReader, Piece
from moe_train.cli import app
from moe_train.config import parse_recipe
from moe_train.config.schema import ModelSection
from moe_train.errors import ConfigError
from moe_train.hub import FolderLayout, HubReader
from moe_train.hub.fingerprint import Fingerprint, fingerprint
from moe_train.model.family import section_config
from moe_train.testing import run_distributed
from moe_train.verify.shrink import shrink


def weights_recipe(corpus: Path, folder: Path, **sections) -> dict:
    recipe = recipe_of(corpus, **sections)
    recipe["model"] = {"weights": str(folder)}
    return recipe


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """family -> (folder of its weights, its fingerprint, logits of the training model)."""
    found: dict[str, tuple[Path, Fingerprint, torch.Tensor]] = {}

    def of(family: str) -> tuple[Path, Fingerprint, torch.Tensor]:
        if family not in found:
            place = tmp_path_factory.mktemp(family)
            recipe = recipe_of(corpus, family, zero={"stage": 0})
            (logits,) = run_distributed(save_drawn, 1, recipe, str(place / "run"))
            found[family] = place / "out", exported(place / "run", place / "out", shard_bytes=60_000), logits
        return found[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_export_import_export_is_exact(family, tmp_path, corpus, folders):
    folder, before, logits = folders(family)
    recipe = weights_recipe(corpus, folder, zero={"stage": 1})
    started, _ = run_distributed(save_as_started, 1, recipe, str(tmp_path / "run"))[0]
    assert torch.equal(started, logits)
    again = exported(tmp_path / "run", tmp_path / "out", shard_bytes=60_000)
    assert (again.sha256, again.tensors, again.nbytes) == (before.sha256, before.tensors, before.nbytes)
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


LAYOUTS = {
    "EP 2, ZeRO-1": (2, "deepseek_v3", {"parallel": {"expert": 2}, "zero": {"stage": 1}}),
    "ZeRO-3": (2, "deepseek_v3", {"parallel": {"expert": 1}, "zero": {"stage": 3}}),
    "EP 4 of 6, redundant": (4, "qwen3_moe", {"parallel": {"expert": 4, "redundant_experts": 4}, "zero": {"stage": 2}}),
    "TP 2, expert TP 2": (2, "mixtral", {"parallel": {"tensor": 2, "expert_tensor": 2, "expert": 1}}),
    "shared rank": (4, "deepseek_v3", {"parallel": {"expert": 4, "shared_expert_ranks": 1, "redundant_experts": 1}}),
    "TP 2, split shared": (2, "qwen2_moe", {"parallel": {"tensor": 2, "expert": 2, "shared_expert_tensor": True}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_same_weights(layout, tmp_path, corpus, folders):
    world, family, sections = LAYOUTS[layout]
    folder, before, logits = folders(family)
    recipe = weights_recipe(corpus, folder, **sections)
    for started, _ in run_distributed(save_as_started, world, recipe, str(tmp_path / "run")):
        assert (started - logits).abs().max() < 1e-5 * logits.abs().max()  # what forward uses, on every rank
    assert exported(tmp_path / "run", tmp_path / "out").sha256 == before.sha256


def test_each_rank_reads_only_what_it_holds(tmp_path, corpus, folders):
    folder, _, _ = folders("qwen3_moe")
    total = sum(value.nbytes for value in tensors_of(folder).values())
    experts = sum(value.nbytes for name, value in tensors_of(folder).items() if ".experts." in name)
    recipe = weights_recipe(corpus, folder, parallel={"expert": 2}, zero={"stage": 3})
    read = run_distributed(bytes_read, 2, recipe, str(tmp_path / "run"))
    assert sum(read) == total  # what is sharded is read once, over all ranks
    assert experts / total > 0.5
    assert max(read) < 0.55 * total


def bytes_read(rank: int, recipe: dict, run_dir: str) -> int:
    from moe_train.hub.folder import Entry

    read, sizes = Entry.read, []

    def counted(self, start, out):
        sizes.append(len(out))
        read(self, start, out)

    Entry.read = counted
    try:
        save_as_started(rank, recipe, run_dir)
    finally:
        Entry.read = read
    return sum(sizes)


def test_training_from_weights_equals_training_from_the_same_weights_drawn(tmp_path, corpus):
    """Fresh moments and step counts; then its own checkpoint is resumed, and not the folder."""
    drawn = recipe_of(corpus, "qwen3_moe")
    _, expected = run_distributed(save_as_started, 2, drawn, str(tmp_path / "drawn"), 4)[0]
    run_distributed(save_as_started, 1, drawn, str(tmp_path / "start"))
    exported(tmp_path / "start", tmp_path / "folder")
    recipe = weights_recipe(corpus, tmp_path / "folder")
    _, first = run_distributed(save_as_started, 2, recipe, str(tmp_path / "run"), 2)[0]
    _, rest = run_distributed(save_as_started, 2, recipe, str(tmp_path / "run"), 4)[0]
    assert sorted(rest) == [3, 4]
    assert {**first, **rest} == expected


def test_bf16_weights_come_back_as_they_were(tmp_path, corpus, folders):
    folder, _, _ = folders("deepseek_v3")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    recipe = weights_recipe(corpus, tmp_path / "half", precision={"compute": "bf16"}, zero={"stage": 1})
    run_distributed(save_as_started, 1, recipe, str(tmp_path / "run"))
    assert exported(tmp_path / "run", tmp_path / "out").digests == fingerprint(tmp_path / "half").digests


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_folder_written_as_the_model_is_held(family, tmp_path, corpus, folders):
    """Stacked experts under the names of the model, which transformers writes and reads too."""
    folder, before, logits = folders(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(tmp_path / "stacked"))
    assert torch.equal(stock_logits(tmp_path / "stacked"), stock_logits(folder))
    recipe = weights_recipe(corpus, tmp_path / "stacked", parallel={"expert": 2}, zero={"stage": 2})
    started, _ = run_distributed(save_as_started, 2, recipe, str(tmp_path / "run"))[0]
    assert (started - logits).abs().max() < 1e-5 * logits.abs().max()
    assert exported(tmp_path / "run", tmp_path / "out").sha256 == before.sha256


def test_what_no_model_reads_is_passed_over(tmp_path, corpus, folders):
    """Buffers of old folders, and the layer that DeepSeek-V3's own folder has and transformers ignores."""
    folder, before, _ = folders("deepseek_v3")
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "model.safetensors.index.json").unlink()
    tensors = tensors_of(folder)
    for path in (tmp_path / "more").glob("model-*.safetensors"):
        path.unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.61.embed_tokens.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "more" / "model.safetensors", metadata={"format": "pt"})
    recipe = weights_recipe(corpus, tmp_path / "more")
    run_distributed(save_as_started, 1, recipe, str(tmp_path / "run"))
    assert exported(tmp_path / "run", tmp_path / "out").sha256 == before.sha256


def test_a_recipe_overrides_fields_of_the_folder(tmp_path, corpus, folders):
    folder, before, _ = folders("qwen3_moe")
    recipe = weights_recipe(corpus, folder)
    recipe["model"]["config"] = {"num_experts_per_tok": 3}
    run_distributed(save_as_started, 1, recipe, str(tmp_path / "run"))
    found = exported(tmp_path / "run", tmp_path / "out")
    assert found.sha256 == before.sha256
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts_per_tok == 3


QWEN3_30B = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960},
    **{"max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768},
    **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True},
    **{"use_sliding_window": False, "vocab_size": 151936},
}
DEEPSEEK_V3 = {
    **{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
    **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1},
    **{"ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02},
    **{"intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3"},
    **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8},
    **{"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000},
    "rope_scaling": {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
        "original_max_position_embeddings": 4096,
    },
    **{"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4},
    **{"topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True},
    **{"v_head_dim": 128, "vocab_size": 129280},
}
PUBLISHED = {"Qwen3-30B-A3B": (QWEN3_30B, 18867, 47, 127), "DeepSeek-V3 in bf16": (DEEPSEEK_V3, 45395, 60, 255)}
"""A published config.json, and the tensors beside it: how many, the last layer and its last expert."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_at_full_size(name, tmp_path):
    """Fields that transformers does not know, and the names of every tensor, from the configuration alone."""
    tree, count, layer, expert = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = section_config(ModelSection(weights=str(tmp_path)))
    layout = FolderLayout(config)
    assert len(layout.shapes) == count
    shape = (config.moe_intermediate_size, config.hidden_size)
    assert layout.shapes[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"] == shape
    section = ModelSection(weights=str(tmp_path), config={"max_window_layer": 4})
    with pytest.raises(ConfigError, match="max_window_layer is no field of"):  # a recipe's own stay strict
        section_config(section)


def test_a_published_router_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | {"scoring_func": "softmax"}))
    with pytest.raises(ConfigError, match=r"scoring_func \(softmax\) in config.json; .* is always sigmoid"):
        section_config(ModelSection(weights=str(tmp_path)))


def test_a_certificate_takes_the_architecture_alone(corpus, folders):
    folder, _, _ = folders("deepseek_v3")
    shrunk = shrink(parse_recipe(weights_recipe(corpus, folder)), (1, 2))
    assert (shrunk.model.path, shrunk.model.weights) == (str(folder), None)


def test_the_commands_report_the_same_line(tmp_path, corpus, folders):
    """export -> import -> export: one line, of count, bytes and hash, three times."""
    folder, before, _ = folders("olmoe")
    line = f"{before.tensors} tensors, {before.nbytes} bytes of F32"
    result = CliRunner().invoke(app, ["import", str(folder)])
    assert result.exit_code == 0, result.output
    assert f"{folder}: OlmoeForCausalLM, {line}" in result.output
    assert f"sha256 over all {before.sha256}" in result.output
    assert f"model:\n  weights: {folder}" in result.output
    run_distributed(save_as_started, 1, weights_recipe(corpus, folder), str(tmp_path / "run"))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: {line} in 1 file; sha256 over all {before.sha256}" in result.output


def test_the_reader_gives_any_range(folders):
    """Ranges that begin and end anywhere, over the border of two tensors of the folder."""
    folder, _, _ = folders("mixtral")
    reader = HubReader(folder, FolderLayout(AutoConfig.from_pretrained(folder)))
    assert isinstance(reader, CheckpointReader)
    name, tensors = "model.layers.1.mlp.experts.gate_up_proj", tensors_of(folder)
    prefix = "model.layers.1.block_sparse_moe.experts.4"
    whole = torch.cat([tensors[f"{prefix}.w1.weight"], tensors[f"{prefix}.w3.weight"]]).flatten()
    for start, stop in [(0, 1536), (5, 6), (700, 900), (767, 769), (768, 1536), (1000, 1001)]:
        data = torch.full((stop - start,), torch.nan)
        reader.fill([Piece(name=name, expert=4, kind="master", shape=(48, 32), start=start, data=data)])
        assert torch.equal(data, whole[start:stop]), (start, stop)
