"""assign_experts: contiguous, uneven, complete. SlotPlan: slots, homes, destinations. default_counts: the rule."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.errors import TopologyError
from moe_train.moe.placement import SlotPlan, assign_experts, check_counts, default_counts

exact = settings(derandomize=True, deadline=None, max_examples=150)

# experts 0..3 on ranks 1 and 2; rank 0 keeps the shared expert
SMALL = SlotPlan(4, 3, shared_ranks=1, replicas=((), (3,), (0,)))


@st.composite
def slot_plans(draw) -> SlotPlan:
    """Any valid plan: a free choice, per rank, of experts that have their home elsewhere."""
    world = draw(st.integers(1, 9))
    experts = draw(st.integers(1, 24))
    shared = draw(st.integers(0, world - 1))
    routed = world - shared
    redundant = draw(st.integers(0, experts * (routed - 1)))
    replicas = [()] * shared
    for place in range(routed):
        first, count = assign_experts(experts, routed, place)
        slots = assign_experts(experts + redundant, routed, place)[1]
        elsewhere = [e for e in range(experts) if not first <= e < first + count]
        replicas.append(tuple(draw(st.permutations(elsewhere))[: slots - count]))
    return SlotPlan(experts, world, shared, tuple(replicas))


@given(experts=st.integers(0, 300), world=st.integers(1, 64))
@exact
def test_slices_are_contiguous_cover_all_and_differ_by_one(experts, world):
    slices = [assign_experts(experts, world, rank) for rank in range(world)]
    covered = [e for first, count in slices for e in range(first, first + count)]
    assert covered == list(range(experts))
    sizes = [count for _, count in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    # a rank without experts is an empty range at the end of the one before
    assert [first for first, _ in slices] == [sum(sizes[:rank]) for rank in range(world)]


def test_256_experts_on_56_ranks():
    assert [assign_experts(256, 56, rank)[1] for rank in range(56)] == [5] * 32 + [4] * 24


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((8, 0, 0), r"world_size \(0\)"),
        ((8, -3, 0), r"world_size \(-3\)"),
        ((8, 2.0, 0), r"world_size \(2.0\)"),
        ((8, True, 0), r"world_size \(True\)"),
        ((8, 2, 2), r"rank \(2\) must be below world_size \(2\)"),
        ((8, 2, -1), r"rank \(-1\)"),
        ((8, 2, "1"), r"rank \('1'\)"),
        ((8, 2, None), r"rank \(None\)"),
        ((-1, 2, 0), r"num_experts \(-1\)"),
        ((8.0, 2, 0), r"num_experts \(8.0\)"),
        ((None, 2, 0), r"num_experts \(None\)"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        assign_experts(*arguments)


@given(experts=st.integers(1, 64), world=st.integers(1, 16))
@exact
def test_without_copies_and_shared_ranks_the_order_is_contiguous(experts, world):
    plan = SlotPlan(experts, world)
    assert plan.homes == [assign_experts(experts, world, rank) for rank in range(world)]
    assert [e for rank in range(world) for e in plan.slots(rank)] == list(range(experts))
    assert plan.slots_per_rank == plan.destinations_per_rank == [count for _, count in plan.homes]
    assert plan.num_redundant == 0
    assert plan.shared_destinations == ()
    for rank in range(world):
        assert plan.expert_destinations(rank) == tuple((e,) for e in range(experts))


@given(plan=slot_plans())
@exact
def test_every_expert_has_a_home_and_its_copies_lie_on_other_ranks(plan):
    routed, total = plan.world_size - plan.shared_ranks, plan.num_experts + plan.num_redundant
    expected = [assign_experts(total, routed, place)[1] for place in range(routed)]
    assert plan.slots_per_rank == [0] * plan.shared_ranks + expected
    assert sum(plan.slots_per_rank) == total
    for rank in range(plan.world_size):
        first, count = plan.home(rank)
        slots = plan.slots(rank)
        assert len(set(slots)) == len(slots)
        assert slots[len(slots) - count :] == tuple(range(first, first + count))
        assert slots[: len(slots) - count] == (plan.replicas[rank] if plan.num_redundant else ())
    for expert in range(plan.num_experts):
        first, count = plan.home(plan.owner(expert))
        assert first <= expert < first + count
        holders = [rank for rank in range(plan.world_size) if expert in plan.slots(rank)]
        assert plan.replica_ranks(expert) == tuple(holders)
        assert plan.owner(expert) in holders
    assert sum(len(plan.replica_ranks(expert)) for expert in range(plan.num_experts)) == total


@given(plan=slot_plans(), ranks_per_node=st.none() | st.integers(1, 5))
@exact
def test_every_destination_is_reached_and_leads_to_its_expert(plan, ranks_per_node):
    # decoded from the counts alone, as the receiving ranks do
    decoded = [(rank, slot) for rank, count in enumerate(plan.destinations_per_rank) for slot in range(count)]
    assert len(decoded) == len(plan.destinations) == plan.num_experts + plan.num_redundant + plan.shared_ranks
    reached = set(plan.shared_destinations)
    assert [decoded[number] for number in plan.shared_destinations] == [(r, 0) for r in range(plan.shared_ranks)]
    assert all(plan.destinations[number] == (number, None) for number in plan.shared_destinations)
    for source in range(plan.world_size):
        table = plan.expert_destinations(source, ranks_per_node)
        assert len(table) == plan.num_experts
        for expert, numbers in enumerate(table):
            for number in numbers:
                rank, slot = decoded[number]
                assert rank >= plan.shared_ranks
                assert plan.slots(rank)[slot] == expert
                assert plan.destinations[number] == (rank, expert)
            reached.update(numbers)
    assert reached == set(range(len(decoded)))


@given(plan=slot_plans(), ranks_per_node=st.none() | st.integers(1, 5))
@exact
def test_a_source_reaches_its_node_or_every_copy_in_a_rotated_order(plan, ranks_per_node):
    for source in range(plan.world_size):
        for expert, numbers in enumerate(plan.expert_destinations(source, ranks_per_node)):
            ranks = [plan.destinations[number][0] for number in numbers]
            allowed = list(plan.replica_ranks(expert))
            if ranks_per_node is not None:
                near = [rank for rank in allowed if rank // ranks_per_node == source // ranks_per_node]
                allowed = near or allowed
            turn = source % len(allowed)
            assert ranks == allowed[turn:] + allowed[:turn]


def test_the_plan_of_the_picture():
    assert [SMALL.slots(rank) for rank in range(3)] == [(), (3, 0, 1), (0, 2, 3)]
    assert SMALL.homes == [(0, 0), (0, 2), (2, 2)]
    assert SMALL.slots_per_rank == [0, 3, 3]
    assert SMALL.destinations_per_rank == [1, 3, 3]
    assert SMALL.destinations == ((0, None), (1, 3), (1, 0), (1, 1), (2, 0), (2, 2), (2, 3))
    assert SMALL.shared_destinations == (0,)
    assert SMALL.num_redundant == 2
    assert [SMALL.owner(expert) for expert in range(4)] == [1, 1, 2, 2]
    assert [SMALL.replica_ranks(expert) for expert in range(4)] == [(1, 2), (1,), (2,), (1, 2)]
    assert SMALL.expert_destinations(0) == ((2, 4), (3,), (5,), (1, 6))
    assert SMALL.expert_destinations(1) == ((4, 2), (3,), (5,), (6, 1))
    # nodes {0, 1} and {2}: the copy at home, and only that
    assert SMALL.expert_destinations(0, ranks_per_node=2) == ((2,), (3,), (5,), (1,))
    assert SMALL.expert_destinations(2, ranks_per_node=2) == ((4,), (3,), (5,), (6,))


@given(plan=slot_plans(), other=slot_plans())
@exact
def test_equal_plans_have_equal_digests_and_hashes(plan, other):
    built_of_lists = SlotPlan(
        plan.num_experts, plan.world_size, plan.shared_ranks, [list(experts) for experts in plan.replicas]
    )
    plan.owner(0), plan.replica_ranks(0)  # fills what is computed once
    for same in (built_of_lists, pickle.loads(pickle.dumps(plan))):
        assert same == plan
        assert hash(same) == hash(plan)
        assert same.digest() == plan.digest()
        assert same.expert_destinations(0) == plan.expert_destinations(0)
    assert (plan == other) == (plan.digest() == other.digest())


def test_digest_is_the_same_in_every_process_and_tells_plans_apart():
    assert SMALL.digest() == "8aa8186b12813515"
    others = [
        SlotPlan(4, 3, 1, ((), (2,), (0,))),
        SlotPlan(4, 3, 1, ((), (3,), (1,))),
        SlotPlan(4, 3, 1),
        SlotPlan(4, 3),
        SlotPlan(4, 2),
        SlotPlan(5, 3, 1),
        SlotPlan(6, 2, 0, ((3, 4), (0, 1))),
        SlotPlan(6, 2, 0, ((4, 3), (0, 1))),  # another slot order is another plan
    ]
    assert len({plan.digest() for plan in [SMALL, *others]}) == len(others) + 1
    assert SlotPlan(4, 3, 1, ((), (), ())) == SlotPlan(4, 3, 1)
    assert SlotPlan(4, 3, 1, ((), (), ())).digest() == SlotPlan(4, 3, 1).digest()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 2, -1), r"parallel.shared_expert_ranks \(-1\).*at least 0"),
        ((4, 2, 2), r"parallel.shared_expert_ranks \(2\).*below parallel.expert \(2\).*at most 1"),
        ((4, 1, 1), r"parallel.shared_expert_ranks \(1\).*parallel.expert is 1"),
        ((4, 1, 0, ((0,),)), r"parallel.redundant_experts \(1\).*parallel.expert is 1"),
        ((4, 0), r"parallel.expert \(0\)"),
        ((-1, 2), r"number of experts \(-1\)"),
        ((4, 2.0), r"parallel.expert \(2.0\)"),
        # 2 ranks hold 2 + 2 slots and share 4 + 2 out as 3 + 3
        ((4, 2, 0, ((2, 3), ())), r"redundant_experts \(2\): rank 0 .*\(2\) holds 2 redundant experts instead of 1"),
        ((4, 2, 0, ((), (0,))), r"redundant_experts \(1\): rank 0 .* holds 0 redundant experts instead of 1"),
        ((4, 3, 1, ((0,), (3,), ())), r"rank 0 .* holds 1 redundant experts instead of 0"),
        ((4, 2, 0, ((2,), (0,), ())), r"a plan for 3 ranks does not fit parallel.expert \(2\)"),
        ((4, 2, 0, ((4,), (0,))), r"parallel.redundant_experts \(2\): rank 0 .* expert 4, .* 0\.\.3"),
        ((4, 2, 0, ((-1,), (0,))), r"rank 0 .* expert -1, "),
        ((4, 2, 0, ((2.0,), (0,))), r"rank 0 .* expert 2.0, "),
        ((4, 2, 0, ((1,), (0,))), r"rank 0 .* holds expert 1 twice"),
        ((6, 2, 0, ((3, 3), (0, 1))), r"rank 0 .* holds expert 3 twice"),
        # 2 experts on 2 ranks: one copy of each is all there is room for
        ((2, 2, 0, ((1, 1), (0,))), r"parallel.redundant_experts \(3\) exceeds 2.*parallel.expert \(2\)"),
        ((2, 3, 1, ((), (1, 1), (0,))), r"exceeds 2.*parallel.shared_expert_ranks \(1\) leaves 2 ranks.*at most 2"),
    ],
)
def test_a_bad_plan_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(TopologyError, match=sentence):
        SlotPlan(*arguments)


@pytest.mark.parametrize("redundant", [-1, 1.0, True])
def test_a_number_of_copies_that_is_none_is_refused(redundant):
    with pytest.raises(TopologyError, match=rf"parallel.redundant_experts \({redundant}\)"):
        check_counts(4, 2, 0, redundant)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: SMALL.home(3), r"rank \(3\)"),
        (lambda: SMALL.slots(-1), r"rank \(-1\)"),
        (lambda: SMALL.owner(4), r"expert \(4\)"),
        (lambda: SMALL.replica_ranks(-1), r"expert \(-1\)"),
        (lambda: SMALL.expert_destinations(3), r"source_rank \(3\)"),
        (lambda: SMALL.expert_destinations(0, 0), r"ranks_per_node \(0\)"),
    ],
)
def test_a_question_about_nothing_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(
    ("world", "top_k", "experts", "external", "redundant", "expected"),
    [
        (64, 8, 256, True, True, (8, 24)),
        (64, 8, 256, False, False, (0, 0)),
        (64, 8, 256, False, True, (0, 64)),
        (64, 8, 256, True, False, (8, 24)),
        (8, 7, 256, True, False, (1, 3)),  # K + 1 = W: one shared rank
        (8, 8, 256, True, False, (1, 3)),  # K + 1 > W: still one
        (8, 6, 256, True, False, (2, 2)),  # K + 1 < W: 8 / 7 rounded up
        (9, 8, 64, True, False, (1, 0)),  # 64 experts on 8 ranks are even: no copies unless asked for
        (9, 8, 64, True, True, (1, 8)),
        (2, 1, 4, True, True, (1, 1)),
        (1, 8, 256, False, False, (0, 0)),
    ],
)
def test_default_counts(world, top_k, experts, external, redundant, expected):
    assert default_counts(world, top_k, experts, external, redundant) == expected


@given(world=st.integers(2, 128), top_k=st.integers(1, 12), experts=st.integers(1, 300), redundant=st.booleans())
@exact
def test_default_counts_with_shared_ranks_even_the_slots_out(world, top_k, experts, redundant):
    shared, copies = default_counts(world, top_k, experts, True, redundant)
    assert shared == max(1, -(-world // (top_k + 1)))
    assert 1 <= shared < world
    assert (experts + copies) % (world - shared) == 0
    assert copies <= world - shared
    assert (copies > 0) >= redundant


@pytest.mark.parametrize(
    ("external", "redundant", "key"),
    [(True, False, "shared_expert_ranks"), (False, True, "redundant_experts"), (True, True, "shared_expert_ranks")],
)
def test_default_counts_need_expert_parallelism(external, redundant, key):
    with pytest.raises(TopologyError, match=rf"parallel.{key} \(auto\) needs expert parallelism"):
        default_counts(1, 8, 256, external, redundant)
