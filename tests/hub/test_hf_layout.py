"""The layout of a folder follows the conversions of transformers, whichever a family has, or says that it cannot."""

import pytest
import torch
from hub_runs import drawn, tensors_of
from small_configs import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import conversion_mapping as conversions
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moe_train.checkpoint import Piece
from moe_train.errors import CheckpointError, RoutingError
from moe_train.hub import FolderLayout, HubReader

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PER_EXPERT = ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
MAPPINGS = {
    "fused, as held": [WeightRenaming("nothing", "nowhere")],
    "fused under other names": [
        WeightRenaming(r"\.block\.fused_up", r"\.mlp\.experts\.gate_up_proj"),
        WeightRenaming(r"\.block\.fused_down", r"\.mlp\.experts\.down_proj"),
    ],
    "fused and transposed": [
        WeightConverter(GATE_UP, GATE_UP, [Transpose(1, 2)]),
        WeightConverter(DOWN, DOWN, [Transpose(1, 2)]),
    ],
    "transposed where shapes say so": [  # qwen3_vl_moe's: such a folder is read, and written as it is held
        WeightConverter(GATE_UP, GATE_UP, [Transpose(1, 2, check_dims=True)]),
        WeightConverter(DOWN, DOWN, [Transpose(1, 2, check_dims=True)]),
    ],
    "two stacks": [
        WeightConverter(["mlp.experts.gate", "mlp.experts.up"], GATE_UP, [Concatenate(dim=1)]),
        WeightConverter(DOWN, DOWN, [Transpose(1, 2)]),
    ],
    "one by one and transposed": [
        WeightConverter(PER_EXPERT, GATE_UP, [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("mlp.experts.*.down_proj.weight", DOWN, [MergeModulelist(dim=0), Transpose(1, 2)]),
    ],
}
CONFIG = FAMILIES["qwen3_moe"]


@pytest.fixture
def mapped(monkeypatch):
    """Give qwen3_moe another mapping from files to parameters."""

    def register(mapping):
        conversions.get_checkpoint_conversion_mapping("qwen3_moe")  # fills the cache
        monkeypatch.setitem(conversions._checkpoint_conversion_mapping_cache, "qwen3_moe", mapping)
        return AutoConfig.for_model("qwen3_moe", **CONFIG)

    return register


@pytest.mark.parametrize("name", MAPPINGS)
def test_both_directions_equal_save_pretrained(name, mapped, tmp_path):
    config = mapped(MAPPINGS[name])
    model, layout = AutoModelForCausalLM.from_config(config), FolderLayout(config)
    held = {key: drawn(key, None, tuple(value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict(held)
    model.save_pretrained(tmp_path)
    stored = tensors_of(tmp_path)
    assert layout.shapes == {key: tuple(value.shape) for key, value in stored.items()}

    reader = HubReader(tmp_path, layout)
    for (kind, key, expert), logical in layout.tensors.items():
        value = held[key] if expert is None else held[key][expert]
        assert logical.shape == tuple(value.shape)
        for place in logical.places:
            found = stored[place.name] if place.row is None else stored[place.name][place.row]
            assert torch.equal(place.take(value.flatten()), found.flatten()), place.name
        data = torch.full((value.numel() - 3,), torch.nan)
        reader.fill([Piece(name=key, expert=expert, kind=kind, shape=logical.shape, start=2, data=data)])
        assert torch.equal(data, value.flatten()[2:-1]), (key, expert)


REFUSED = {
    "one file tensor from two parameters": (
        [WeightConverter("self_attn.kv.weight", ["self_attn.k_proj.weight", "self_attn.v_proj.weight"], ["chunk"])],
        "does more than rename",
    ),
    "experts mixed": ([WeightConverter(DOWN, DOWN, [Transpose(0, 2)])], "mixes experts"),
    "other numbers": ([WeightConverter(DOWN, DOWN, ["double"])], "does more than move"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name, mapped):
    from transformers.core_model_loading import Chunk, ConversionOps

    class Double(ConversionOps):
        reverse_op = property(lambda self: self)

        def convert(self, input_dict, **kwargs):
            return {key: value[0] // 2 * 2 for key, value in input_dict.items()}

    mapping, problem = REFUSED[name]
    operations = {"chunk": Chunk(dim=0), "double": Double()}
    for converter in mapping:
        converter.operations = [operations.get(o, o) if isinstance(o, str) else o for o in converter.operations]
    config = mapped(mapping)
    with pytest.raises(RoutingError, match=problem) as caught:
        FolderLayout(config)
    assert "export and model.weights cannot follow it" in str(caught.value)


def test_a_transposed_folder_of_a_family_that_is_not_is_refused_by_shape(mapped, tmp_path):
    config = mapped(MAPPINGS["fused and transposed"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config = mapped(MAPPINGS["fused, as held"])
    with pytest.raises(CheckpointError) as caught:
        HubReader(tmp_path, FolderLayout(config))
    assert "mlp.experts.gate_up_proj: [6, 32, 48] in the folder, [6, 48, 32] in the qwen3_moe" in str(caught.value)


def test_probing_leaves_the_model_as_it_was():
    config = AutoConfig.for_model("deepseek_v3", **FAMILIES["deepseek_v3"])
    layout = FolderLayout(config)
    fresh = FolderLayout(config).model
    shapes = {name: tuple(p.shape) for name, p in fresh.named_parameters()}
    assert {name: tuple(p.shape) for name, p in layout.model.named_parameters()} == shapes
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (8, 48, 32)
    assert next(iter(layout.tensors)) == ("master", "model.embed_tokens.weight", None)
    assert ("buffer", "model.layers.1.mlp.gate.e_score_correction_bias", None) in layout.tensors
