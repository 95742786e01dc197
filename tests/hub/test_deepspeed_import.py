"""Checkpoints of DeepSpeed's own become folders with the same logits; whatever cannot is refused, and nothing is run.

The files are written here as deepspeed 0.19.8 names and fills them.
"""

import os
from pathlib import Path

import pytest
import torch
from hub_runs import stock_logits, tensors_of
from small_configs import FAMILIES, small_recipe
from tiny_run import VOCAB
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe_train.cli import app
from moe_train.errors import CheckpointError, ConfigError
from moe_train.hub.deepspeed_folder import import_deepspeed, plan_deepspeed
from moe_train.model.family import load_model_config


def saved(place: Path, family: str, kind: str = "AutoEP", tag: str = "global_step4", **fields) -> Path:
    """`place`/hf as transformers saves a model, and `place`/ds as DeepSpeed saves the same one. Returns the latter."""
    torch.manual_seed(0)
    config = load_model_config(
        small_recipe(family, model={"config": FAMILIES[family] | {"vocab_size": VOCAB} | fields})
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.save_pretrained(place / "hf")
    write = write_autoep if kind == "AutoEP" else write_classic
    (place / "ds" / tag).mkdir(parents=True)
    (place / "ds" / "latest").write_text(tag)
    write(model, place / "ds" / tag)
    (place / "ds" / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never opened")
    return place / "ds"


def split(state: dict[str, torch.Tensor]):
    """(all but experts, one dictionary per MoE layer: block, gate_up [E, 2I, H], down [E, H, I])."""
    dense = {name: value for name, value in state.items() if ".experts." not in name}
    blocks = [name.removesuffix(".experts.down_proj") for name in state if name.endswith(".experts.down_proj")]
    return dense, [(b, state[f"{b}.experts.gate_up_proj"], state[f"{b}.experts.down_proj"]) for b in blocks]


def write_autoep(model, folder: Path) -> None:
    dense, layers = split(model.state_dict())
    module = {}
    for name, value in dense.items():
        bare = name.endswith(".mlp.gate.weight")
        if bare or "e_score_correction_bias" in name:
            name = name.replace(".mlp.gate.", ".mlp.router.gate." if bare else ".mlp.router.")
        module[name] = value
        if bare and not any("e_score" in key for key in dense):
            module[name.replace(".router.gate.", ".gate.gate.")] = value.clone()
    described = [
        {
            "moe_layer_id": number,
            "module_path": block,
            "expert_key_prefix": f"{block}.experts",
            "num_experts": len(down),
        }
        for number, (block, _, down) in enumerate(layers)
    ]
    for number, (block, gate_up, down) in enumerate(layers):
        for expert in range(len(down)):
            gate, up = gate_up[expert].chunk(2)
            parts = {"w1": gate, "w2": down[expert], "w3": up}
            torch.save(
                {f"{block}.experts.{name}.{expert}": value.clone() for name, value in parts.items()},
                folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt",
            )
    states = {"module": module, "ds_autoep_layers": described, "optimizer": None, "ds_version": "0.19.8"}
    torch.save(states, folder / "mp_rank_00_model_states.pt")


def write_classic(model, folder: Path) -> None:
    """As of a model whose MLPs were put into `deepspeed.moe.layer.MoE`, under an attribute of a user's own module."""
    dense, layers = split(model.state_dict())
    module = {name.replace(".mlp.gate.", ".mlp.moe.deepspeed_moe.gate.wg."): value for name, value in dense.items()}
    for number, (block, gate_up, down) in enumerate(layers):
        for expert in range(len(down)):
            gate, up = gate_up[expert].chunk(2)
            prefix = f"{block}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}"
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down[expert]}
            torch.save(
                {f"{prefix}.{name}.weight": value.clone() for name, value in parts.items()},
                folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt",
            )
    torch.save({"module": module, "num_experts": [6, 6]}, folder / "mp_rank_00_model_states.pt")


def imported(ds: Path, out: Path, **options) -> Path:
    import_deepspeed(plan_deepspeed(ds, out, ds.parent / "hf", **options))
    return out


def equal(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(stock_logits(one), stock_logits(other))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_autoep_has_the_logits_of_the_model_that_was_saved(family, tmp_path):
    ds = saved(tmp_path, family)
    equal(imported(ds, tmp_path / "out"), tmp_path / "hf")


@pytest.mark.parametrize(("family", "fields"), [("mixtral", {}), ("qwen3_moe", {"norm_topk_prob": True})])
def test_deepspeeds_own_layer(family, fields, tmp_path):
    ds = saved(tmp_path, family, "classic", **fields)
    equal(imported(ds, tmp_path / "out"), tmp_path / "hf")


def test_a_tied_head_is_a_second_name(tmp_path):
    ds = saved(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    equal(imported(ds, tmp_path / "out"), tmp_path / "hf")
    edit(ds, lambda module: module.update({"lm_head.weight": module["lm_head.weight"] + 1}))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(ds)


def edit(ds: Path, change, file: str = "mp_rank_00_model_states.pt") -> None:
    path = ds / "global_step4" / file
    states = torch.load(path, weights_only=True)
    change(states.get("module", states))
    torch.save(states, path)


def refusal(ds: Path, kind=CheckpointError, **options) -> str:
    with pytest.raises(kind) as caught:
        plan_deepspeed(ds, ds.parent / "refused", ds.parent / "hf", **options)
    assert not (ds.parent / "refused").exists()
    return str(caught.value)


def test_every_tensor_is_accounted_for(tmp_path):
    ds = saved(tmp_path, "mixtral")
    edit(ds, lambda module: module.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    edit(ds, lambda module: module.pop("model.layers.1.mlp.router.gate.weight"))
    edit(ds, lambda module: module["model.layers.0.mlp.gate.gate.weight"].add_(1))
    expert = "layer_1_expert_5_mp_rank_00_model_states.pt"
    edit(ds, lambda states: states.update({"model.layers.1.mlp.experts.b1.5": torch.ones(2)}), expert)
    edit(ds, lambda states: states.update({"model.layers.1.mlp.experts.w2.5": torch.ones(3, 3)}), expert)
    (ds / "global_step4" / "layer_0_expert_2_mp_rank_00_model_states.pt").unlink()
    message = refusal(ds)
    for problem in (
        "model.layers.0.mlp.extra.weight is in the checkpoint, not in the model",
        "model.layers.0.mlp.gate.gate.weight differs from model.layers.0.mlp.gate.weight",
        f"model.layers.1.mlp.experts.b1.5 in {expert} is no part of a gated expert",
        "model.layers.1.mlp.5.down: [3, 3] in the checkpoint, [32, 24] in the model",
        *(f"model.layers.0.mlp.2.{matrix} is missing" for matrix in ("gate", "up", "down")),
    ):
        assert problem in message, problem
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "has 2 MoE layers, the mixtral of the config.json 3" in refusal(ds)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"])
def test_planted_pickle_is_refused_and_not_run(file, tmp_path):
    ds = saved(tmp_path, "mixtral")
    path = ds / "global_step4" / file
    states = torch.load(path, weights_only=True)
    torch.save(states | {"planted": Trap(tmp_path / "ran")}, path)
    message = refusal(ds)
    assert f"{path} holds more than tensors and plain containers" in message
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the trap works
    assert (tmp_path / "ran").exists()


def test_layouts_without_whole_weights(tmp_path):
    ds = saved(tmp_path, "mixtral")
    step = ds / "global_step4"
    cut = step / "layer_0_expert_0_mp_rank_01_model_states.pt"
    cut.touch()
    assert "cut over several tensor-parallel ranks" in refusal(ds)
    cut.rename(step / "layer_00-model_states.pt")
    assert "saved by DeepSpeed's pipeline" in refusal(ds)
    (step / "layer_00-model_states.pt").unlink()
    (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    message = refusal(ds)
    assert "saved at ZeRO-3: its weights lie in *_optim_states.pt alone, pickle that can run any program" in message
    assert "save it at ZeRO stage 0, 1 or 2" in message


def test_tags_and_damage(tmp_path):
    ds = saved(tmp_path, "mixtral")
    import_deepspeed(plan_deepspeed(ds / "global_step4", tmp_path / "out", tmp_path / "hf" / "config.json"))
    equal(tmp_path / "out", tmp_path / "hf")
    assert "no name of a tag" in refusal(ds, tag="../hf")
    assert "is no folder: give the tag" in refusal(ds, tag="global_step5")
    path = ds / "global_step4" / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path} cannot be read" in refusal(ds)


def test_a_gate_that_weighs_otherwise(tmp_path):
    ds = saved(tmp_path, "qwen3_moe", "classic", norm_topk_prob=False)
    assert "qwen3_moe of the config.json weighs experts otherwise than deepspeed.moe" in refusal(ds, ConfigError)


def test_the_command(tmp_path):
    ds, out = saved(tmp_path, "mixtral"), tmp_path / "out"
    result = CliRunner().invoke(app, ["import", str(ds), str(out)])
    assert result.exit_code == 2
    assert "which saves no configuration: give one with --config" in result.output
    result = CliRunner().invoke(app, ["import", str(ds), str(out), "--config", str(tmp_path / "hf")])
    assert result.exit_code == 0, result.output
    assert f"{ds / 'global_step4'} -> {out}: weights of AutoEP; optimizer files" in result.output
    assert f"model:\n  weights: {out}" in result.output
    assert CliRunner().invoke(app, ["import", str(ds)]).exit_code == 2
