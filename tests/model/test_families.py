"""Each family, its blocks swapped, against the stock Hugging Face model: logits and every gradient."""

import copy

import pytest
import torch
from small_configs import FAMILIES, build_alone, small_recipe
from transformers import AutoModelForCausalLM, masking_utils

from moe_train.errors import ConfigError, RoutingError
from moe_train.model import PROFILES, load_model_config, num_experts_of
from moe_train.model.build import find_blocks, meta_model


def build(family: str, **sections):
    return build_alone(small_recipe(family, **sections))


def stock_of(built, held):
    config = copy.deepcopy(built.model.config)  # which from_config writes into
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    state = dict(built.model.state_dict()) | {k: v.detach() for k, v in held.items()}
    stock.load_state_dict(state, strict=True)  # same names and shapes, nothing missing, nothing more
    return stock.train()


def test_every_profile_has_a_small_config():
    assert set(FAMILIES) == set(PROFILES)


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"kernels": ["rotary", "cross_entropy"]}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_the_stock_model(family, options):
    built, held = build(family, model=options)
    with torch.no_grad():  # zero biases and unit norms would hide mistakes
        for tensor in [*built.model.parameters(), *built.all_biases()]:
            tensor.add_(torch.randn_like(tensor) * 0.05)
    stock = stock_of(built, held)
    ids = torch.randint(0, 61, (2, 16))
    target = torch.randn(2, 16, 61)
    expected = stock(input_ids=ids).logits
    (expected * target).sum().backward()
    with built.context.micro_batch():
        actual = built.model(input_ids=ids).logits
        (actual * target).sum().backward()
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()
    ours = dict(built.model.named_parameters()) | held
    for name, parameter in stock.named_parameters():
        assert parameter.grad is not None
        scale = max(float(parameter.grad.abs().max()), 1e-3)
        error = float((ours[name].grad - parameter.grad).abs().max())
        assert error < 5e-5 * scale, f"{name}: {error:.2e} at scale {scale:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values_follow_the_family(family):
    built, held = build(family)
    torch.manual_seed(0)  # ours is drawn from the recipe's
    stock = AutoModelForCausalLM.from_config(built.model.config, dtype=torch.float32)
    for name, buffer in stock.named_buffers():
        assert torch.equal(dict(built.model.named_buffers())[name], buffer), name
    ours = dict(built.model.named_parameters()) | held
    for name, parameter in stock.named_parameters():
        if parameter.numel() >= 1024:
            assert float(ours[name].detach().std()) == pytest.approx(float(parameter.detach().std()), rel=0.1), name
        elif parameter.detach().std() == 0:
            assert torch.equal(ours[name].detach(), parameter.detach()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_id_of_the_vocabulary_is_learnt(family):
    """OLMoE's own pad_token_id is 1, which is a byte of the byte tokenizer: such a row gets no gradient."""
    built, _ = build(family)
    with built.context.micro_batch():
        built.model(input_ids=torch.arange(61).view(1, 61)).logits.square().sum().backward()
    table = built.model.get_input_embeddings().weight
    assert table.grad.norm(dim=1).min() > 0
    assert table.norm(dim=1).min() > 0


def test_an_expert_is_drawn_from_its_name_and_number():
    _, first = build("qwen3_moe")
    _, again = build("qwen3_moe")
    _, other = build("qwen3_moe", seed=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name][0], first[name][1])
    assert not torch.equal(first[name], first[name.replace("layers.0", "layers.1")])


def test_the_experts_never_become_parameters():
    built, _ = build("mixtral")
    assert not [name for name, _ in built.model.named_parameters() if "experts" in name]


def test_a_family_without_a_profile_is_refused():
    with pytest.raises(RoutingError, match=r"model.model_type \(llama\) has no profile; supported: mixtral"):
        load_model_config(small_recipe("mixtral", model={"model_type": "llama", "config": {}}))


def test_a_misspelt_field_names_the_nearest():
    recipe = small_recipe("mixtral", model={"config": {"num_local_expert": 4}})
    with pytest.raises(ConfigError, match=r"model.config.num_local_expert is no field.*num_local_experts"):
        load_model_config(recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_wins_over_a_config_json_that_uses_a_fields_other_name(family, tmp_path):
    """transformers writes num_local_experts where the family says num_experts or n_routed_experts."""
    load_model_config(small_recipe(family)).save_pretrained(tmp_path)
    before = num_experts_of(load_model_config(small_recipe(family)))
    section = {"model_type": None, "path": str(tmp_path)}
    same = load_model_config(small_recipe(family, model=section | {"config": {}}))
    assert num_experts_of(same) == before
    wanted = {PROFILES[family].num_experts: 2 * before}
    assert num_experts_of(load_model_config(small_recipe(family, model=section | {"config": wanted}))) == 2 * before


def test_a_model_with_no_sparse_layer_is_refused():
    recipe = small_recipe("qwen3_moe", model={"config": FAMILIES["qwen3_moe"] | {"mlp_only_layers": [0, 1]}})
    config = load_model_config(recipe)
    with pytest.raises(RoutingError, match="no Qwen3MoeSparseMoeBlock"):
        find_blocks(meta_model(recipe, config))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_is_fused(family):
    built, _ = build_alone(small_recipe(family))
    norms = [type(module).__name__ for name, module in built.model.named_modules() if name.endswith("norm")]
    assert set(norms) == {"FusedNorm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_asks_for_no_mask(family, monkeypatch):
    """Hugging Face reads the positions on the host to find out that it needs none."""

    def looked(*args):
        raise AssertionError("positions were read")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    built, _ = build_alone(small_recipe(family))
    with built.context.micro_batch():
        built.model(input_ids=torch.arange(16).view(1, 16))
    with pytest.raises(AssertionError, match="positions were read"):
        AutoModelForCausalLM.from_config(built.model.config)(input_ids=torch.arange(16).view(1, 16))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_windows_are_kept(family):
    more = {"mixtral": {}, "qwen3_moe": {"use_sliding_window": True}}
    more["qwen2_moe"] = {"use_sliding_window": True, "max_window_layers": 2}
    fields = FAMILIES[family] | {"sliding_window": 3} | more[family]
    built, held = build(family, model={"config": fields})
    stock = stock_of(built, held)
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(3))
    whole, _ = build(family)
    with built.context.micro_batch(), whole.context.micro_batch(), torch.no_grad():
        actual, expected = built.model(input_ids=ids).logits, stock(input_ids=ids).logits
        assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (whole.model(input_ids=ids).logits - actual).abs().max() > 1e-3 * expected.abs().max()


def test_values_are_clipped_where_the_family_does():
    """In place, on what a norm and a projection have returned."""
    built, held = build("olmoe", model={"config": FAMILIES["olmoe"] | {"clip_qkv": 0.05}})
    stock = stock_of(built, held)
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(3))
    for model in (built.model, stock):
        with built.context.micro_batch():
            model(input_ids=ids).logits.square().sum().backward()
    ours = dict(built.model.named_parameters())
    for name in ("q_proj", "k_proj", "v_proj", "q_norm"):
        name = f"model.layers.0.self_attn.{name}.weight"
        expected = stock.get_parameter(name).grad
        assert (ours[name].grad - expected).abs().max() < 5e-5 * expected.abs().max(), name
