"""What is cut by its name alone is what is cut of a real model; what is shared is what a real block shares."""

import pytest
from test_tensor import VARIANTS, recipe_of

from moe_train.errors import ConfigError, RoutingError, TopologyError
from moe_train.model import load_model_config
from moe_train.model.build import find_blocks, meta_model
from moe_train.model.cuts import FamilyCuts
from moe_train.model.profiles import profile_of
from moe_train.model.tensor import apply_tensor_parallel
from moe_train.parallel import ParallelGroup, tensor_part


def cuts_of(recipe) -> FamilyCuts:
    """As a checkpoint has it: a family's name and a recipe that went through JSON."""
    return FamilyCuts(recipe.model.model_type, recipe.model_dump(mode="json"))


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_parameters_are_cut_as_the_model_s_own(variant, tensor):
    recipe = recipe_of(variant)
    config, cuts = load_model_config(recipe), cuts_of(recipe)
    inside = tuple(f"{block.name}." for block in find_blocks(meta_model(recipe, config)))
    shapes = {name: tuple(p.shape) for name, p in meta_model(recipe, config).named_parameters()}
    found = 0
    for rank in range(tensor):
        model = meta_model(recipe, config)
        apply_tensor_parallel(model, ParallelGroup(list(range(tensor)), rank, object()))
        for name, parameter in model.named_parameters():
            if not name.startswith(inside):
                parts = cuts.dense(name, shapes[name], tensor)
                assert (parts and parts[rank]) == tensor_part(parameter), name
                found += parts is not None
    assert (found > 0) == (tensor > 1)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "qwen3_moe"])
def test_shared_parameters_are_those_of_the_block(family):
    recipe = recipe_of(family)
    config, cuts = load_model_config(recipe), cuts_of(recipe)
    model, names = meta_model(recipe, config), profile_of(family).names
    block = model.get_submodule(find_blocks(model)[0].name)
    for gate in (False, True):
        attributes = [names.shared_experts, names.shared_experts_gate if gate else None]
        expected = {
            f"{attribute}.{name}"
            for attribute in attributes
            if attribute
            for name, _ in block.get_submodule(attribute).named_parameters()
        }
        assert {name for name, _ in block.named_parameters() if cuts.shared(name, gate)} == expected


def test_sizes_that_do_not_divide_are_refused():
    cuts = cuts_of(recipe_of("mixtral"))
    with pytest.raises(
        TopologyError, match=r"parallel.tensor \(4\) must divide model.config.num_key_value_heads \(2\)"
    ):
        cuts.dense("model.layers.0.self_attn.q_proj.weight", (32, 32), 4)


def test_a_model_that_cannot_be_read_is_said_with_what_to_do(tmp_path):
    tree = recipe_of("mixtral").model_dump(mode="json")
    tree["model"] = {**tree["model"], "model_type": None, "config": {}, "path": str(tmp_path / "gone")}
    with pytest.raises(ConfigError, match=r"--tensor 2 needs the model .*no config.json there.*--tensor 1"):
        FamilyCuts("mixtral", tree).dense("lm_head.weight", (8, 8), 2)
    assert FamilyCuts("mixtral", {}).dense("lm_head.weight", (8, 8), 1) is None
    with pytest.raises(RoutingError, match="has no profile"):
        FamilyCuts("unheard_of", {})
