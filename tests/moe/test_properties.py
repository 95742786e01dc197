"""Properties over sizes, ranks, top-k and token counts (0 included), on live gloo workers: dispatch and domains."""

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.moe import SlotPlan, check_counts, plan_slots
from moe_train.moe.dispatch import Destinations, by_expert, combine, count_ids, dispatch, plan_dispatch
from moe_train.moe.domain import TokenDomain
from moe_train.parallel import Topology, build_groups
from moe_train.testing import assert_close, run_distributed

ON_WORKERS = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None
)
HIDDEN = 3
GROUPS: dict = {}


def groups_of(topology: Topology):
    """Kept in the worker: a new set of groups per example would end at the limit of open sockets."""
    if topology not in GROUPS:
        GROUPS[topology] = build_groups(topology)
    return GROUPS[topology]


@dataclass(frozen=True)
class Sent:
    """top_k: of the first rank, and every other one; that of the rest is one more, if there are as many experts."""

    plan: SlotPlan
    top_k: int
    tokens: tuple[int, ...]
    seed: int


@st.composite
def sent(draw) -> Sent:
    world, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    shared = draw(st.integers(0, world - 1))
    most = experts * (world - shared - 1)
    redundant = draw(st.integers(0, min(most, 6)))
    loads = draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    check_counts(experts, world, shared, redundant)
    return Sent(
        plan_slots(experts, world, shared, redundant, loads),
        draw(st.integers(1, experts)),
        tuple(draw(st.lists(st.integers(0, 6), min_size=world, max_size=world))),
        draw(st.integers(0, 9999)),
    )


def drawn(example: Sent, rank: int):
    generator = torch.Generator().manual_seed(example.seed + rank)
    tokens, experts = example.tokens[rank], example.plan.num_experts
    top_k = min(example.top_k + rank % 2, experts)
    x, dy = (torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    return x, dy, scores.topk(top_k, dim=1).indices, torch.rand(tokens, top_k, generator=generator)


def there_and_back(rank: int, example: Sent):
    """Expert e multiplies by e + 1, the shared expert by -1."""
    world = example.plan.world_size
    group = groups_of(Topology(world=world, expert=world)).expert
    x, dy, ids, weights = drawn(example, rank)
    x.requires_grad_()
    weights = weights.double().requires_grad_()
    destinations = Destinations(example.plan, rank, torch.device("cpu"))
    plan = plan_dispatch(ids, destinations, group)
    held = [e + 1.0 for e in example.plan.slots(rank)] if rank >= example.plan.shared_ranks else [-1.0]
    factors = torch.tensor(held, dtype=torch.float64)
    x_NH, weights_NC = dispatch(x, weights, plan, group)
    y_NH = by_expert(x_NH, weights_NC, plan, lambda rows, n: rows * factors.repeat_interleave(n).unsqueeze(1))
    y = combine(y_NH, plan, group)
    (y * dy).sum().backward()
    goes = [{bisect(list(accumulate(destinations.per_rank)), d) for d in row} for row in destinations.of(ids).tolist()]
    sent = None if plan.travel is None else (plan.travel.send_rows, [sum(r in g for g in goes) for r in range(world)])
    return y.detach(), x.grad, weights.grad, plan.rows_per_slot.tolist(), sent


@given(example=sent())
@ON_WORKERS
def test_every_copy_meets_its_expert_and_comes_back(example):
    results = run_distributed(there_and_back, example.plan.world_size, example)
    shared = -1.0 if example.plan.shared_ranks else 0.0
    received = torch.zeros(example.plan.num_experts, dtype=torch.int64)
    sent_to = torch.zeros_like(received)
    for rank, (y, dx, dweights, rows, sent) in enumerate(results):
        x, dy, ids, weights = drawn(example, rank)
        factor = ((ids + 1) * weights.double()).sum(dim=1, keepdim=True) + shared
        assert_close(y, x * factor, "output", floor=1.0)
        assert_close(dx, dy * factor, "dx", floor=1.0)
        assert_close(dweights, (ids + 1) * (x * dy).sum(dim=1, keepdim=True), "d weights", floor=1.0)
        assert sent is None or sent[0] == sent[1], "a token goes to a rank once"
        sent_to += count_ids(ids, example.plan.num_experts)
        if rank >= example.plan.shared_ranks:
            for expert, count in zip(example.plan.slots(rank), rows, strict=True):
                received[expert] += count
    assert torch.equal(received, sent_to)
    on_shared = [sum(rows) for _, _, _, rows, _ in results[: example.plan.shared_ranks]]
    if on_shared:  # each source spreads its own tokens to within one
        assert sum(on_shared) == sum(example.tokens)
        assert max(on_shared) - min(on_shared) <= len(example.tokens)


@st.composite
def cut(draw) -> tuple[Topology, tuple[int, ...]]:
    world = draw(st.sampled_from([1, 2, 3, 4]))
    sizes = [d for d in range(1, world + 1) if world % d == 0]
    tensor = draw(st.sampled_from(sizes))
    wide = draw(st.sampled_from([m for m in sizes if max(m, tensor) % min(m, tensor) == 0]))
    expert = draw(st.sampled_from([d for d in sizes if world // wide % d == 0]))
    topology = Topology(world=world, expert=expert, tensor=tensor, expert_tensor=wide)
    return topology, tuple(draw(st.lists(st.integers(0, 9), min_size=topology.data, max_size=topology.data)))


def squared_inside(rank: int, topology: Topology, tokens: tuple[int, ...]):
    groups = groups_of(topology)
    domain = TokenDomain(groups)
    generator = torch.Generator().manual_seed(groups.data.rank_in_group)
    count = tokens[groups.data.rank_in_group]
    x, dy = (torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    number = torch.arange(count) + 100 * groups.data.rank_in_group
    x.requires_grad_()
    shares = domain.shares(count)
    inside = domain.enter(x, shares)
    numbers = domain.enter(number, shares)
    y = domain.leave(inside.square() / 2, shares)
    (y * dy).sum().backward()
    counted = domain.own_rows(numbers, shares).tolist() if domain.counts else []
    return y.detach() - x.detach().square() / 2, x.grad - x.detach() * dy, numbers.tolist(), counted


@given(example=cut())
@ON_WORKERS
def test_tokens_enter_and_leave_a_domain_and_each_is_counted_once(example):
    topology, tokens = example
    results = run_distributed(squared_inside, topology.world, topology, tokens)
    for y, dx, _, _ in results:
        assert not y.numel() or float(y.abs().max()) == 0
        assert not dx.numel() or float(dx.abs().max()) == 0
    everyone = sorted(n + 100 * rank for rank, count in enumerate(tokens) for n in range(count))
    assert sorted(n for *_, counted in results for n in counted) == everyone
    for group in topology.expert_tensor_groups():  # they work on the same tokens, in the same order
        assert all(results[rank][2] == results[group[0]][2] for rank in group)
    worked_on = [n for rank, result in enumerate(results) if rank % topology.expert_tensor == 0 for n in result[2]]
    assert sorted(worked_on) == everyone
