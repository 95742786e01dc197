"""A dense model upcycled computes the same function, by transformers' own classes in float64."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hub_runs import recipe_of, save_as_started, stock_logits, tensors_of
from safetensors.torch import load_file, save_file
from small_configs import small_recipe
from tiny_run import VOCAB
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from moe_train.cli import app
from moe_train.errors import CheckpointError, ConfigError
from moe_train.hub.fingerprint import inspect_folder
from moe_train.hub.upcycle import UpcycleOptions, plan_upcycle, upcycle
from moe_train.model.build import find_blocks, meta_model
from moe_train.model.family import load_model_config
from moe_train.model.initialize import materialise_dense
from moe_train.testing import run_distributed
from moe_train.verify.float64 import Float64

SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": None},
}
ROPE = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DENSE = {
    "llama": {"rope_parameters": ROPE | {"original_max_position_embeddings": 16}, "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": 5, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 with windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "attention_bias": True, "hidden_act": "gelu"},
}


def dense_folder(path: Path, name: str, dtype: torch.dtype = torch.float32, **fields) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.split()[0], **(SIZES | DENSE[name] | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit norms would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(path)
    return path


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    model.config._experts_implementation = "eager"  # the grouped one knows no float64
    ids = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(2))
    with Float64():  # transformers' routers compute in float32 whatever the weights are
        return model.eval()(input_ids=ids).logits


def made(source: Path, out: Path, **options) -> Path:
    upcycle(plan_upcycle(source, out, UpcycleOptions(**options)))
    return out


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_function_to_rounding(name, tmp_path):
    source = dense_folder(tmp_path / "dense", name)
    expected = logits(source)
    for number, options in enumerate(
        [{"copies": 4, "copies_per_token": 2}, {"copies": 3, "copies_per_token": 2, "granularity": 4, "seed": 5}]
    ):
        out = made(source, tmp_path / str(number), **options)
        error = float((logits(out) - expected).abs().max())
        assert error < 1e-12 * float(expected.abs().max()), options
        model = inspect_folder(out).layout.model
        (*_, block) = find_blocks(model)
        parts = options.get("granularity", 1)
        assert block.experts.down_proj.shape == (options["copies"] * parts, 32, 48 // parts)  # type: ignore[union-attr]


def test_a_group_shares_its_row_and_the_first_choice_is_whole_copies(tmp_path):
    source = dense_folder(tmp_path / "dense", "qwen3")
    out = made(source, tmp_path / "moe", copies=4, copies_per_token=2, granularity=3, seed=7)
    tensors = tensors_of(out)
    for layer in range(2):
        rows = tensors[f"model.layers.{layer}.mlp.gate.weight"].view(4, 3, 32)
        assert torch.equal(rows, rows[:, :1].expand(-1, 3, -1))
        assert len(rows[:, 0].unique(dim=0)) == 4
        chosen = (torch.randn(50, 32) @ rows.view(12, 32).T).topk(6).indices // 3
        assert all(sorted(row.tolist()).count(group) == 3 for row in chosen for group in row.tolist())
    width = tensors["model.layers.0.mlp.experts.0.down_proj.weight"]
    dense = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(width, dense[:, :16] * 3)
    assert torch.equal(tensors["model.layers.0.mlp.experts.5.up_proj.weight"],
                       load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"][32:48])  # fmt: skip


def test_the_router_is_the_one_that_a_run_with_this_seed_draws(tmp_path):
    out = made(dense_folder(tmp_path / "dense", "qwen3"), tmp_path / "moe", copies=6, seed=3)
    recipe = small_recipe("qwen3_moe")
    model = meta_model(recipe, load_model_config(recipe))
    materialise_dense(model, torch.device("cpu"), 3)
    name = "model.layers.1.mlp.gate.weight"
    assert torch.equal(tensors_of(out)[name], dict(model.named_parameters())[name])


def test_a_run_starts_from_it_at_another_layout(tmp_path, corpus):
    source = dense_folder(tmp_path / "dense", "mistral", vocab_size=VOCAB)
    out = made(source, tmp_path / "moe", copies=3, granularity=2)
    recipe = recipe_of(corpus, parallel={"expert": 2}, zero={"stage": 2})
    recipe["model"] = {"weights": str(out)}
    expected = stock_logits(source)
    for started, _ in run_distributed(save_as_started, 2, recipe, str(tmp_path / "run")):
        assert (started - expected).abs().max() < 1e-5 * expected.abs().max()


def test_noise_is_every_experts_own_and_of_the_size_asked_for(tmp_path):
    source = dense_folder(tmp_path / "dense", "mistral")
    first, again, other = (
        tensors_of(made(source, tmp_path / str(n), noise=0.05, seed=seed)) for n, seed in enumerate((1, 1, 2))
    )
    dense = load_file(source / "model.safetensors")
    for stored, name in (("w1", "gate_proj"), ("w2", "down_proj")):
        clean = dense[f"model.layers.1.mlp.{name}.weight"]
        found = [first[f"model.layers.1.block_sparse_moe.experts.{e}.{stored}.weight"] - clean for e in range(8)]
        for noise in found:
            assert float(noise.std() / clean.std()) == pytest.approx(0.05, rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten() for noise in found]))[0, 1])) < 0.1
    assert all(torch.equal(first[name], again[name]) for name in first)
    key = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    assert not torch.equal(first[key], other[key])
    assert torch.equal(first["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])


def test_bf16_stays_bf16_to_the_bit(tmp_path):
    source = dense_folder(tmp_path / "dense", "llama", torch.bfloat16)
    dense = load_file(source / "model.safetensors")
    tensors = tensors_of(made(source, tmp_path / "moe", granularity=2))
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    down = dense["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"], down[:, 24:] * 2)


def test_memory_holds_one_matrix_and_not_the_experts(tmp_path):
    """numpy's and Python's allocations; torch only wraps what numpy holds, but for copies of one matrix."""
    source = dense_folder(tmp_path / "dense", "qwen3", hidden_size=256, intermediate_size=1024)
    plan = plan_upcycle(source, tmp_path / "moe", UpcycleOptions(copies=32))
    matrix = 256 * 1024 * 4
    tracemalloc.start()
    upcycle(plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.folder.nbytes > 180 * matrix
    assert peak < 20 * matrix  # threads write several files; each reads a matrix or two at a time


def test_every_field_is_written_with_where_it_comes_from(tmp_path):
    source = dense_folder(tmp_path / "dense", "mistral")
    out = made(source, tmp_path / "moe", copies=3, granularity=2)
    record, config = (json.loads((out / name).read_text()) for name in ("upcycle.json", "config.json"))
    assert record["from_options"] == {"num_local_experts": 6, "num_experts_per_tok": 4, "intermediate_size": 24}
    assert record["from_source"]["sliding_window"] == 5
    for part in ("from_source", "from_options", "fixed"):
        assert all(config[name] == value for name, value in record[part].items())


def refusal(kind, *args, **options) -> str:
    with pytest.raises(kind) as caught:
        plan_upcycle(*args, UpcycleOptions(**options))
    return str(caught.value)


def test_what_has_no_place_is_named(tmp_path):
    out = tmp_path / "moe"
    biased = dense_folder(tmp_path / "a", "llama", attention_bias=True)
    assert "attention_bias (True) in config.json has no place in a mixtral" in refusal(ConfigError, biased, out)
    source = dense_folder(tmp_path / "b", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.bias"] = torch.ones(48)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(4, 4)
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = refusal(CheckpointError, source, out)
    assert "model.layers.0.mlp.gate_proj.bias is in the folder, and has no place in a mixtral" in message
    assert "model.layers.1.mlp.up_proj.weight: [4, 4] in the folder, [48, 32] in the model" in message
    assert "model.norm.weight is missing" in message
    assert not out.exists()


def test_options_that_do_not_fit(tmp_path):
    source, out = dense_folder(tmp_path / "dense", "qwen2"), tmp_path / "moe"
    message = refusal(ConfigError, source, out, granularity=5, copies=2, copies_per_token=3)
    assert "--granularity (5) must divide intermediate_size (48)" in message
    assert "--top-k (3) must lie between 1 and --experts (2)" in message
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type (gpt2) cannot be upcycled to the same function; supported: llama ->" in refusal(
        ConfigError, source, out
    )


def test_the_command(tmp_path):
    source, out = str(dense_folder(tmp_path / "dense", "qwen2")), str(tmp_path / "moe")
    options = ["--experts", "4", "--top-k", "1", "--granularity", "2"]
    result = CliRunner().invoke(app, ["import", source, out, "--upcycle", *options])
    assert result.exit_code == 0, result.output
    assert f"{source} -> {out}: qwen2 to qwen2_moe, 8 experts, top-2" in result.output
    assert f"{out}: Qwen2MoeForCausalLM, " in result.output
    assert f"model:\n  weights: {out}" in result.output
    result = CliRunner().invoke(app, ["import", source, "--upcycle"])
    assert result.exit_code == 2
    assert "--upcycle needs OUT" in result.output
