"""Every way of storing experts against the Hugging Face module that stores them so: outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from moe_train.moe.experts import loop_experts
from moe_train.moe.wrapper import LAYOUTS, ExpertWrapper

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 5, 6, 4, 11, 2

FUSED = {
    "mixtral": (MixtralExperts, "L0", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "qwen3_moe": (Qwen3MoeExperts, "L0", {"num_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "deepseek_v4": (DeepseekV4Experts, "L0*", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
    "minimax_m3_vl_text": (MiniMaxM3VLExperts, "L0*", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "aria_text": (
        AriaExperts,
        "L1",
        {"moe_num_experts": EXPERTS, "intermediate_size": INNER, "num_attention_heads": 2},
    ),
    "gpt_oss": (GptOssExperts, "L2", {"num_local_experts": EXPERTS, "intermediate_size": INNER}),
    "openai_privacy_filter": (
        OpenAIPrivacyFilterExperts,
        "L3",
        {"num_local_experts": EXPERTS, "intermediate_size": INNER},
    ),
    "nemotron_h": (NemotronHExperts, "L4", {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER}),
}


def assert_close(actual, expected, what="values"):
    scale = float(expected.detach().abs().max())
    error = float((actual.detach() - expected.detach()).abs().max())
    assert actual.shape == expected.shape
    assert error <= BOUND[expected.dtype] * scale, f"{what}: error {error:.1e} at scale {scale:.1e}"


def config_of(family, **fields):
    fields = {"hidden_size": HIDDEN, **fields}
    # its text configuration has no model type of its own in the registry
    config = MiniMaxM3VLTextConfig(**fields) if "minimax_m3" in family else AutoConfig.for_model(family, **fields)
    config._experts_implementation = "eager"
    return config


def fused(family, dtype=torch.float64):
    experts_class, _, fields = FUSED[family]
    experts = experts_class(config_of(family, **fields))
    torch.manual_seed(3)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=1.5)  # large enough for the clamps of some families to act
    return experts.to(dtype)


class GatedExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def module_list():
    torch.manual_seed(4)
    return nn.ModuleList(GatedExpert() for _ in range(EXPERTS)).double()


def draw(dtype=torch.float64):
    """Tokens, ids and weights; expert 3 gets no token."""
    generator = torch.Generator().manual_seed(7)
    x = 2 * torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(4, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    ids[ids == 3] = 4
    weights = torch.rand(TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), ids, weights.to(dtype).requires_grad_()


def combine(wrapper, x, ids, weights):
    """The block's routed output by one call of each expert."""
    y = torch.zeros_like(x)
    for expert in range(wrapper.num_experts):
        token, place = torch.where(ids == expert)
        y = y.index_add(0, token, wrapper.call_expert(expert, x[token]) * weights[token, place, None])
    return y


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in FUSED),
        # the family left out computes in float32 whatever comes in
        *((family, torch.float64) for family in FUSED if family != "openai_privacy_filter"),
    ],
)
def test_same_output_and_gradients_as_hugging_face(family, dtype):
    theirs, ours = fused(family, dtype), ExpertWrapper(fused(family, dtype))
    assert (ours.layout.code, ours.num_experts, ours.global_num_experts) == (FUSED[family][1], EXPERTS, EXPERTS)
    inputs, expected_inputs = draw(dtype), draw(dtype)
    expected = theirs(*expected_inputs)
    actual = combine(ours, *inputs)
    assert_close(actual, expected, "output")
    out_grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8), dtype=dtype)
    expected.backward(out_grad)
    actual.backward(out_grad)
    for what, place in (("x", 0), ("weights", 2)):
        assert_close(inputs[place].grad, expected_inputs[place].grad, what)
    for (name, actual_p), expected_p in zip(ours.experts.named_parameters(), theirs.parameters(), strict=True):
        assert_close(actual_p.grad, expected_p.grad, name)
        assert torch.equal(actual_p.grad[3], torch.zeros_like(actual_p[3])), f"{name}: expert 3 had no token"


def test_float64_of_a_family_that_computes_in_float32():
    """Ours keeps float64, which Hugging Face's float32 confirms to its own precision."""
    wrapper = ExpertWrapper(fused("openai_privacy_filter"))
    with torch.no_grad():
        assert_close(combine(wrapper, *draw()).float(), wrapper.experts(*draw()).float(), "output")
    narrow = ExpertWrapper(fused("openai_privacy_filter", torch.bfloat16))
    x = draw(torch.bfloat16)[0].detach()
    one = torch.zeros(TOKENS, 1, dtype=torch.int64), torch.ones(TOKENS, 1)
    assert torch.equal(narrow.call_expert(0, x), narrow.experts(x, *one))


@pytest.mark.parametrize("family", FUSED)
def test_all_experts_at_once_are_the_same_bits(family):
    rows = list(draw()[0].detach().split([3, 0, 4, 1, 3]))
    one, all_of_them = ExpertWrapper(fused(family)), ExpertWrapper(fused(family))
    separate = [one.call_expert(index, x) for index, x in enumerate(rows)]
    together = all_of_them.call_experts(rows)
    assert all(map(torch.equal, separate, together))
    torch.cat(separate).square().sum().backward()
    torch.cat(together).square().sum().backward()
    for (name, first), second in zip(one.named_parameters(), all_of_them.parameters(), strict=True):
        assert_close(second.grad, first.grad, name)
    with pytest.raises(ValueError, match="rows for 4 experts, and 5"):
        one.call_experts(rows[:4])


def test_a_module_list_calls_its_modules():
    experts = module_list()
    wrapper = ExpertWrapper(experts)
    assert (wrapper.layout.code, wrapper.num_experts) == ("list", EXPERTS)
    x = draw()[0]
    for index, expert in enumerate(experts):
        assert torch.equal(wrapper.call_expert(index, x), expert(x))
    assert [len(y) for y in wrapper.call_experts(x.split([3, 0, 4, 1, 3]))] == [3, 0, 4, 1, 3]


@pytest.mark.parametrize("index", [-1, EXPERTS, 99])
@pytest.mark.parametrize("build", [module_list, lambda: fused("mixtral")], ids=["list", "fused"])
def test_an_expert_out_of_range(build, index):
    with pytest.raises(IndexError, match="not among the 5"):
        ExpertWrapper(build()).call_expert(index, torch.zeros(2, HIDDEN, dtype=torch.float64))


@pytest.mark.parametrize("build", [module_list, *[lambda f=family: fused(f) for family in FUSED]], ids=["list", *FUSED])
def test_no_rows_give_zero_gradients(build):
    wrapper = ExpertWrapper(build())
    x = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = torch.cat([wrapper.call_expert(index, x) for index in range(EXPERTS)])
    assert y.shape == (0, HIDDEN)
    y.sum().backward()
    assert x.grad is not None
    for name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


class LeavesEarly(nn.Module):
    """An expert that does not touch its parameters when there is nothing to do."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(HIDDEN, HIDDEN), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) if len(x) else x


def test_no_rows_reach_a_module_that_leaves_early():
    wrapper = ExpertWrapper(nn.ModuleList([LeavesEarly(), LeavesEarly()]))
    wrapper.experts[1].linear.bias.requires_grad_(False)
    with torch.no_grad():
        wrapper.experts[0].linear.weight.fill_(float("inf"))  # zero times infinity must not come up
    y = torch.cat([wrapper.call_expert(0, torch.zeros(0, HIDDEN)), wrapper.call_expert(1, torch.zeros(0, HIDDEN))])
    y.sum().backward()
    assert [expert.calls for expert in wrapper.experts] == [1, 1]
    grads = {name: parameter.grad for name, parameter in wrapper.named_parameters()}
    assert grads.pop("experts.1.linear.bias") is None
    assert len(grads) == 3
    assert all(grad is not None and not grad.any() for grad in grads.values())


# ---------------------------------------------------------------------------------------------------------- slicing


@pytest.mark.parametrize("family", FUSED)
def test_a_slice_of_fused_experts_is_a_copy_of_its_share(family):
    whole, wrapper = fused(family, torch.float32), ExpertWrapper(fused(family, torch.float32))
    for parameter in wrapper.parameters():
        parameter.requires_grad_(False)
        parameter.tag = "kept"
    wrapper.slice_experts(2, 3)
    assert (wrapper.num_experts, wrapper.global_num_experts, wrapper.experts.num_experts) == (3, EXPERTS, 3)
    for name, parameter in wrapper.experts.named_parameters():
        assert torch.equal(parameter, getattr(whole, name)[2:5]), name
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4, f"{name}: the others' memory is kept"
        assert (parameter.requires_grad, parameter.dtype, parameter.tag) == (False, torch.float32, "kept")
        assert parameter.is_contiguous()
    x = torch.randn(4, HIDDEN)
    for local in range(3):
        assert torch.equal(wrapper.call_expert(local, x), ExpertWrapper(whole).call_expert(local + 2, x))
    with pytest.raises(IndexError, match="not among the 3"):
        wrapper.call_expert(3, x)


def test_a_slice_of_a_module_list_keeps_the_modules():
    experts = module_list()
    kept = [id(parameter) for parameter in experts[1:3].parameters()]
    wrapper = ExpertWrapper(experts)
    wrapper.slice_experts(1, 2)
    assert [id(parameter) for parameter in wrapper.parameters()] == kept
    assert (wrapper.num_experts, wrapper.global_num_experts) == (2, EXPERTS)
    assert next(iter(wrapper.state_dict())).startswith("experts.0.")


def test_slices_of_all_ranks_are_the_whole():
    counts, gate_up = [2, 0, 1, 2], fused("gpt_oss").gate_up_proj_bias
    parts = []
    for rank, count in enumerate(counts):
        wrapper = ExpertWrapper(fused("gpt_oss"))
        wrapper.slice_experts(sum(counts[:rank]), count)
        assert wrapper.call_experts([torch.zeros(0, HIDDEN, dtype=torch.float64)] * count) is not None
        parts.append(wrapper.experts.gate_up_proj_bias)
    assert torch.equal(torch.cat(parts), gate_up)


def test_a_slice_on_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        wrapper = ExpertWrapper(MixtralExperts(config_of("mixtral", num_local_experts=64, intermediate_size=2**20)))
    wrapper.slice_experts(60, 4)
    assert wrapper.experts.gate_up_proj.is_meta
    assert wrapper.experts.gate_up_proj.shape == (4, 2**21, HIDDEN)


@pytest.mark.parametrize("build", [module_list, lambda: fused("mixtral")], ids=["list", "fused"])
def test_slices_that_are_refused(build):
    wrapper = ExpertWrapper(build())
    for start, count in ((-1, 2), (0, -1), (0, EXPERTS + 1), (EXPERTS, 1), (3, 3), (0.0, 2), (None, 1)):
        with pytest.raises(ValueError, match="experts"):
            wrapper.slice_experts(start, count)
    assert wrapper.num_experts == EXPERTS
    wrapper.slice_experts(0, EXPERTS)
    with pytest.raises(RuntimeError, match="sliced before, to 5 of 5"):
        wrapper.slice_experts(0, 1)
    trained = ExpertWrapper(build())
    trained.call_expert(0, draw()[0]).sum().backward()
    with pytest.raises(RuntimeError, match="before training and its optimizer"):
        trained.slice_experts(0, 1)


# --------------------------------------------------------------------------------------------------------- stacking


@pytest.mark.parametrize("family", [name for name, (_, code, _) in FUSED.items() if code in ("L0", "L0*", "L1")])
def test_stacked_experts(family):
    wrapper = ExpertWrapper(fused(family))
    wrapper.slice_experts(1, 3)
    gate_up, down = wrapper.stacked()
    assert (gate_up.shape, down.shape) == ((3, 2 * INNER, HIDDEN), (3, HIDDEN, INNER))
    assert gate_up.untyped_storage().data_ptr() == wrapper.experts.gate_up_proj.untyped_storage().data_ptr()
    x = draw()[0].detach()
    for index in range(3):
        expected = F.linear(wrapper.apply_gate(F.linear(x, gate_up[index])), down[index])
        assert_close(wrapper.call_expert(index, x), expected, f"expert {index}")


def test_stacked_experts_run_in_the_loop_backend():
    from moe_train.moe.experts import ExpertWeights

    wrapper = ExpertWrapper(fused("qwen3_moe"))
    x, counts = draw()[0].detach(), [3, 0, 4, 1, 3]
    expected = torch.cat(wrapper.call_experts(x.split(counts)))
    actual = loop_experts(x, torch.tensor(counts), ExpertWeights(*wrapper.stacked()), wrapper.experts.act_fn)
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "build",
    [module_list, *[lambda f=name: fused(f) for name in ("gpt_oss", "openai_privacy_filter", "nemotron_h")]],
    ids=["list", "L2", "L3", "L4"],
)
def test_what_cannot_be_stacked(build):
    wrapper = ExpertWrapper(build())
    assert not wrapper.can_stack
    with pytest.raises(ValueError, match="cannot be stacked"):
        wrapper.stacked()


# --------------------------------------------------------------------------------------------------------- refusals


class Fused(nn.Module):
    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, gate_up=(4, 6, 2), down=(4, 2, 3), count=4):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(gate_up)), nn.Parameter(torch.randn(down))
        self.act_fn = nn.SiLU()
        if count is not None:
            self.num_experts = count


def with_attribute(**values):
    experts = Fused()
    for name, value in values.items():
        setattr(experts, name, value)
    return experts


def with_buffer():
    experts = Fused()
    experts.register_buffer("limits", torch.zeros(4))
    return experts


def without_flags():
    return Step3p7Experts(config_of("mixtral", num_local_experts=EXPERTS, moe_intermediate_size=INNER))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Fused(count=None), "Cannot determine number of experts: Fused is no ModuleList"),
        (lambda: nn.Linear(2, 2), "Cannot determine number of experts: Linear"),
        (lambda: Fused(count="4"), "Cannot determine number of experts.*is 4"),
        (lambda: Fused(gate_up=(6, 6, 2)), "says it has 4 experts.*gate_up_proj 6, down_proj 4"),
        (lambda: Fused(count=6), "says it has 6 experts.*gate_up_proj 4, down_proj 4"),
        (lambda: with_attribute(gate_up_proj=None), "has the parameters down_proj, and layout L0"),
        (lambda: with_attribute(extra=nn.Linear(2, 2)), "has the parameters .*extra.weight"),
        (lambda: with_attribute(has_bias=True), "no layout of L0.*has_bias True"),
        (lambda: with_attribute(has_gate=False), "has the parameters down_proj, gate_up_proj, and layout L4"),
        (lambda: with_attribute(is_transposed=True, has_bias=True), r"layout L3\) has no _apply_gate"),
        (lambda: with_attribute(has_post_expert_norm=True), "one weight for all experts"),
        (with_buffer, "buffer limits with a row per expert"),
        (without_flags, "no has_gate, has_bias, is_transposed, is_concatenated"),
        (lambda: nn.ModuleDict({"expert_0": nn.Linear(2, 2)}), "ModuleDict"),
    ],
)
def test_experts_that_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        ExpertWrapper(build())


@pytest.mark.parametrize(
    ("experts_class", "family", "said"),
    [
        (Llama4TextExperts, "llama4_text", "multiplies the rows by their weights before"),
        (LongcatFlashExperts, "longcat_flash", "identity experts"),
        (MuseSparkExperts, "muse_spark_text", "one weight for all experts"),
        (SwitchTransformersExperts, "switch_transformers", "ModuleDict"),
    ],
)
def test_families_that_are_refused(experts_class, family, said):
    with torch.device("meta"):
        experts = experts_class(AutoConfig.for_model(family))
    with pytest.raises(ValueError, match=said):
        ExpertWrapper(experts)


def test_a_declared_layout_does_not_open_a_refused_family():
    with torch.device("meta"):
        experts = DbrxExperts(AutoConfig.for_model("dbrx").ffn_config)
        llama = Llama4TextExperts(AutoConfig.for_model("llama4_text"))
    for refused in (experts, llama):
        with pytest.raises(ValueError, match="make it a ModuleList of experts"):
            ExpertWrapper(refused, LAYOUTS["L1"])


def test_a_declared_layout():
    """A family whose class says nothing about how it stores its experts."""
    experts = without_flags().double()
    nn.init.normal_(experts.gate_up_proj)
    nn.init.normal_(experts.down_proj)
    experts.limit = 0.5
    inputs = draw()
    assert_close(combine(ExpertWrapper(experts, LAYOUTS["L0*"]), *inputs), experts(*inputs))
    with pytest.raises(ValueError, match="layout L4 is up_proj"):
        ExpertWrapper(experts, LAYOUTS["L4"])
