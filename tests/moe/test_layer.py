"""The parallel layer against nested loops on the concatenated batch: output and every gradient, in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from naive_moe import NaiveWeights, naive_aux_loss, naive_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_train.moe import (
    ChildNames,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    RouterSpec,
    ScoreRouter,
    SlotPlan,
    router_logits,
)
from moe_train.moe.context import MoEContext as Context
from moe_train.parallel import Groups, Topology, build_groups
from moe_train.testing import assert_close, run_distributed

HIDDEN, INTERMEDIATE = 8, 8


class Router(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return router_logits(x, self.weight)


class SharedExpert(nn.Module):
    def __init__(self, gate, up, down):
        super().__init__()
        self.gate, self.up, self.down = nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down)

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


@dataclass(frozen=True)
class Case:
    """tokens: per rank. favourites: experts that all tokens are drawn to (empty: none)."""

    name: str
    experts: int
    tokens: tuple[int, ...]
    top_k: int = 2
    favourites: tuple[int, ...] = ()
    shared: bool = False
    backend: str = "loop"
    dtype: torch.dtype = torch.float64

    def __str__(self):
        return self.name


CASES = [
    Case("one rank", 6, (9,)),
    Case("even", 4, (5, 5)),
    Case("8 experts on 3 ranks", 8, (4, 4, 4)),
    Case("6 experts on 4 ranks", 6, (3, 4, 5, 6)),
    Case("3 experts on 4 ranks: one holds none", 3, (4, 4, 4, 4)),
    Case("a rank without tokens", 5, (6, 0, 5)),
    Case("all tokens to two experts", 8, (5, 6), favourites=(0, 1)),
    Case("all tokens to the last rank's experts", 6, (5, 6, 0), favourites=(4, 5)),
    Case("no tokens at all", 4, (0, 0)),
    Case("top-1", 5, (7, 2), top_k=1),
    Case("every expert", 3, (4, 3), top_k=3),
    Case("shared expert with gate", 5, (6, 3), shared=True),
    Case("grouped float32", 6, (8, 5, 0), backend="grouped", dtype=torch.float32),
    Case(
        "grouped float32, one rank, empty experts", 6, (9,), favourites=(1, 4), backend="grouped", dtype=torch.float32
    ),
    Case("grouped bfloat16", 6, (16, 24), backend="grouped", dtype=torch.bfloat16),
    Case("fused, one rank, empty experts", 6, (9,), favourites=(1, 4), backend="fused", dtype=torch.float32),
    Case("fused, one rank, no tokens", 6, (0,), backend="fused", dtype=torch.float32),
    Case("fused, one rank, bfloat16", 6, (40,), backend="fused", dtype=torch.bfloat16),
    Case("fused, 6 experts on 4 ranks", 6, (3, 0, 5, 6), backend="fused", dtype=torch.float32),
    Case("fused, a rank holds none", 3, (4, 4, 4, 4), backend="fused", dtype=torch.float32),
    Case("fused, bfloat16", 6, (16, 24), backend="fused", dtype=torch.bfloat16),
]


def make_weights(case: Case) -> NaiveWeights:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    experts, hidden, inner = case.experts, HIDDEN, INTERMEDIATE
    router = draw(experts, hidden) * 2
    if case.favourites:
        router[list(case.favourites), 0] += 1000.0
    shared = (draw(inner, hidden), draw(inner, hidden), draw(hidden, inner), draw(1, hidden)) if case.shared else ()
    return NaiveWeights(
        router, draw(experts, inner, hidden), draw(experts, inner, hidden), draw(experts, hidden, inner), shared
    )


def make_tokens(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per rank: tokens, and the gradient of the loss with respect to the output."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for count in case.tokens:
        x = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
        if case.favourites:
            x[:, 0] = x[:, 0].abs() + 0.1
        pairs.append((x, torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)))
    return pairs


def make_layer(case: Case, rank: int, groups: Groups, **options):
    weights = make_weights(case)
    plan = SlotPlan(case.experts, groups.expert.world_size)
    first, count = plan.home(groups.expert.rank_in_group)
    held = slice(first, first + count)
    gate_up = torch.cat([weights.gate[held], weights.up[held]], dim=1).to(case.dtype).requires_grad_()
    down = weights.down[held].to(case.dtype).requires_grad_()
    children: dict[str, nn.Module] = {"gate": Router(weights.router.to(case.dtype))}
    if case.shared:
        gate, up, shared_down, sigmoid_gate = weights.shared
        children["shared"] = SharedExpert(gate, up, shared_down)
        children["shared_gate"] = nn.Linear(HIDDEN, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            children["shared_gate"].weight.copy_(sigmoid_gate)
    context = MoEContext(1, case.experts, torch.device("cpu"))
    layer = ParallelMoELayer(
        children=children,
        names=ChildNames(
            router="gate",
            experts="experts",
            shared_experts="shared" if case.shared else None,
            shared_experts_gate="shared_gate" if case.shared else None,
        ),
        experts=ResidentExperts(gate_up, down),
        activation=F.silu,
        router=ScoreRouter(
            RouterSpec(num_experts=case.experts, top_k=case.top_k, score="softmax", normalize=True), None
        ),
        plan=plan,
        options=LayerOptions(backend=case.backend, **options),
        groups=groups,
        context=context,
        index=0,
    )
    return layer, gate_up, down


def run_case(rank: int, case: Case):
    world = len(case.tokens)
    layer, gate_up, down = make_layer(case, rank, build_groups(Topology(world=world, expert=world)))
    x, dy = (t.to(case.dtype) for t in make_tokens(case)[rank])
    x.requires_grad_()
    with layer.context.micro_batch():
        y = layer(x)
        (y * dy).sum().backward()
    grads = {"x": x.grad, "gate_up": gate_up.grad, "down": down.grad}
    grads |= {name: p.grad for name, p in layer.named_parameters()}
    return y.detach(), grads, layer.context.take_counts()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient(case):
    world = len(case.tokens)
    results = run_distributed(run_case, world, case)
    weights = make_weights(case)
    for leaf in weights.leaves():
        leaf.copy_(leaf.to(case.dtype)).requires_grad_()
    x = torch.cat([x for x, _ in make_tokens(case)]).to(case.dtype).double().requires_grad_()
    dy = torch.cat([dy for _, dy in make_tokens(case)]).to(case.dtype).double()
    y = naive_layer(x, weights, case.top_k)
    (y * dy).sum().backward()

    def close(actual, expected, what):
        expected = torch.zeros_like(x[:0]) if expected is None else expected
        assert_close(actual, expected.to(torch.float64), what, dtype=case.dtype, floor=1.0)

    zero = [torch.zeros_like(leaf) for leaf in weights.leaves()]
    router, gate, up, down, *shared = [
        z if t.grad is None else t.grad for t, z in zip(weights.leaves(), zero, strict=True)
    ]
    close(torch.cat([r[0] for r in results]), y.detach(), "output")
    close(torch.cat([r[1]["x"] for r in results]), x.grad if len(x) else torch.zeros_like(x), "dx")
    close(sum(r[1]["gate.weight"].double() for r in results), router, "d router")
    # an expert without a row has a zero gradient, not None: cat would fail
    holders = results[: case.experts]  # ranks beyond the experts hold none
    close(torch.cat([r[1]["gate_up"] for r in holders]), torch.cat([gate, up], dim=1), "d gate_up")
    close(torch.cat([r[1]["down"] for r in holders]), down, "d down")
    for name, expected in zip(("shared.gate", "shared.up", "shared.down", "shared_gate.weight"), shared, strict=False):
        close(sum(r[1][name] for r in results), expected, f"d {name}")
    total = sum(r[2] for r in results)
    assert int(total.sum()) == sum(case.tokens) * case.top_k


def losses(rank: int, case: Case):
    world = len(case.tokens)
    layer, _, _ = make_layer(case, rank, build_groups(Topology(world=world, expert=world)), aux_loss=True, z_loss=True)
    x = make_tokens(case)[rank][0].view(2, -1, HIDDEN)
    with layer.context.micro_batch():
        layer(x)
        found = layer.context.losses
        (found["aux_loss"] + 0.5 * found["z_loss"]).backward()
        return {k: float(v) for k, v in found.items()}, layer.gate.weight.grad  # type: ignore[union-attr]


def test_router_losses_and_their_gradient_over_ranks():
    case = Case("losses", 5, (6, 8))
    results = run_distributed(losses, 2, case)
    router = make_weights(case).router.requires_grad_()
    xs = [x for x, _ in make_tokens(case)]
    aux = sum(naive_aux_loss(x, router, 2, sequences=2) for x in xs)
    z = sum((torch.logsumexp(router @ token, 0) ** 2 for x in xs for token in x), torch.zeros(()))
    (aux + 0.5 * z).backward()
    assert sum(r[0]["aux_loss"] for r in results) == pytest.approx(float(aux.detach()), rel=1e-12)
    assert sum(r[0]["z_loss"] for r in results) == pytest.approx(float(z.detach()), rel=1e-12)
    assert_close(sum(r[1] for r in results), router.grad, "d router")


def recomputed(rank: int, case: Case, recompute: bool):
    world = len(case.tokens)
    layer, gate_up, _ = make_layer(case, rank, build_groups(Topology(world=world, expert=world)), aux_loss=True)
    context: Context = layer.context
    x, dy = make_tokens(case)[rank]
    x.requires_grad_()
    with context.micro_batch():
        if recompute:
            from contextlib import nullcontext

            y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), context.recompute()))
        else:
            y = layer(x)
        if recompute:  # a router that has changed since must not change the decision that is replayed
            with torch.no_grad():
                layer.gate.weight.add_(0)  # type: ignore[union-attr]
        ((y * dy).sum() + context.losses["aux_loss"]).backward()
        losses = float(context.losses["aux_loss"].detach())
    return gate_up.grad, layer.gate.weight.grad, x.grad, context.take_counts(), losses  # type: ignore[union-attr]


def test_recompute_changes_no_gradient_no_counter_and_no_loss():
    case = Case("recompute", 5, (6, 4))
    plain = run_distributed(recomputed, 2, case, False)
    again = run_distributed(recomputed, 2, case, True)
    for before, after in zip(plain, again, strict=True):
        assert all(torch.equal(b, a) for b, a in zip(before[:4], after[:4], strict=True))
        assert before[4] == after[4]


def replayed(rank: int):
    """Between forward and backward every logit is turned round: only a replayed decision gives the same rows."""
    case = Case("replay", 4, (5,))
    layer, gate_up, _ = make_layer(case, 0, build_groups(Topology(world=1, expert=1)))
    x, dy = make_tokens(case)[0]
    context = layer.context
    from contextlib import nullcontext

    with context.micro_batch():
        y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), context.recompute()))
        chosen = context._replays[0].topk_ids.clone()
        layer.gate.weight.data.neg_()  # type: ignore[union-attr]
        (y * dy).sum().backward()
        return chosen, gate_up.grad


def test_the_decision_of_the_first_forward_is_replayed():
    chosen, grad = replayed(0)
    used = {int(e) for e in chosen.flatten()}
    assert {e for e in range(4) if grad[e].abs().max() > 0} == used


def test_evaluation_counts_nothing():
    layer, _, _ = make_layer(Case("eval", 4, (5,)), 0, build_groups(Topology(world=1, expert=1)), aux_loss=True)
    layer.eval()
    layer(make_tokens(Case("eval", 4, (5,)))[0][0])
    assert int(layer.context.take_counts().sum()) == 0
    assert layer.context.losses == {}


def test_backends_refuse_what_they_cannot_do():
    from moe_train.errors import ConfigError
    from moe_train.moe import resolve_backend

    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, torch.float32, 8, 8) == "loop"
    assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16, 64, 64) == "grouped"
    assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16, 64, 60) == "loop"
    with pytest.raises(ConfigError, match=r"moe.backend \(grouped\).*float64"):
        resolve_backend("grouped", cpu, torch.float64, 8, 8)
    with pytest.raises(ConfigError, match=r"hidden \(12\)"):
        resolve_backend("grouped", cpu, torch.bfloat16, 12, 8)
