"""What runs the experts, on its own: the contract that a backend keeps, and what is refused."""

import pytest
import torch
from hf_blocks import EXPERTS, HIDDEN, TOP_K, make_block, make_config, routed, tokens
from torch import nn
from user_backends import ChosenOnlyMoE, DenseMoE

from moe_train.errors import ConfigError, TopologyError
from moe_train.moe.block import MoELayer
from moe_train.moe.fused import FusedMoE, FusedMoEBase, LoopFusedMoE
from moe_train.moe.placement import SlotPlan
from moe_train.testing import assert_close


def fused_of(backend=FusedMoE, family="qwen2_moe", top_k=TOP_K, **options):
    block = make_block(family)
    shared, gate = getattr(block, "shared_expert", None), getattr(block, "shared_expert_gate", None)
    return backend(make_config(family), block.experts, shared, gate, top_k, **options), block


@pytest.mark.parametrize("backend", [FusedMoE, LoopFusedMoE, DenseMoE, ChosenOnlyMoE])
def test_a_backend_alone(backend):
    fused, block = fused_of(backend)
    x = tokens(3, 4)[0]
    ids, weights = routed(x)
    flat = x.view(12, HIDDEN)
    shared = block.shared_expert_gate(x).sigmoid() * block.shared_expert(x)
    plain = block.experts(flat, ids, weights).view(x.shape)
    assert_close(fused(x, ids, weights), plain + shared)
    assert_close(fused(x, ids.view(3, 4, 2), weights.view(3, 4, 2)), plain + shared)
    assert_close(fused(x, ids, weights, skip_shared_experts=True), plain)
    assert_close(fused(flat, ids, weights, True), plain.view(flat.shape))
    assert (fused.top_k, fused.num_experts) == (TOP_K, EXPERTS)
    single = x.float()
    assert fused.float()(single, ids, weights.float()).dtype == torch.float32


@pytest.mark.parametrize("backend", [FusedMoE, DenseMoE, ChosenOnlyMoE])
def test_rows_sorted_by_expert(backend):
    fused, _ = fused_of(backend, "gpt_oss", top_k=1)
    counts = [3, 0, 4, 1, 0, 2]
    rows = tokens(10)[0]
    expected = torch.cat([fused.experts.call_expert(e, part) for e, part in enumerate(rows.split(counts))])
    assert_close(fused.run_rows(rows, torch.tensor(counts)).detach(), expected.detach())
    assert fused.run_rows(rows[:0], torch.zeros(6, dtype=torch.int64)).shape == (0, HIDDEN)


def test_roles_have_their_attributes():
    fused, _ = fused_of()
    assert (fused.num_local_experts, fused.expert_idx_start) == (EXPERTS, 0)


def test_the_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        fused_of(FusedMoEBase)


def test_running_shared_experts_that_are_not_there():
    fused, _ = fused_of(family="mixtral")
    with pytest.raises(RuntimeError, match="no shared experts"):
        fused.run_shared_experts(tokens(2)[0])


def test_a_gate_that_is_false_is_still_a_gate():
    class Falsy(nn.Linear):
        def __bool__(self):
            return False

        def __len__(self):
            return 0

    fused, block = fused_of()
    fused.shared_experts_gate = Falsy(HIDDEN, 1, bias=False).double()
    x = tokens(5)[0]
    assert_close(fused.run_shared_experts(x), fused.shared_experts_gate(x).sigmoid() * block.shared_expert(x))


def bad_inputs():
    x = tokens(3, 4)[0]
    ids, weights = routed(x)
    return {
        "rank-1 hidden states": (x[0, 0], ids, weights, r"must be \[..., H\], not of shape \[8\]"),
        "float indices": (x, ids.double(), weights, "expert ids must be an int64 tensor"),
        "int32 indices": (x, ids.int(), weights, "expert ids must be an int64 tensor"),
        "integer weights": (x, ids, ids, "routing weights must be a floating-point tensor"),
        "K differs": (x, ids, weights[:, :1], r"routing weights have shape \[12, 1\]"),
        "another K": (x, ids[:, :1], weights[:, :1], r"expert ids have shape \[12, 1\].*top-k 2"),
        "fewer tokens": (x, ids[:-1], weights[:-1], r"topk_indices of shape \[11, 2\] do not fit"),
        "weights of fewer tokens": (x, ids, weights[:-1], r"topk_weights of shape \[11, 2\] do not fit"),
        "sequence first": (x, ids.view(4, 3, 2), weights, r"topk_indices of shape \[4, 3, 2\] do not fit"),
        "an id too high": (x, ids + 1, weights, "between 1 and 6, and the experts are 0..5"),
        "an id below 0": (x, ids - 1, weights, "between -1 and 4, and the experts are 0..5"),
        "no tensor": (x, ids.tolist(), weights, "topk_indices must be a tensor, not list"),
    }


@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("backend", [FusedMoE, DenseMoE])
def test_inputs_that_are_refused(backend, case):
    x, ids, weights, said = bad_inputs()[case]
    with pytest.raises(ValueError, match=said):
        fused_of(backend)[0](x, ids, weights)


def test_checks_can_be_switched():
    fused, _ = fused_of()
    x, (ids, weights) = tokens(3, 4)[0], routed(tokens(3, 4)[0])
    wrong = ids.clone()
    wrong[0, 0] = EXPERTS
    fused.checks = "device"
    assert torch.isfinite(fused(x, ids, weights)).all()
    with pytest.raises(RuntimeError, match=r"expert ids outside 0\.\.5"):
        fused(x, wrong, weights)
    with pytest.raises(ValueError, match="int64"):
        fused(x, ids.double(), weights)
    fused.checks = "off"
    assert torch.equal(fused.flatten(x, wrong, weights)[1], wrong)
    layer = MoELayer(make_config("mixtral"), make_block("mixtral"), checks="off")
    assert layer.fused_moe.checks == "off"


@pytest.mark.parametrize("top_k", [0, -1, EXPERTS + 1, 2.0, True, "2"])
@pytest.mark.parametrize("backend", [FusedMoE, DenseMoE])
def test_a_top_k_that_does_not_fit(backend, top_k):
    with pytest.raises(ValueError, match=r"top_k \(.*\) must be an integer between 1 and 6"):
        fused_of(backend, top_k=top_k)
    assert fused_of(backend, top_k=EXPERTS)[0].top_k == EXPERTS


def test_a_missing_top_k_says_where_it_was_looked_for():
    said = "no `top_k` was found on Qwen2MoeSparseMoeBlock .*Qwen2MoeExperts.*set MoEFieldNames.top_k"
    with pytest.raises(ValueError, match=said):
        fused_of(top_k=None)
    block = make_block("qwen3_moe")
    block.gate.top_k = None
    said = "`top_k` is None on Qwen3MoeSparseMoeBlock and its gate .Qwen3MoeTopKRouter.: set MoEFieldNames.top_k"
    with pytest.raises(ValueError, match=said):
        MoELayer(make_config("qwen3_moe"), block)
    block.gate.top_k = EXPERTS + 1
    with pytest.raises(ValueError, match=r"top_k \(7\)"):
        MoELayer(make_config("qwen3_moe"), block)


def test_no_experts():
    config = make_config("qwen2_moe")
    with pytest.raises(ValueError, match="experts is None"):
        FusedMoE(config, None, make_block("qwen2_moe").shared_expert, None, TOP_K)
    assert DenseMoE(config, None, None, None, TOP_K).num_experts == 0


def test_plans_that_do_not_fit_a_backend():
    for plan in (SlotPlan(EXPERTS + 1, 1), SlotPlan(EXPERTS, 2), SlotPlan(EXPERTS, 2, 1)):
        with pytest.raises(TopologyError, match="plan again for these"):
            fused_of(plan=plan)


# ---------------------------------------------------------------------------------------------------- fused_moe_cls


class OtherSignature(FusedMoEBase):
    def __init__(self, moe_config, experts):
        super().__init__(moe_config, experts, None, None, 2)

    forward = DenseMoE.forward


class OtherNames(DenseMoE):
    def __init__(self, a, b, c, d, e):
        super().__init__(a, b, c, d, e)


class OtherOrder(DenseMoE):
    def __init__(self, moe_config, experts, shared_experts_gate, shared_experts, top_k):
        super().__init__(moe_config, experts, shared_experts, shared_experts_gate, top_k)


class ByName(DenseMoE):
    def __init__(self, *, moe_config, experts, shared_experts, shared_experts_gate, top_k):
        super().__init__(moe_config, experts, shared_experts, shared_experts_gate, top_k)


class HandsOn(DenseMoE):
    def __init__(self, *arguments, option=1):
        super().__init__(*arguments)


class NeedsMore(DenseMoE):
    def __init__(self, moe_config, experts, shared_experts, shared_experts_gate, top_k, *, capacity):
        super().__init__(moe_config, experts, shared_experts, shared_experts_gate, top_k)


class NoForward(FusedMoEBase):
    pass


class NotABackend(nn.Module):
    pass


class WithParameters(DenseMoE):
    def __init__(self, moe_config, experts, shared_experts, shared_experts_gate, top_k):
        super().__init__(moe_config, experts, shared_experts, shared_experts_gate, top_k)
        self.extra = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (
            OtherSignature,
            r"must be constructed with \(moe_config, experts, shared_experts, shared_experts_gate, top_k\)",
        ),
        (OtherNames, "has a in the place of moe_config"),
        (OtherOrder, "has shared_experts_gate in the place of shared_experts"),
        (ByName, "must be constructed with.*positional arguments"),
        (NeedsMore, "must be constructed with.*capacity"),
        (NoForward, r"\(NoForward\) does not define forward"),
        (NotABackend, "is no FusedMoEBase"),
        (int, "is no FusedMoEBase"),
        (WithParameters, r"has tensors of its own \(extra\)"),
    ],
)
def test_classes_that_are_refused_when_built(backend, said):
    with pytest.raises(TypeError, match=said):
        MoELayer(make_config("mixtral", fused_moe_cls=backend), make_block("mixtral"))


def test_a_class_that_hands_its_arguments_on():
    layer = MoELayer(make_config("mixtral", fused_moe_cls=HandsOn), make_block("mixtral"))
    assert type(layer.fused_moe) is HandsOn


def test_an_unknown_name_of_a_backend():
    with pytest.raises(ConfigError, match=r"\(gruoped\) is none of auto, loop, grouped; did you mean grouped"):
        MoELayer(make_config("mixtral", fused_moe_cls="gruoped"), make_block("mixtral"))


def test_grouped_needs_stacked_experts_and_a_type_it_takes():
    for family in ("gpt_oss", "deepseek_v4", "nemotron_h", "list"):
        with pytest.raises(ConfigError, match=r"fused_moe_cls \(grouped\) needs experts that can be stacked"):
            MoELayer(make_config(family, fused_moe_cls="grouped"), make_block(family))
    layer = MoELayer(make_config("mixtral", fused_moe_cls="grouped"), make_block("mixtral"))
    with pytest.raises(ConfigError, match=r"takes bf16 or fp32, not torch\.float64"):
        layer(tokens(4)[0])
