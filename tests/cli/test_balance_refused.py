"""Ways of balancing that contradict each other: one sentence with the keys, before anything starts."""

import json
from pathlib import Path

import pytest

from moe_train.errors import ConfigError, MoeTrainError
from moe_train.train import resolve_run

RECIPE = """\
model:
  model_type: deepseek_v3
  config: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, n_routed_experts: 4,
           num_experts_per_tok: 2, n_group: 1, topk_group: 1, first_k_dense_replace: 1, moe_intermediate_size: 8,
           intermediate_size: 16, q_lora_rank: 8, kv_lora_rank: 8, qk_rope_head_dim: 8, qk_nope_head_dim: 8,
           v_head_dim: 8, max_position_embeddings: 64}
precision: {compute: fp32}
optimizer: {lr: 1e-3}
data: {corpora: [{text: TEXT}], sequence_length: 16}
batch: {global_size: 4, micro_size: 2}
train: {steps: 1}
tracking: {mode: disabled}
"""


def resolve(folder: Path, *overrides: str):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("TEXT", str(folder / "text.txt")))
    return resolve_run(path, overrides, 1, 1)


REFUSED = {
    "moe.router=expert_choice moe.capacity_factor=1.5": "moe.capacity_factor (1.5) has nothing to drop: leave it out",
    "moe.router=expert_choice moe.bias_update_rate=0.1": "moe.router (expert_choice) balances the choice itself, and "
    "moe.bias_update_rate (0.1) would balance scores that it does not follow",
    "moe.router=sinkhorn moe.bias_update_rate=0.1": "moe.router (sinkhorn) balances the choice itself",
    "moe.router=sinkhorn moe.aux_loss_coef=0.1": "and moe.aux_loss_coef (0.1) would balance scores that it does not",
    "moe.router=sinkhorn model.config.n_group=2": "moe.router (sinkhorn) lets a token have any expert, and "
    "model.config.n_group (2) limits them to groups",
    "moe.router=sinkhorn moe.hash_layers=1": "moe.router (sinkhorn) is how layers choose by scores, and "
    "moe.hash_layers (1) leaves none of the 1",
    "moe.bias_update_rate=0.1 moe.hash_layers=1": "moe.bias_update_rate (0.1) acts on layers that route by scores, and "
    "moe.hash_layers (1) leaves none of the 1",
    "moe.router=expert_choice moe.route_after_dp_transform=true": "moe.router (expert_choice) looks at whole "
    "sequences, and moe.route_after_dp_transform (true) routes shares of them",
    "moe.capacity_factor=1.25 moe.route_after_dp_transform=true": "moe.capacity_factor (1.25) looks at whole sequences",
    "moe.bias_update=quantile moe.bias_update_rate=1.5": "moe.bias_update_rate (1.5) is the part of the way to the "
    "bias that moe.bias_update (quantile) finds: set it to at most 1",
    "moe.bias_update=quantile moe.bias_update_rate=1.0 model.config.n_group=2": "moe.bias_update (quantile) compares a "
    "token's experts with the best one left out, and model.config.n_group (2)",
    "moe.bias_update=quantile moe.bias_update_rate=1.0 model.config.num_experts_per_tok=4": "or top-k (4) leaves "
    "none of 4 out",
    "moe.drop=position": "moe.drop (position) says which tokens an expert without room drops, and moe.capacity_factor "
    "is unset",
    "moe.capacity_factor=0": "moe.capacity_factor (0): input should be greater than 0",
    "moe.router=soft": "moe.router ('soft'): input should be 'top_k', 'expert_choice' or 'sinkhorn'",
    "moe.force_load=skewed": "moe.force_load ('skewed'): must be a section",
    "moe.force_load.zipf=1.0 moe.force_load.balanced=true": "moe.force_load is balanced, {zipf: EXPONENT} or "
    "{histogram: FILE}: set exactly one",
    "moe.force_load=balanced moe.router=sinkhorn": "moe.force_load (balanced) decides which experts a token has, and "
    "moe.router (sinkhorn) has no say then: leave one out",
    "moe.force_load.zipf=1.2 moe.bias_update_rate=0.1": "moe.force_load (zipf 1.2) decides which experts a token has, "
    "and moe.bias_update_rate (0.1) has no say then",
    "moe.force_load=balanced moe.aux_loss_coef=0.1": "and moe.aux_loss_coef (0.1) has no say then",
    "moe.force_load=balanced moe.z_loss_coef=0.1": "and moe.z_loss_coef (0.1) has no say then",
    "moe.force_load=balanced moe.hash_layers=1": "and moe.hash_layers (1) has no say then",
    "moe.force_load=balanced diagnostics.guards=[{when: dead_experts, steps: 3, action: stop}]": "and "
    "diagnostics.guards (1 rules) has no say then",
    "moe.force_load.histogram=nowhere.json": "moe.force_load.histogram (nowhere.json) cannot be read (No such file",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_contradiction(tmp_path, overrides):
    parts = [overrides] if "[" in overrides else overrides.split()
    if "[" in overrides:
        first, _, rest = overrides.partition(" ")
        parts = [first, rest]
    with pytest.raises(MoeTrainError) as caught:
        resolve(tmp_path, *parts)
    message = str(caught.value)
    assert REFUSED[overrides] in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2, 3]", "has 3 numbers, and the model has 4 experts: give one number per expert"),
        ("[1, 2, 3, -1]", "must be a JSON list of numbers of at least 0, one per expert"),
        ("[1, 2, 3, NaN]", "must be a JSON list of numbers of at least 0, one per expert"),
        ("[1, 2, 3, true]", "must be a JSON list of numbers of at least 0, one per expert"),
        ('{"a": 1}', "must be a JSON list of numbers of at least 0, one per expert"),
        ("1 2 3 4", "cannot be read (it is not JSON)"),
        ("[1, 0, 0, 0]", "has 1 experts above 0, and top-k is 2: give at least as many"),
    ],
)
def test_histogram(tmp_path, content, said):
    path = tmp_path / "loads.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, f"moe.force_load.histogram={path}")
    assert said in str(caught.value)
    assert f"moe.force_load.histogram ({path})" in str(caught.value)


ALLOWED = (
    "moe.capacity_factor=1.25 moe.drop=position moe.bias_update_rate=0.001 moe.aux_loss_coef=0.01",
    "moe.router=sinkhorn moe.capacity_factor=1.0 moe.z_loss_coef=0.001",
    "moe.router=expert_choice moe.z_loss_coef=0.001",
    "moe.force_load.zipf=0 moe.capacity_factor=2.0",
)


@pytest.mark.parametrize("overrides", ALLOWED)
def test_what_goes_together(tmp_path, overrides):
    resolve(tmp_path, *overrides.split())


def test_a_histogram_that_fits(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps([4, 3, 2, 1]))
    assert resolve(tmp_path, f"moe.force_load.histogram={path}").recipe.moe.force_load.histogram == str(path)
