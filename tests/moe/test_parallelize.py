"""A parallelized block against the Hugging Face block on all tokens: two steps of training, in float64.

One run of workers per world does all of its cases. Gradients are summed over the groups that `gradient_groups` names.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hf_blocks import HIDDEN, TOP_K, VOCAB, call, make_block, make_config, routed
from torch import nn
from user_backends import ChosenOnlyMoE, DenseMoE

from moe_train.moe.block import MoELayer
from moe_train.moe.fused import FusedMoE
from moe_train.moe.parallelize import gradient_groups, parallelize, replan
from moe_train.moe.placement import SlotPlan
from moe_train.moe.planner import plan_slots
from moe_train.parallel import Groups, ParallelGroup, Topology, build_groups
from moe_train.testing import assert_close, run_distributed
from moe_train.verify.float64 import Float64

RATE, STEPS = 0.05, 2
SHARED = {"qwen2_moe": ("shared_expert", "shared_expert_gate")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens: of each data-parallel rank. plan None: as the flags in `options` ask. then: the second step's plan.

    alone: the backend itself over the expert group, without a layer around it.
    """

    family: str
    expert: int
    tokens: tuple[int, ...]
    tensor: int = 1
    expert_tensor: int = 1
    plan: SlotPlan | None = None
    then: SlotPlan | None = None
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    alone: bool = False

    def __str__(self) -> str:
        options = {name: getattr(value, "__name__", value) for name, value in self.options.items()}
        return (
            f"{self.family} T{self.tokens} ep{self.expert} tp{self.tensor} etp{self.expert_tensor} {self.plan} "
            f"{options} {'alone' if self.alone else ''}"
        )

    @property
    def topology(self) -> Topology:
        world = len(self.tokens) * self.tensor
        return Topology(world=world, expert=self.expert, tensor=self.tensor, expert_tensor=self.expert_tensor)

    @property
    def num_experts(self) -> int:
        return 8 if self.family in ("deepseek_v3", "glm4_moe") else 6

    @property
    def resolved(self) -> SlotPlan:
        return self.plan or SlotPlan(self.num_experts, self.expert)


EXTERNAL, REDUNDANT = {"enable_external_shared_experts": True}, {"enable_redundant_experts": True}
BOTH, SPLIT = EXTERNAL | REDUNDANT, {"enable_shared_expert_tp": True}
AFTER = {"route_after_dp_transform": True}
EVEN, UNEVEN, IDLE = (5, 5, 5, 5), (3, 4, 5, 6), (6, 0, 5, 3)
COPIES = plan_slots(6, 4, 0, 2, [9, 9, 1, 1, 1, 1])
OTHER_COPIES = plan_slots(6, 4, 0, 2, [1, 1, 1, 1, 9, 9])


def user(backend, **options):
    return {"fused_moe_cls": backend, **options}


WORLDS = {
    2: [
        Case(family="deepseek_v3", expert=2, tokens=(5, 5)),
        Case(family="list", expert=2, tokens=(4, 0)),
        Case(family="gpt_oss", expert=2, tokens=(4, 7)),
        Case(family="mixtral", expert=1, tokens=(4, 7)),
        Case(family="mixtral", expert=2, tokens=(4, 7), options=REDUNDANT, plan=plan_slots(6, 2, 0, 2)),
        Case(family="qwen2_moe", expert=2, tokens=(4, 7), options=EXTERNAL, plan=SlotPlan(6, 2, 1)),
        Case(family="glm4_moe", expert=2, tensor=2, tokens=(7,), options=SPLIT),
    ],
    3: [
        Case(family="qwen3_moe", expert=3, tokens=(3, 4, 5)),
        Case(family="deepseek_v3", expert=3, tokens=(3, 0, 5)),
        Case(family="list", expert=3, tokens=(3, 4, 5), options=BOTH, plan=plan_slots(6, 3, 1, 2)),
        Case(family="nemotron_h", expert=3, tokens=(3, 4, 5), options=BOTH, plan=plan_slots(6, 3, 1, 2)),
        Case(family="aria", expert=3, tokens=(3, 4, 5), options=BOTH, plan=plan_slots(6, 3, 1, 2)),
    ],
    4: [
        Case(family="deepseek_v3", expert=4, tokens=EVEN),
        Case(family="mixtral", expert=4, tokens=UNEVEN),
        Case(family="qwen3_moe", expert=4, tokens=IDLE),
        Case(family="qwen2_moe", expert=4, tokens=UNEVEN),
        Case(family="aria", expert=4, tokens=UNEVEN),
        Case(family="minimax_m3_vl", expert=4, tokens=UNEVEN),
        Case(family="deepseek_v4", expert=2, tokens=UNEVEN),
        Case(family="deepseek_v4 hash", expert=4, tokens=UNEVEN),
        Case(family="deepseek_v4 hash", expert=4, tensor=2, tokens=(7, 3), options=AFTER),
        *(
            Case(family=family, expert=4, tokens=UNEVEN, plan=COPIES, then=OTHER_COPIES, options=REDUNDANT)
            for family in ("mixtral", "aria", "gpt_oss", "nemotron_h", "deepseek_v4 hash", "list")
        ),
        Case(family="qwen2_moe", expert=2, tokens=UNEVEN, plan=plan_slots(6, 2, 0, 3), options=REDUNDANT),
        *(
            Case(family=family, expert=4, tokens=IDLE, plan=SlotPlan(6, 4, 1), options=EXTERNAL)
            for family in ("qwen2_moe", "list", "nemotron_h")
        ),
        Case(family="qwen2_moe", expert=2, tokens=UNEVEN, plan=SlotPlan(6, 2, 1), options=EXTERNAL),
        Case(family="qwen2_moe", expert=4, tokens=UNEVEN, plan=plan_slots(6, 4, 2, 3), options=BOTH),
        Case(family="qwen2_moe", expert=4, tensor=2, tokens=(7, 4), plan=plan_slots(6, 4, 1, 3), options=EXTERNAL),
        Case(family="qwen2_moe", expert=4, tensor=2, tokens=(7, 4)),
        Case(family="qwen2_moe", expert=4, tensor=2, tokens=(7, 4), options=AFTER),
        Case(family="qwen2_moe", expert=4, tensor=2, tokens=(7, 4), options=SPLIT),
        Case(family="qwen2_moe", expert=2, tensor=4, tokens=(7,), options=SPLIT | AFTER),
        Case(family="list", expert=4, tensor=2, tokens=(1, 6), options=SPLIT),
        Case(family="deepseek_v3", expert=2, tensor=2, tokens=(7, 4), options=SPLIT),
        Case(family="mixtral", expert=2, expert_tensor=2, tokens=UNEVEN),
        Case(family="aria", expert=2, expert_tensor=2, tokens=UNEVEN, plan=plan_slots(6, 2, 0, 2), options=REDUNDANT),
        Case(family="qwen2_moe", expert=2, expert_tensor=2, tensor=2, tokens=(7, 4), options=SPLIT),
        Case(family="qwen2_moe", expert=1, expert_tensor=4, tokens=UNEVEN, options=AFTER),
        *(
            Case(family=family, expert=4, tokens=IDLE, plan=plan, options=user(backend, **options))
            for backend in (DenseMoE, ChosenOnlyMoE)
            for family, plan, options in (
                ("mixtral", COPIES, REDUNDANT),
                ("gpt_oss", COPIES, REDUNDANT),
                ("list", COPIES, REDUNDANT),
                ("qwen2_moe", plan_slots(6, 4, 1, 3), BOTH),
                ("deepseek_v3", None, {}),
            )
        ),
        *(
            Case(family=family, expert=4, tokens=(8, 4, 0, 3), plan=plan, options=user("grouped", **options),
                 dtype=torch.float32)
            for family, plan, options in (
                ("mixtral", COPIES, REDUNDANT),
                ("aria", None, {}),
                ("qwen2_moe", plan_slots(6, 4, 1, 3), BOTH),
            )
        ),
        *(
            Case(family=family, expert=4, tokens=IDLE, plan=plan, alone=True)
            for family, plan in (
                ("mixtral", None),
                ("mixtral", COPIES),
                ("gpt_oss", COPIES),
                ("qwen2_moe", SlotPlan(6, 4, 2)),
                ("qwen2_moe", plan_slots(6, 4, 1, 3)),
            )
        ),
        Case(family="qwen2_moe", expert=2, tokens=UNEVEN, plan=plan_slots(6, 2, 1, 0), alone=True),
    ],
}  # fmt: skip


def batches(case: Case):
    """Per data-parallel rank: hidden states, ids, gradient of the output."""
    generator = torch.Generator().manual_seed(3)

    def draw(count):
        x, dy = (torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).to(case.dtype) for _ in range(2))
        return x, torch.randint(VOCAB, (count,), generator=generator), dy

    return [draw(count) for count in case.tokens]


def wide(case: Case):
    return Float64() if case.dtype == torch.float64 else torch.enable_grad()


# ------------------------------------------------------------------------------------------------------------- workers


class Alone(nn.Module):
    """The backend over an expert group, after a choice that needs no gate."""

    def __init__(self, case: Case, groups: Groups):
        super().__init__()
        block, config = make_block(case.family), make_config(case.family)
        shared = [getattr(block, name, None) for name in ("shared_expert", "shared_expert_gate")]
        self.fused = FusedMoE(config, block.experts, *shared, TOP_K, groups=groups, plan=case.plan)
        self.rank, self.groups = groups.data.rank_in_group, groups

    def forward(self, x, ids):
        return self.fused(x, *routed(x))


def run_cases(rank: int, cases: list[Case]):
    made: dict[Topology, Groups] = {}
    results = []
    for case in cases:
        if case.topology not in made:
            made[case.topology] = build_groups(case.topology)
        results.append(run_case(case, made[case.topology]))
    return results


def run_case(case: Case, groups: Groups):
    if case.alone:
        layer, summed = Alone(case, groups), {}
        for name, _ in layer.named_parameters():
            external = "shared" in name and case.resolved.shared_ranks
            summed[name] = (
                ParallelGroup.single() if external else groups.expert_data if ".experts." in name else groups.data
            )
    else:
        wrapped = MoELayer(make_config(case.family, **case.options), make_block(case.family, case.dtype))
        layer = parallelize(wrapped, groups, case.plan)
        summed = gradient_groups(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
    x, ids, dy = batches(case)[groups.data.rank_in_group]
    x.requires_grad_()
    outputs, grads = [], {}
    for step in range(STEPS):
        if step and case.then is not None:
            replan(layer, case.then)
        x.grad = None
        layer.zero_grad()
        with wide(case):
            y = layer(x, ids)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(dy)
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{case}: {name}"
            summed[name].all_reduce_(parameter.grad)
        outputs.append(y.detach())
        if not step:
            grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()} | {"x": x.grad}
        optimizer.step()
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    kind = type(layer).__name__
    sizes = {name: p.untyped_storage().nbytes() // p.element_size() for name, p in layer.named_parameters()}
    return {"outputs": outputs, "grads": grads, "values": values, "kind": kind, "sizes": sizes}


# ---------------------------------------------------------------------------------------------------- one process


def reference(case: Case):
    """The family's own block on everything: outputs by step, first gradients, values at the end."""
    block = make_block(case.family, case.dtype)
    rows = batches(case)
    x, ids, dy = (torch.cat([entry[place] for entry in rows]) for place in range(3))
    x.requires_grad_()
    optimizer = torch.optim.SGD(block.parameters(), lr=RATE)
    outputs, grads = [], {}
    for step in range(STEPS):
        x.grad = None
        block.zero_grad()
        with wide(case):
            if case.alone:
                choices = [routed(entry[0]) for entry in rows]
                y = block.experts(x, *(torch.cat([choice[place] for choice in choices]) for place in range(2)))
                if case.family == "qwen2_moe":
                    y = y + block.shared_expert_gate(x).sigmoid() * block.shared_expert(x)
            else:
                y = call(block, x.unsqueeze(0), ids.unsqueeze(0)).squeeze(0)
            y.backward(dy)
        outputs.append(y.detach())
        if not step:
            zeros = {name: torch.zeros_like(p) for name, p in block.named_parameters()}
            grads = zeros | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
            grads["x"] = x.grad
        optimizer.step()
    return outputs, grads, {name: parameter.detach() for name, parameter in block.named_parameters()}


def expected_names(case: Case, names, place: int) -> set[str]:
    """What a rank of an expert group registers, by the block's names."""
    first, count = case.resolved.home(place)
    kept = set()
    for name in names:
        if (
            case.family == "list"
            and name.startswith("experts.")
            and not first <= int(name.split(".")[1]) < first + count
        ):
            continue
        if name.startswith("shared") and place >= case.resolved.shared_ranks > 0:
            continue
        if case.alone and name.startswith(("gate", "router")):
            continue
        kept.add(name)
    return kept


def family_name(case: Case, name: str) -> str:
    """A parameter's name in the block."""
    if not case.alone:
        return name
    name = name.removeprefix("fused.").replace("experts.experts.", "experts.")
    return name.replace("shared_experts", "shared_expert")


def part_of(case: Case, name: str, value: torch.Tensor, rank: int, place: int) -> torch.Tensor:
    """A rank's part of a parameter of the block."""
    first, count = case.resolved.home(place)
    if name.startswith("experts.") and case.family != "list":
        value = value[first : first + count]
        m, transposed = case.expert_tensor, case.family == "aria"
        if m > 1:
            dim = (2 if transposed else 1) if "gate_up" in name else (1 if transposed else 2)
            halves = value.chunk(2, dim) if "gate_up" in name else [value]
            value = torch.cat([half.chunk(m, dim)[rank % m] for half in halves], dim)
    elif name.startswith("shared") and "_gate." not in name and case.options.get("enable_shared_expert_tp"):
        value = value.chunk(case.tensor, 1 if "down" in name else 0)[rank % case.tensor]
    return value


def compare(case: Case, ranks) -> None:
    outputs, grads, values = reference(case)
    starts = [sum(case.tokens[:index]) for index in range(len(case.tokens) + 1)]
    place_of = {rank: place for group in case.topology.expert_groups() for place, rank in enumerate(group)}

    def close(actual, expected, what):
        assert_close(actual, expected, f"{case}: {what}", dtype=case.dtype, floor=1.0)

    for rank, found in enumerate(ranks):
        mine = slice(*starts[rank // case.tensor : rank // case.tensor + 2])
        for step in range(STEPS):
            close(found["outputs"][step], outputs[step][mine], f"output of rank {rank}, step {step}")
        close(found["grads"].pop("x"), grads["x"][mine], f"dx of rank {rank}")
        for what, wanted in (("grads", grads), ("values", values)):
            named = {family_name(case, name): value for name, value in found[what].items()}
            assert set(named) == expected_names(case, values, place_of[rank]), f"{case}: rank {rank}"
            for name, value in named.items():
                close(value, part_of(case, name, wanted[name], rank, place_of[rank]), f"{what} {name} of rank {rank}")
        for name, value in found["values"].items():
            assert found["sizes"][name] == value.numel(), f"{case}: {name} keeps the memory of others"
        if not case.alone:
            plain = case.family in ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe", "aria")
            own = case.options.get("fused_moe_cls") in (DenseMoE, ChosenOnlyMoE)
            assert found["kind"] == ("ParallelMoELayer" if plain and not own else "WrappedMoELayer"), case


@pytest.mark.parametrize("world", WORLDS)
def test_same_numbers_at_every_layout(world):
    by_rank = run_distributed(run_cases, world, WORLDS[world])
    for number, case in enumerate(WORLDS[world]):
        compare(case, [results[number] for results in by_rank])
