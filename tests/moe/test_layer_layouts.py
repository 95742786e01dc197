"""The layer at every kind of layout against nested loops on all tokens: output, every gradient, counts; float64.

Tensor-parallel peers hold the same tokens, redundant experts are fetched from their homes, shared experts lie on ranks
of their own or are cut over ranks. One run of workers per world does all of its cases.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from naive_moe import NaiveWeights, naive_aux_loss, naive_layer
from torch import nn

from moe_train.moe import (
    BorrowedModule,
    ChildNames,
    HashRouter,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    ResidentParameters,
    RouterSpec,
    ScoreRouter,
    SharedBlock,
    SlotPlan,
    SplitSharedExperts,
    plan_slots,
    router_logits,
)
from moe_train.parallel import Topology, build_groups
from moe_train.parallel.groups import subgroup
from moe_train.testing import assert_close, run_distributed

HIDDEN, INNER, TOP_K, VOCAB = 6, 24, 2, 11


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens: of each data-parallel rank. shared: none, local, split (over tensor ranks) or external."""

    world: int
    expert: int
    tokens: tuple[int, ...]
    experts: int = 6
    tensor: int = 1
    expert_tensor: int = 1
    plan: SlotPlan | None = None
    shared: str = "none"
    after: bool = False
    hashed: bool = False
    losses: bool = False
    favourites: tuple[int, ...] = ()
    masked: bool = False

    def __str__(self) -> str:
        plan = self.plan or SlotPlan(self.experts, self.expert)
        flags = [name for name in ("after", "hashed", "losses", "masked") if getattr(self, name)]
        return (
            f"w{self.world} ep{self.expert} tp{self.tensor} etp{self.expert_tensor} E{self.experts} "
            f"S{plan.shared_ranks} R{plan.num_redundant} shared-{self.shared} T{self.tokens} {' '.join(flags)}"
        )

    @property
    def topology(self) -> Topology:
        return Topology(world=self.world, expert=self.expert, tensor=self.tensor, expert_tensor=self.expert_tensor)

    @property
    def slots(self) -> SlotPlan:
        return self.plan or SlotPlan(self.experts, self.expert)


def replicated(experts: int, expert: int, redundant: int, shared: int = 0, loads=None) -> SlotPlan:
    return plan_slots(experts, expert, shared, redundant, loads)


def grids(world: int) -> list[Case]:
    """Every (tensor, data, expert, expert_tensor, expert_data) of a world, in both orders of routing."""
    sizes = [d for d in range(1, world + 1) if world % d == 0]
    found = []
    for tensor in sizes:
        for expert_tensor in (m for m in sizes if m in (1, 2, 4, world)):
            if max(tensor, expert_tensor) % min(tensor, expert_tensor):
                continue
            for expert in (d for d in sizes if world // expert_tensor % d == 0):
                tokens = tuple(3 + 2 * rank for rank in range(world // tensor))
                common = {
                    "world": world,
                    "expert": expert,
                    "tensor": tensor,
                    "expert_tensor": expert_tensor,
                    "tokens": tokens,
                }
                found += [Case(**common, after=after, shared="local") for after in (False, True)]
    return found


PROTOTYPE = [
    Case(world=4, expert=4, tokens=(5, 5, 5, 5), experts=8),
    Case(world=4, expert=4, tokens=(3, 4, 5, 6), experts=6),
    Case(world=4, expert=4, tokens=(4, 4, 4, 4), experts=3),
    Case(world=4, expert=4, tokens=(6, 0, 5, 3), experts=5),
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), experts=8, favourites=(0, 1)),
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), experts=8, plan=replicated(8, 4, 4)),
    Case(world=4, expert=4, tokens=(9, 6, 4, 3), experts=8, plan=replicated(8, 4, 2, loads=[9, 9, 1, 1, 1, 1, 1, 1]),
         favourites=(0, 1)),
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), experts=8, plan=SlotPlan(8, 4, 1), shared="external"),
    Case(world=4, expert=4, tokens=(5, 0, 4, 3), experts=8, plan=SlotPlan(8, 4, 2), shared="external"),
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), experts=6, plan=replicated(6, 4, 3, shared=1), shared="external"),
    Case(world=4, expert=2, tokens=(5, 6, 4, 3), experts=5, plan=replicated(5, 2, 3)),
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), experts=2, plan=replicated(2, 4, 4)),
    Case(world=4, expert=4, tokens=(0, 0, 0, 0), experts=5, plan=replicated(5, 4, 3, shared=1), shared="external"),
]  # fmt: skip
DOMAINS = [
    Case(world=4, expert=2, tensor=2, tokens=(27, 3), after=True),
    Case(world=4, expert=4, tensor=4, tokens=(27,)),
    Case(world=4, expert=4, tensor=4, tokens=(1,), after=True),
    Case(world=4, expert=4, tensor=4, tokens=(0,), after=True),
    Case(world=4, expert=4, tensor=2, tokens=(7, 2), shared="split"),
    Case(world=4, expert=2, tensor=4, tokens=(7,), shared="split", after=True),
    Case(world=4, expert=4, tensor=2, tokens=(7, 4), experts=6, plan=replicated(6, 4, 2)),
    Case(world=4, expert=4, tensor=2, tokens=(7, 4), experts=6, plan=SlotPlan(6, 4, 1), shared="external"),
    Case(world=4, expert=1, expert_tensor=4, tokens=(5, 0, 3, 8)),
    Case(world=4, expert=1, expert_tensor=4, tokens=(5, 0, 3, 8), after=True, shared="local"),
    Case(world=4, expert=2, expert_tensor=2, tokens=(5, 2, 3, 8), plan=replicated(6, 2, 2)),
]
HASHED = [
    Case(world=4, expert=4, tokens=(5, 6, 4, 3), hashed=True),
    *(
        Case(world=4, expert=2, tensor=tensor, tokens=tuple([7] * (4 // tensor)), hashed=True, after=after)
        for tensor in (1, 2, 4)
        for after in (False, True)
    ),
    Case(world=4, expert=1, expert_tensor=4, tokens=(5, 0, 3, 8), hashed=True, after=True),
]
LOSSES = [
    Case(world=4, expert=expert, tensor=tensor, expert_tensor=m, tokens=tuple([6] * (4 // tensor)), losses=True,
         after=after)
    for expert, tensor, m in ((4, 1, 1), (2, 2, 1), (4, 4, 1), (1, 1, 4), (2, 2, 2), (1, 2, 4))
    for after in (False, True)
]  # fmt: skip
MASKED = [
    Case(world=4, expert=4, tokens=(6, 6, 0, 6), masked=True, losses=True),
    Case(world=4, expert=2, tensor=2, tokens=(6, 8), masked=True, losses=True, after=True, shared="local"),
]


class Gate(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return router_logits(x, self.weight)


class SharedMLP(nn.Module):
    def __init__(self, gate, up, down):
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w.clone()) for w in (gate, up, down))

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class SigmoidGate(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return F.linear(x, self.weight)


def make_weights(case: Case) -> NaiveWeights:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    router = draw(case.experts, HIDDEN) * 2
    if case.favourites:
        router[list(case.favourites), 0] += 1000.0
    gate, up, down = (
        draw(case.experts, INNER, HIDDEN),
        draw(case.experts, INNER, HIDDEN),
        draw(case.experts, HIDDEN, INNER),
    )
    shared = (draw(INNER, HIDDEN), draw(INNER, HIDDEN), draw(HIDDEN, INNER), draw(1, HIDDEN))
    return NaiveWeights(router, gate, up, down, shared if case.shared != "none" else ())


def make_tokens(case: Case):
    """Per data-parallel rank: tokens, gradient of the output, ids, which tokens are real."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for count in case.tokens:
        x, dy = (torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
        if case.favourites:
            x[:, 0] = x[:, 0].abs() + 0.1
        ids = torch.randint(VOCAB, (count,), generator=generator)
        mask = torch.rand(count, generator=generator) < 0.7 if case.masked else torch.ones(count, dtype=torch.bool)
        if case.masked and count:
            mask[[0, -1]] = True  # both sequences keep a token
        found.append((x, dy, ids, mask))
    return found


def hash_table(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(case.experts, generator=generator)[:TOP_K] for _ in range(VOCAB)])


def make_layer(case: Case, groups, shared_group):
    weights, plan, rank = make_weights(case), case.slots, groups.expert.rank_in_group
    first, count = plan.home(rank)
    part = INNER // case.expert_tensor
    cut = slice(groups.expert_tensor.rank_in_group * part, (groups.expert_tensor.rank_in_group + 1) * part)
    held = slice(first, first + count)
    gate_up = torch.cat([weights.gate[held][:, cut], weights.up[held][:, cut]], dim=1).clone().requires_grad_()
    down = weights.down[held][:, :, cut].clone().requires_grad_()
    children: dict[str, nn.Module] = {"gate": Gate(weights.router)}
    external = split = None
    leaves: dict[str, torch.Tensor] = {}
    if case.shared != "none":
        s_gate, s_up, s_down, s_sigmoid = weights.shared
        parts = {"shared": SharedMLP(s_gate, s_up, s_down), "shared_gate": SigmoidGate(s_sigmoid)}
        if case.shared == "local":
            children |= parts
        elif case.shared == "external" and rank < plan.shared_ranks:
            block = SharedBlock(parts)
            leaves = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
            external = BorrowedModule(block, ResidentParameters(leaves, shared_group))
        elif case.shared == "split":
            children["shared_gate"] = parts["shared_gate"]
            width = INNER // case.tensor
            mine = slice(groups.tensor.rank_in_group * width, (groups.tensor.rank_in_group + 1) * width)
            leaves = {"shared.gate": s_gate[mine], "shared.up": s_up[mine], "shared.down": s_down[:, mine]}
            leaves = {name: p.clone().requires_grad_() for name, p in leaves.items()}
            block = SharedBlock({"shared": parts["shared"]})
            split = SplitSharedExperts(BorrowedModule(block, ResidentParameters(leaves)), groups.tensor)
    spec = RouterSpec(num_experts=case.experts, top_k=TOP_K, score="softmax", normalize=not case.hashed)
    has_shared = case.shared != "none"
    layer = ParallelMoELayer(
        children=children,
        names=ChildNames(
            router="gate",
            experts="experts",
            shared_experts="shared" if has_shared else None,
            shared_experts_gate="shared_gate" if has_shared else None,
        ),
        router=HashRouter(spec, lambda gate: hash_table(case)) if case.hashed else ScoreRouter(spec, None),
        experts=ResidentExperts(gate_up, down, plan, groups.expert),
        activation=F.silu,
        plan=plan,
        options=LayerOptions(
            backend="loop", aux_loss=case.losses, z_loss=case.losses, route_after_dp_transform=case.after
        ),
        groups=groups,
        context=MoEContext(1, case.experts, torch.device("cpu")),
        index=0,
        external_shared=external,
        split_shared=split,
    )
    layer.sum_partial_gradients()
    return layer, gate_up, down, leaves


def run_cases(rank: int, cases: list[Case]):
    made: dict = {}
    results = []
    for case in cases:
        topology = case.topology
        if topology not in made:
            made[topology] = build_groups(topology)
        groups = made[topology]
        shared_group = None
        if case.slots.shared_ranks:
            holders = sorted(r for ep in topology.expert_groups() for r in ep[: case.slots.shared_ranks])
            shared_group = subgroup([holders])
        layer, gate_up, down, leaves = make_layer(case, groups, shared_group)
        x, dy, ids, mask = make_tokens(case)[groups.data.rank_in_group]
        x.requires_grad_()
        sequences = 2 if case.losses else 1
        view = x.view(sequences, -1, HIDDEN)
        with layer.context.micro_batch():
            y = layer(view, input_ids=ids if case.hashed else None, token_mask=mask if case.masked else None)
            objective = (y.reshape(-1, HIDDEN) * dy).sum()
            objective = objective + sum(layer.context.losses.values())
            objective.backward()
            losses = {name: float(value.detach()) for name, value in layer.context.losses.items()}
        grads = {"x": x.grad, "gate_up": gate_up.grad, "down": down.grad}
        grads |= {name: p.grad for name, p in layer.named_parameters()}
        grads |= {f"leaf {name}": p.grad for name, p in leaves.items()}
        results.append((y.detach().reshape(-1, HIDDEN), grads, layer.context.take_counts()[0], losses))
    return results


def naive(case: Case):
    """Everything on one process: y, gradients by name, losses."""
    weights = make_weights(case)
    for leaf in weights.leaves():
        leaf.requires_grad_()
    batches = make_tokens(case)
    xs = [x.requires_grad_() for x, _, _, _ in batches]
    outputs, total, losses = [], torch.zeros((), dtype=torch.float64), {"aux_loss": 0.0, "z_loss": 0.0}
    for x, (_, dy, ids, mask) in zip(xs, batches, strict=True):
        real = x[mask]
        chosen = hash_table(case)[ids[mask]].tolist() if case.hashed else None
        y = torch.zeros_like(x).index_copy(0, mask.nonzero().squeeze(1), naive_layer(
            real, weights, TOP_K, normalize=not case.hashed, chosen=chosen
        ))  # fmt: skip
        outputs.append(y)
        total = total + (y * dy).sum()
        if case.losses and len(x):
            half = len(x) // 2
            for block in (x[:half][mask[:half]], x[half:][mask[half:]]):
                aux = naive_aux_loss(block, weights.router, TOP_K, sequences=1)
                losses["aux_loss"] += float(aux.detach())
                total = total + aux
            z = sum((torch.logsumexp(weights.router @ token, 0) ** 2 for token in real), torch.zeros(()))
            losses["z_loss"] += float(z.detach())
            total = total + z
    total.backward()
    router, gate, up, down, *shared = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in weights.leaves()
    ]
    names = ("shared.gate", "shared.up", "shared.down", "shared_gate.weight")
    grads = {"router": router, "gate": gate, "up": up, "down": down, **dict(zip(names, shared, strict=False))}
    return [y.detach() for y in outputs], [x.grad for x in xs], grads, losses


def compare(case: Case, ranks) -> None:
    outputs, dxs, grads, losses = naive(case)
    topology, plan = case.topology, case.slots

    def close(actual, expected, what):
        assert_close(actual, expected, f"{case}: {what}", floor=1.0)

    for rank, (y, found, _, _) in enumerate(ranks):
        close(y, outputs[rank // case.tensor], f"output of rank {rank}")
        dx = dxs[rank // case.tensor]
        close(found["x"], torch.zeros_like(y) if dx is None else dx, f"dx of rank {rank}")
    peers = topology.tensor_groups()
    for group in peers:  # what a tensor group replicates is equal on it, and summed over the data-parallel ranks
        for rank in group[1:]:
            close(ranks[rank][1]["gate.weight"], ranks[group[0]][1]["gate.weight"], "d router of tensor peers")
    close(sum(ranks[group[0]][1]["gate.weight"] for group in peers), grads["router"], "d router")
    half = INNER // case.expert_tensor
    for block in topology.expert_groups():
        etp = block[0] % case.expert_tensor
        copies = [r for r in range(case.world) if r % (case.expert * case.expert_tensor) in {
            b % (case.expert * case.expert_tensor) for b in block}]  # fmt: skip
        cut = slice(etp * half, (etp + 1) * half)
        for place, first_rank in enumerate(block):
            first, count = plan.home(place)
            holders = [r for r in copies if (r - first_rank) % (case.expert * case.expert_tensor) == 0]
            gate_up = sum(ranks[r][1]["gate_up"] for r in holders)
            down = sum(ranks[r][1]["down"] for r in holders)
            held = slice(first, first + count)
            close(gate_up, torch.cat([grads["gate"][held][:, cut], grads["up"][held][:, cut]], dim=1), "d gate_up")
            close(down, grads["down"][held][:, :, cut], "d down")
    if case.shared == "local":
        for name in ("shared.gate", "shared.up", "shared.down", "shared_gate.weight"):
            close(sum(ranks[group[0]][1][name] for group in peers), grads[name], f"d {name}")
    elif case.shared == "split":
        close(sum(ranks[g[0]][1]["shared_gate.weight"] for g in peers), grads["shared_gate.weight"], "d shared gate")
        for name, dim in (("shared.gate", 0), ("shared.up", 0), ("shared.down", 1)):
            parts = [sum(ranks[g[t]][1][f"leaf {name}"] for g in peers) for t in range(case.tensor)]
            close(torch.cat(parts, dim=dim), grads[name], f"d {name}")
    elif case.shared == "external":
        holders = [r for ep in topology.expert_groups() for r in ep[: plan.shared_ranks]]
        for name in ("shared.gate", "shared.up", "shared.down", "shared_gate.weight"):
            for rank in holders:  # the sum is over all holders already
                close(ranks[rank][1][f"leaf {name}"], grads[name], f"d {name} on rank {rank}")
    real = sum(int(mask.sum()) for _, _, _, mask in make_tokens(case))
    assert int(sum(r[2].sum() for r in ranks)) == real * TOP_K, case
    if case.losses:
        for name, value in losses.items():
            total = sum(ranks[group[0]][3][name] for group in peers)
            assert total == pytest.approx(value, rel=1e-12), (case, name)


def check(cases: list[Case]) -> None:
    by_rank = run_distributed(run_cases, cases[0].world, cases)
    for number, case in enumerate(cases):
        compare(case, [results[number] for results in by_rank])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_grid(world):
    check(grids(world))


@pytest.mark.slow
def test_every_grid_of_eight_ranks():
    check(grids(8))


@pytest.mark.parametrize(
    "cases", [PROTOTYPE, DOMAINS, HASHED, LOSSES, MASKED], ids=["plans", "domains", "hashed", "losses", "masked"]
)
def test_layouts(cases):
    check(cases)


def peers_that_disagree(rank: int, after: bool):
    """Both ranks of an expert-tensor group route the same tokens; the second one's router is off by a little."""
    case = Case(world=2, expert=1, tensor=2, expert_tensor=2, tokens=(300,), after=after)
    groups = build_groups(case.topology)
    layer, _, _, _ = make_layer(case, groups, None)
    if rank == 1:
        with torch.no_grad():
            layer.gate.weight.mul_(1 + 2e-2 * torch.rand_like(layer.gate.weight))  # type: ignore[union-attr]
    x = make_tokens(case)[0][0]
    own = layer.gate_router.route(layer.gate, x, None, None).topk_ids_TK  # type: ignore[arg-type]
    with layer.context.micro_batch():
        return layer(x).detach(), own


@pytest.mark.parametrize("after", [False, True])
def test_ranks_that_share_tokens_follow_the_first_ones_choice(after):
    """Halves of two different experts, added up, would be nobody's output."""
    case = Case(world=2, expert=1, tensor=2, expert_tensor=2, tokens=(300,), after=after)
    (first, chosen), (second, others) = run_distributed(peers_that_disagree, 2, after)
    assert not torch.equal(chosen, others), "the second router must choose otherwise somewhere, or this shows nothing"
    expected = naive_layer(make_tokens(case)[0][0], make_weights(case), TOP_K)
    for found in (first, second):
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
