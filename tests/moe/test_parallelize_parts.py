"""What a parallelized block is made of, and layouts, plans and blocks that are refused."""

import os

import pytest
import torch
from hf_blocks import HIDDEN, TOP_K, VOCAB, make_block, make_config
from torch import nn
from user_backends import DenseMoE, counted_collectives

from moe_train.errors import ConfigError, TopologyError
from moe_train.moe.block import MoELayer
from moe_train.moe.config import MoEConfig, MoEFieldNames
from moe_train.moe.context import MoEContext
from moe_train.moe.fused import FusedMoE
from moe_train.moe.layer import ParallelMoELayer
from moe_train.moe.parallelize import WrappedMoELayer, parallelize, plan_for
from moe_train.moe.placement import SlotPlan
from moe_train.moe.planner import plan_slots
from moe_train.moe.slots import SlotExperts
from moe_train.parallel import Groups, ParallelGroup, Topology, build_groups
from moe_train.testing import assert_close, run_distributed
from moe_train.verify.float64 import Float64

EXTERNAL, REDUNDANT = {"enable_external_shared_experts": True}, {"enable_redundant_experts": True}
BOTH, SPLIT = EXTERNAL | REDUNDANT, {"enable_shared_expert_tp": True}
COPIES = plan_slots(6, 4, 0, 2, [9, 9, 1, 1, 1, 1])
OTHER_COPIES = plan_slots(6, 4, 0, 2, [1, 1, 1, 1, 9, 9])


def one() -> Groups:
    return build_groups(Topology(world=1, expert=1))


def wrap(family="qwen2_moe", **options) -> MoELayer:
    return MoELayer(make_config(family, **options), make_block(family))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v4 hash", "gpt_oss", "list"])
def test_one_rank_sends_nothing_and_is_the_layer(family):
    torch.manual_seed(0)
    x, dy = (torch.randn(6, HIDDEN, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(VOCAB, (6,))
    with counted_collectives() as called, Float64():
        expected = wrap(family)(x, ids)
        layer = parallelize(wrap(family), one())
        y = layer(x.requires_grad_(), ids)
        (y[0] if isinstance(y, tuple) else y).backward(dy)
    assert called == []
    same = zip(*(v if isinstance(v, tuple) else (v,) for v in (y, expected)), strict=True)
    assert torch.equal(*next(same))
    assert (y[1] is None) if isinstance(y, tuple) else True
    assert all(p.grad is not None for p in layer.parameters())


def count_collectives(rank: int):
    """Of forward and backward, at expert parallelism 1 and 2 in a world of 2."""
    counted = []
    for expert in (1, 2):
        layer = parallelize(wrap("mixtral"), build_groups(Topology(world=2, expert=expert)))
        x = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
        with counted_collectives() as called:
            layer(x).sum().backward()
        counted.append(called)
    return counted


def test_collectives_are_counted():
    for without, with_experts in run_distributed(count_collectives, 2):
        assert without == []
        # counts, numbers, tokens, weights, and back; adjoints of the last three
        assert with_experts == ["all_to_all_single"] * 8


def test_names_of_a_parallel_layer():
    for family in ("qwen2_moe", "deepseek_v3", "gpt_oss", "list", "aria"):
        block = make_block(family)
        parameters = [(name, id(parameter)) for name, parameter in block.named_parameters()]
        layer = parallelize(MoELayer(make_config(family), block), one())
        # on one rank the parameters are the block's own objects
        assert sorted((name, id(parameter)) for name, parameter in layer.named_parameters()) == sorted(parameters)
        assert sorted(layer.state_dict()) == sorted(make_block(family).state_dict())


def test_losses_and_counts_go_to_the_context():
    context = MoEContext(3, 6, torch.device("cpu"))
    layer = parallelize(wrap("mixtral"), one(), context=context, index=1, aux_loss=True, z_loss=True)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    with context.micro_batch():
        layer(x)
        assert set(context.losses) == {"aux_loss", "z_loss"}
        assert float(context.losses["z_loss"].detach()) == pytest.approx(
            float(wrap("mixtral").routing(x).logits_TE.logsumexp(dim=-1).square().sum().detach())
        )
    assert context.counts_LE.sum(dim=1).tolist() == [0, 7 * TOP_K, 0]


def test_a_parallel_layer_is_made_once():
    wrapped = wrap()
    layer = parallelize(wrapped, one())
    with pytest.raises(RuntimeError, match="given to a parallel one"):
        wrapped(torch.zeros(2, HIDDEN, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="given to a parallel one"):
        parallelize(wrapped, one())
    with pytest.raises(TypeError, match="a ParallelMoELayer cannot be parallelized"):
        parallelize(layer, one())
    with pytest.raises(TypeError, match="a Qwen2MoeSparseMoeBlock cannot be parallelized: wrap the block"):
        parallelize(make_block("qwen2_moe"), one())
    with pytest.raises(RuntimeError, match="is a ParallelMoELayer already"):
        MoELayer(make_config("qwen2_moe"), layer)


def test_not_after_a_backward():
    wrapped = wrap()
    wrapped(torch.ones(2, HIDDEN, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="before training and its optimizer"):
        parallelize(wrapped, one())


def test_groups_are_needed():
    for groups in (None, one().expert):
        with pytest.raises(ValueError, match=r"groups \(.*must be those of a topology"):
            parallelize(wrap(), groups)


def pretend(rank: int = 0, **sizes) -> Groups:
    """The groups of a rank that has no other ranks to talk to."""
    topology = Topology(**sizes)

    def group(lists):
        (ranks,) = [ranks for ranks in lists if rank in ranks]
        return ParallelGroup(ranks, rank, object() if len(ranks) > 1 else None)

    kinds = ("data", "tensor", "expert", "expert_data", "expert_tensor", "token_slice", "token_gather")
    found = {kind: group(getattr(topology, f"{kind}_groups")()) for kind in kinds}
    return Groups(topology=topology, world=ParallelGroup([rank], rank), **found)


FOUR = {"world": 4, "expert": 4}


ALONE, TWO_BY_TWO = {"world": 1, "expert": 1}, {"world": 4, "expert": 2, "expert_tensor": 2}
CONFIG, TOPOLOGY = ConfigError, TopologyError


@pytest.mark.parametrize(
    ("family", "options", "sizes", "plan", "error", "said"),
    [
        ("mixtral", EXTERNAL, FOUR, None, CONFIG, "needs shared experts, and the block has no `shared_experts`"),
        ("mixtral", SPLIT, {**FOUR, "tensor": 2}, None, CONFIG, "needs shared experts"),
        ("qwen2_moe", EXTERNAL, ALONE, None, TOPOLOGY, "shared_expert_ranks .auto. needs expert"),
        ("qwen2_moe", REDUNDANT, ALONE, None, TOPOLOGY, "redundant_experts .auto. needs expert"),
        ("qwen2_moe", EXTERNAL, FOUR, SlotPlan(6, 4), TOPOLOGY, r"\(True\) and the plan's shared_ranks \(0\) must"),
        ("qwen2_moe", {}, FOUR, SlotPlan(6, 4, 1), TOPOLOGY, r"\(False\) and the plan's shared_ranks \(1\) must"),
        ("qwen2_moe", REDUNDANT, FOUR, SlotPlan(6, 4), TOPOLOGY, r"\(True\) and the plan's num_redundant \(0\)"),
        ("qwen2_moe", {}, FOUR, COPIES, TOPOLOGY, r"\(False\) and the plan's num_redundant \(2\) must agree"),
        ("qwen2_moe", {}, FOUR, SlotPlan(6, 2), TOPOLOGY, r"6 experts on parallel.expert \(2\).*6 on 4 ranks"),
        ("qwen2_moe", {}, FOUR, SlotPlan(8, 4), TOPOLOGY, "for 8 experts .*has 6 on 4 ranks"),
        ("qwen2_moe", SPLIT, {"world": 2, "expert": 1, "tensor": 2}, None, TOPOLOGY, "parallel.expert is 1"),
        ("qwen2_moe", SPLIT, FOUR, None, TOPOLOGY, "parallel.tensor is 1"),
        ("qwen2_moe", SPLIT, {"world": 8, "expert": 8, "tensor": 8}, None, TOPOLOGY, r"\(8\) must divide .*\(12\)"),
        ("qwen2_moe", {}, {**ALONE, "world": 3, "expert_tensor": 3}, None, TOPOLOGY, r"\(3\) must divide .*\(8\)"),
        ("gpt_oss", {}, TWO_BY_TWO, None, TOPOLOGY, "GptOssExperts is stored as L2"),
        ("mixtral", {"fused_moe_cls": DenseMoE}, TWO_BY_TWO, None, TOPOLOGY, "computed by DenseMoE"),
        ("qwen2_moe", EXTERNAL, TWO_BY_TWO, None, TOPOLOGY, r"expert_tensor \(2\) and .*shared_expert_ranks \(1\)"),
        ("mixtral", {"fused_moe_cls": "grouped"}, FOUR, None, CONFIG, "takes bf16 or fp32"),
    ],
)
def test_layouts_that_are_refused(family, options, sizes, plan, error, said):
    with pytest.raises(error, match=said):
        parallelize(wrap(family, **options), pretend(**sizes), plan)


def test_plans_that_do_not_exist():
    for arguments, said in (
        ((6, 4, 4), "must be below parallel.expert"),
        ((6, 4, -1), "at least 0"),
        ((6, 1, 1), "needs expert parallelism"),
        ((6, 1, 0, ((0,),)), "needs expert parallelism"),
        ((6, 2, 0, ((5,), (0, 0))), "holds"),
        ((6, 2, 0, ((5, 5), (0, 1))), "twice"),
    ):
        with pytest.raises(TopologyError, match=said):
            SlotPlan(*arguments)
    with pytest.raises(TopologyError, match="at least 0"):
        plan_slots(6, 4, 0, -1)
    with pytest.raises(TopologyError, match="must divide"):
        Topology(world=4, expert=3)


def test_flags_that_exclude_each_other():
    with pytest.raises(ConfigError, match=r"enable_shared_expert_tp \(True\)"):
        make_config("qwen2_moe", **SPLIT, **EXTERNAL)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (0, 0)), (REDUNDANT, (0, 4)), (EXTERNAL, (2, 0)), (BOTH, (2, 2))],
)
def test_the_plan_that_the_flags_ask_for(options, expected):
    """With 6 experts, top-2 on 4 ranks: ceil(4 / 3) ranks for shared experts."""
    plan = plan_for(wrap(**options), pretend(**FOUR), None)
    assert (plan.shared_ranks, plan.num_redundant) == expected


def test_shared_experts_that_cannot_be_cut():
    block = make_block("list")
    block.shared_experts = nn.Sequential(nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, HIDDEN)).double()
    layer = MoELayer(make_config("list", **SPLIT), block)
    with pytest.raises(TopologyError, match=r"cannot cut 0\.weight of the shared experts"):
        parallelize(layer, pretend(**FOUR, tensor=2))


def test_shared_experts_that_lie_deeper():
    block = make_block("qwen2_moe")
    block.more = nn.Module()
    block.more.shared, block.more.gate = block.shared_expert, block.shared_expert_gate
    del block.shared_expert, block.shared_expert_gate
    names = MoEFieldNames(shared_experts="more.shared", shared_experts_gate="more.gate")
    config = MoEConfig(module_name="Qwen2MoeSparseMoeBlock", field_names=names)
    layer = MoELayer(config, block, ignore=["shared_expert", "shared_expert_gate"])
    with pytest.raises(ConfigError, match=r"shared_experts \(more.shared\): a parallel layer needs it on the block"):
        parallelize(layer, one())


def test_a_new_plan_has_the_old_numbers():
    slots = SlotExperts(wrap("mixtral").fused_moe.experts, COPIES, pretend(**FOUR).expert, lambda module: None)
    slots.set_plan(OTHER_COPIES)
    with pytest.raises(ConfigError, match="must have the numbers of the old one"):
        slots.set_plan(plan_slots(6, 4, 0, 6))
    with pytest.raises(ConfigError, match="must have the numbers of the old one"):
        slots.set_plan(SlotPlan(6, 4, 1))


def test_experts_that_cannot_be_copied():
    def slots_of(change):
        layer = wrap("list")
        change(layer.experts)
        return SlotExperts(layer.fused_moe.experts, COPIES, pretend(**FOUR).expert, lambda module: None)

    slots_of(lambda experts: None)
    with pytest.raises(ConfigError, match="must be alike"):
        slots_of(lambda experts: setattr(experts[2], "up_proj", nn.Linear(HIDDEN, 8)))
    with pytest.raises(ConfigError, match="without buffers"):
        slots_of(lambda experts: experts[2].register_buffer("seen", torch.zeros(1)))


class OwnRows(FusedMoE):
    def run_rows(self, rows_NH, rows_per_expert):
        return 2 * super().run_rows(rows_NH, rows_per_expert)


class OwnForward(FusedMoE):
    def forward(self, *arguments, **options):
        return 2 * super().forward(*arguments, **options)


def test_a_class_derived_from_ours():
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    layer = parallelize(wrap("mixtral", fused_moe_cls=OwnRows), one())
    assert type(layer) is WrappedMoELayer
    assert_close(layer(x).detach(), 2 * wrap("mixtral")(x).detach())
    with pytest.raises(TypeError, match="OwnForward has a forward of its own"):
        parallelize(wrap("mixtral", fused_moe_cls=OwnForward), one())


class Stacking(DenseMoE):
    """A backend that keeps tensors of its own making and forgets the module."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept = [self.experts]
        del self.experts

    num_experts = 6


def test_a_backend_that_copies_cannot_reach():
    build = lambda module: Stacking(make_config("mixtral"), module, None, None, 1)  # noqa: E731
    with pytest.raises(TypeError, match="keeps no reference to the experts"):
        SlotExperts(wrap("mixtral").fused_moe.experts, COPIES, pretend(**FOUR).expert, build)


# ---------------------------------------------------------------------------------------------------- several ranks


class RefusesOnOneRank(DenseMoE):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        if self.top_k == 1 and os.environ["RANK"] == "1":
            raise ValueError("not here")


def disagree(rank: int):
    """What each rank raises for different plans or backends, a layer trained on one rank, a backend failing there."""
    groups = build_groups(Topology(world=2, expert=2))
    said = []

    def attempt(layer, plan=None):
        try:
            parallelize(layer, groups, plan)
        except (TopologyError, RuntimeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")

    plans = [plan_slots(6, 2, 0, 2, loads) for loads in ([9, 1, 1, 1, 1, 9], [1, 9, 1, 1, 9, 1])]
    attempt(wrap("mixtral", **REDUNDANT), plans[rank])
    attempt(wrap("mixtral", fused_moe_cls=("auto", "loop")[rank]))
    trained = wrap("mixtral")
    if rank:
        trained(torch.ones(2, HIDDEN, dtype=torch.float64)).sum().backward()
    attempt(trained)
    attempt(wrap("qwen2_moe", fused_moe_cls=RefusesOnOneRank, **EXTERNAL), SlotPlan(6, 2, 1))
    return said


def test_ranks_that_disagree_all_say_so():
    first, second = run_distributed(disagree, 2)
    for said in (first, second):
        assert len(said) == 4
        assert all("must be the same on all ranks" in text for text in said[:2])
        assert "gradients already" in said[2]
        assert "not here" in said[3]
    assert first[2].startswith("RuntimeError: rank 1: ")


def test_layer_classes():
    assert type(parallelize(wrap("mixtral"), one())) is ParallelMoELayer
    assert type(parallelize(wrap("gpt_oss"), one())) is WrappedMoELayer
