"""Dense tensor parallelism: every family cut over 2 and 4 ranks against the whole model, in float64."""

import pytest
import torch
import torch.nn.functional as F
from small_configs import FAMILIES, small_recipe

from moe_train.errors import ConfigError, TopologyError
from moe_train.model import PROFILES, check_tensor, load_model_config
from moe_train.model.build import meta_model
from moe_train.model.initialize import materialise_dense
from moe_train.model.tensor import apply_tensor_parallel
from moe_train.parallel import Topology, build_groups, tensor_part
from moe_train.testing import run_distributed
from moe_train.verify.float64 import Float64

VARIANTS: dict[str, tuple[str, dict]] = {name: (name, {}) for name in FAMILIES} | {
    "qwen3_moe, a dense layer": ("qwen3_moe", {"mlp_only_layers": [0], "intermediate_size": 48}),
    "qwen3_moe, biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen2_moe, every second layer dense": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "olmoe, few key heads, clamped": ("olmoe", {"num_key_value_heads": 1, "clip_qkv": 0.5}),
    "deepseek_v3, whole queries": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v3, biases": ("deepseek_v3", {"attention_bias": True}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
}
KV_HEADS = {"mixtral": 2, "qwen3_moe": 2, "qwen2_moe": 2}
"""Families that share out key heads, of which the small configurations have 2; latent attention has 4 heads."""


def recipe_of(variant: str, **fields):
    family, own = VARIANTS[variant]
    return small_recipe(family, model={"config": FAMILIES[family] | own | fields})


def model_of(recipe):
    """The stock model with our initial values, no bias zero and no norm 1: those would hide mistakes."""
    config = load_model_config(recipe)
    config._experts_implementation = "eager"  # grouped GEMM takes no float64
    model = meta_model(recipe, config)
    materialise_dense(model, torch.device("cpu"), recipe.seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.double().train()


def loss_and_gradients(model):
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    with Float64():
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    return float(loss.detach()), {name: (p.grad, tensor_part(p)) for name, p in model.named_parameters()}


def run(rank: int, recipe, tensor: int):
    model = model_of(recipe)
    objects = {name: id(p) for name, p in model.named_parameters()}
    apply_tensor_parallel(model, build_groups(Topology(world=tensor, expert=1, tensor=tensor)).tensor)
    assert {name: id(p) for name, p in model.named_parameters()} == objects, "the same objects under the same names"
    for name, parameter in model.named_parameters():
        whole = parameter.untyped_storage().nbytes()
        assert whole == parameter.numel() * 8, f"{name} keeps memory that it has not"
    return loss_and_gradients(model)


def assembled(results, name: str, shape) -> torch.Tensor:
    """One gradient from the ranks' parts, each element from exactly one; whole ones must agree."""
    gradients = [found[name] for _, found in results]
    if gradients[0][1] is None:
        for gradient, part in gradients:
            assert part is None
            assert torch.equal(gradient, gradients[0][0]), f"{name}: peers of a tensor group have different gradients"
        return gradients[0][0]
    full, seen = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int)
    for gradient, part in gradients:
        index = tuple(slice(*pair) for pair in part.box)
        assert part.view_shape == shape
        full[index], seen[index] = gradient, seen[index] + 1
    assert (seen == 1).all(), f"{name}: every element exactly once"
    return full


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_whole_model(variant, tensor):
    family = VARIANTS[variant][0]
    recipe = recipe_of(variant, **({"num_key_value_heads": 4} if tensor == 4 and family in KV_HEADS else {}))
    check_tensor(load_model_config(recipe), tensor)
    results = run_distributed(run, tensor, recipe, tensor)
    model = model_of(recipe)
    loss, gradients = loss_and_gradients(model)
    assert [r[0] for r in results] == pytest.approx([loss] * tensor, rel=1e-12)
    cut = 0
    for name, (gradient, _) in gradients.items():
        found = assembled(results, name, tuple(gradient.shape))
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name}: nothing to compare"
        assert float((found - gradient).abs().max()) <= 1e-10 * max(scale, 1e-3), name
        cut += results[0][1][name][1] is not None
    assert cut >= (3 if family == "deepseek_v3" else 4) * model.config.num_hidden_layers


def names_of_parts(rank: int, recipe):
    model = model_of(recipe)
    apply_tensor_parallel(model, build_groups(Topology(world=2, expert=1, tensor=2)).tensor)
    return {name for name, p in model.named_parameters() if tensor_part(p) is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_head_and_norms_stay_whole(family):
    for names in run_distributed(names_of_parts, 2, recipe_of(family)):
        assert names
        wrong = [n for n in names if any(w in n for w in ("expert", ".gate.", "norm", "embed", "lm_head", "_a_proj"))]
        assert not wrong


def test_every_profile_has_a_plan_for_every_linear_of_the_stock_model():
    assert set(FAMILIES) == set(PROFILES)  # `run` fails on a linear that its plan leaves out


@pytest.mark.parametrize(
    ("variant", "fields", "tensor", "message"),
    [
        ("qwen3_moe", {}, 3, r"parallel\.tensor \(3\) must divide model\.config\.num_attention_heads \(4\).*\[1, 2\]"),
        ("qwen3_moe", {}, 4, r"parallel\.tensor \(4\) must divide model\.config\.num_key_value_heads \(2\).*\[1, 2\]"),
        ("mixtral", {"num_key_value_heads": 1}, 2, r"num_key_value_heads \(1\).*use one of \[1\]"),
        ("deepseek_v3", {"intermediate_size": 45}, 2, r"must divide model\.config\.intermediate_size \(45\)"),
        ("qwen3_moe, a dense layer", {"intermediate_size": 45}, 2, r"model\.config\.intermediate_size \(45\)"),
        ("deepseek_v3", {}, 8, r"model\.config\.num_attention_heads \(4\)"),
        ("olmoe", {}, 3, r"parallel\.tensor \(3\) must divide model\.config\.hidden_size \(32\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(variant, fields, tensor, message):
    with pytest.raises(TopologyError, match=message):
        check_tensor(load_model_config(recipe_of(variant, **fields)), tensor)


def test_what_does_not_concern_the_dense_layers_is_not_refused():
    # the experts' width, in a family without dense layers, and sizes that one rank need not divide
    check_tensor(load_model_config(recipe_of("mixtral", intermediate_size=45)), 2)
    check_tensor(load_model_config(recipe_of("qwen3_moe", intermediate_size=45)), 2)
    check_tensor(load_model_config(recipe_of("deepseek_v3", intermediate_size=45)), 1)


def test_dropout_where_ranks_repeat_attention_is_refused():
    config = load_model_config(recipe_of("olmoe", attention_dropout=0.1))
    check_tensor(config, 1)
    with pytest.raises(ConfigError, match=r"model\.config\.attention_dropout \(0\.1\).*parallel\.tensor \(2\)"):
        check_tensor(config, 2)
    check_tensor(load_model_config(recipe_of("qwen3_moe", attention_dropout=0.1)), 2)
