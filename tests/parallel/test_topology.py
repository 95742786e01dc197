"""Groups as arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train.errors import TopologyError
from moe_train.parallel import ParallelGroup, Topology, resolve_topology


def test_groups_of_eight_ranks():
    topology = Topology(world=8, expert=4)
    assert topology.expert_groups() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert topology.expert_data_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_groups_of_eight_ranks_with_both_kinds_of_tensor_parallelism():
    cut = Topology(world=8, expert=2, expert_tensor=2)
    assert cut.expert_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert cut.expert_tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert cut.expert_data_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert cut.token_gather_groups() == cut.expert_tensor_groups()
    dense = Topology(world=8, expert=4, tensor=2)
    assert dense.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dense.data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert dense.token_slice_groups() == dense.tensor_groups()
    assert dense.token_gather_groups() == [[r] for r in range(8)]
    both = Topology(world=8, expert=1, tensor=4, expert_tensor=2)
    assert both.token_slice_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    wide = Topology(world=8, expert=1, tensor=2, expert_tensor=8)
    assert wide.token_gather_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world": 8, "expert": 2, "tensor": 3}, r"parallel.tensor \(3\) must divide the number of ranks \(8\)"),
        ({"world": 8, "expert": 2, "tensor": 0}, r"parallel.tensor \(0\)"),
        ({"world": 8, "expert": 2, "expert_tensor": 5}, r"parallel.expert_tensor \(5\)"),
        ({"world": 8, "expert": 8, "expert_tensor": 2}, r"parallel.expert \(8\).*\(8\) / parallel.expert_tensor \(2\)"),
        ({"world": 6, "expert": 1, "tensor": 2, "expert_tensor": 3}, r"\(2\) and parallel.expert_tensor \(3\)"),
    ],
)
def test_grids_that_do_not_exist(sizes, words):
    with pytest.raises(TopologyError, match=words):
        Topology(**sizes)


@given(data_copies=st.integers(1, 8), expert=st.integers(1, 8))
def test_each_rank_is_in_one_group_of_each_kind_and_pairs_meet_once(data_copies, expert):
    topology = Topology(world=data_copies * expert, expert=expert)
    for groups in (topology.expert_groups(), topology.expert_data_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world))
    for ep in topology.expert_groups():
        for edp in topology.expert_data_groups():
            assert len(set(ep) & set(edp)) == 1


def test_auto_stays_on_a_node_and_gives_every_rank_an_expert():
    assert resolve_topology("auto", world=32, num_experts=64, ranks_per_node=8).expert == 8
    assert resolve_topology("auto", world=6, num_experts=4, ranks_per_node=8).expert == 3
    assert resolve_topology("auto", world=3, num_experts=8, ranks_per_node=3).expert == 3
    assert resolve_topology(4, world=4, num_experts=3, ranks_per_node=4).expert == 4  # a rank without experts


@pytest.mark.parametrize("expert", [3, 5, 16])
def test_sizes_that_do_not_fit_name_both_numbers(expert):
    with pytest.raises(TopologyError, match=rf"parallel.expert \({expert}\).*\(8\)"):
        resolve_topology(expert, world=8, num_experts=64, ranks_per_node=8)


def test_a_rank_outside_the_group_is_refused():
    with pytest.raises(TopologyError, match="rank 5 is in none of"):
        ParallelGroup([0, 1], 5)
