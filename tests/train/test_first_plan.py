"""What a recipe says of slots, shared experts and tensor parallelism -> the first plan, or a sentence."""

import pytest
from small_configs import small_recipe

from moe_train.errors import ConfigError, TopologyError
from moe_train.model import count_parameters
from moe_train.parallel import Topology
from moe_train.train.check import ResolvedRun, node_size


def plan_of(family: str, world: int, expert: int, tensor: int = 1, expert_tensor: int = 1, **sections):
    recipe = small_recipe(family, **{"batch": {"global_size": 24, "micro_size": 1}} | sections)
    topology = Topology(world=world, expert=expert, tensor=tensor, expert_tensor=expert_tensor)
    return ResolvedRun.at(recipe, topology)


def test_numbers_are_taken_as_they_are():
    plan = plan_of("qwen2_moe", 4, 4, parallel={"shared_expert_ranks": 1, "redundant_experts": 3}).plan
    assert (plan.shared_ranks, plan.num_redundant) == (1, 3)
    assert plan.slots_per_rank == [0, 21, 21, 21]


def test_auto_follows_the_rule_of_one_shared_rank_per_k_plus_1():
    """60 experts, top-4, 8 ranks: S = ceil(8 / 5) = 2, and R fills 6 ranks of 10 experts: nothing, or one each."""
    both = plan_of("qwen2_moe", 8, 8, parallel={"shared_expert_ranks": "auto", "redundant_experts": "auto"}).plan
    assert (both.shared_ranks, both.num_redundant) == (2, 6)
    shared = plan_of("qwen2_moe", 8, 8, parallel={"shared_expert_ranks": "auto"}).plan
    assert (shared.shared_ranks, shared.num_redundant) == (2, 0)
    copies = plan_of("qwen2_moe", 8, 8, parallel={"redundant_experts": "auto"}).plan
    assert (copies.shared_ranks, copies.num_redundant) == (0, 8)
    filled = plan_of("qwen2_moe", 8, 8, parallel={"shared_expert_ranks": 1, "redundant_experts": "auto"}).plan
    assert filled.num_redundant == 7 - 60 % 7


@pytest.mark.parametrize(
    ("family", "sizes", "parallel", "words"),
    [
        ("qwen3_moe", {"expert": 4}, {"shared_expert_ranks": 1}, r"shared_expert_ranks \(1\): qwen3_moe has no shared"),
        ("qwen2_moe", {"expert": 1}, {"shared_expert_ranks": 1}, r"shared_expert_ranks \(1\) needs expert parallelism"),
        ("qwen2_moe", {"expert": 4}, {"shared_expert_ranks": 4}, r"shared_expert_ranks \(4\) must be below"),
        ("qwen3_moe", {"expert": 1}, {"redundant_experts": 2}, r"redundant_experts \(2\) needs expert parallelism"),
        ("qwen3_moe", {"expert": 2}, {"redundant_experts": 7}, r"redundant_experts \(7\) exceeds 6"),
        (
            "qwen2_moe",
            {"expert": 4},
            {"shared_expert_tensor": True},
            r"shared_expert_tensor \(true\) needs ranks",
        ),
        (
            "qwen3_moe",
            {"expert": 2, "tensor": 2},
            {"shared_expert_tensor": True},
            r"shared_expert_tensor \(True\): qwen3_moe has no shared",
        ),
        ("deepseek_v3", {"expert": 1, "tensor": 3, "world": 3}, {}, r"parallel.tensor \(3\) must divide"),
    ],
)
def test_refused_with_the_keys(family, sizes, parallel, words):
    with pytest.raises(TopologyError, match=words):
        plan_of(family, sizes.pop("world", 4), **sizes, parallel=parallel)


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_rank_left_for_routed_experts_names_the_key_that_was_typed(ranks):
    with pytest.raises(TopologyError, match=rf"shared_expert_ranks \({ranks}\) must be below parallel.expert \(2\)"):
        plan_of("qwen2_moe", 2, 2, parallel={"shared_expert_ranks": ranks, "redundant_experts": "auto"})


def test_auto_takes_no_more_copies_than_there_is_room_for():
    plan = plan_of("qwen2_moe", 2, 2, parallel={"shared_expert_ranks": 1, "redundant_experts": "auto"}).plan
    assert (plan.shared_ranks, plan.num_redundant) == (1, 0)


def test_shared_experts_that_cannot_be_cut():
    base = small_recipe("qwen2_moe").model.config
    fields = {"shared_expert_intermediate_size": 41}
    with pytest.raises(TopologyError, match=r"intermediate size \(41\) must be a multiple of parallel.tensor \(2\)"):
        plan_of("qwen2_moe", 2, 2, tensor=2, parallel={"shared_expert_tensor": True}, model={"config": base | fields})


def test_experts_that_cannot_be_cut_into_parts():
    fields = {"moe_intermediate_size": 20}
    base = small_recipe("qwen3_moe").model.config
    with pytest.raises(TopologyError, match=r"parallel.expert_tensor \(3\) must divide .*\(20\)"):
        plan_of("qwen3_moe", 3, 1, expert_tensor=3, model={"config": base | fields})


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"shared_expert_ranks": 1, "shared_expert_tensor": True}, "set one"),
        ({"shared_expert_ranks": 1, "expert_tensor": 2}, "expert_tensor"),
        ({"shared_expert_ranks": -1}, r"shared_expert_ranks \(-1\) must be at least 0"),
        ({"redundant_experts": -2}, r"redundant_experts \(-2\) must be at least 0"),
        ({"tensor": 0}, "parallel.tensor"),
    ],
)
def test_the_recipe_alone_rules_out(parallel, words):
    with pytest.raises(ConfigError, match=words):
        small_recipe("qwen2_moe", parallel=parallel)


def test_a_new_plan_needs_something_to_place():
    with pytest.raises(ConfigError, match=r"moe.replan_interval \(5\).*redundant_experts is 0"):
        plan_of("qwen3_moe", 4, 4, moe={"replan_interval": 5})


def test_no_more_layers_hash_than_there_are():
    with pytest.raises(ConfigError, match=r"moe.hash_layers \(3\) exceeds the 2 MoE layers"):
        plan_of("qwen3_moe", 1, 1, moe={"hash_layers": 3})


def test_parameters_on_a_rank_follow_the_slots():
    run = plan_of("qwen2_moe", 4, 4, parallel={"shared_expert_ranks": 1, "redundant_experts": 3})
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    one = count.experts // 60
    shared = count.per_rank[0] - (count.per_rank[1] - 21 * one)
    # gate, up and down of the shared expert and its sigmoid gate, in each layer
    assert shared == count.num_moe_layers * (3 * 32 * 40 + 32)


def test_nodes_of_an_ep_group():
    run = plan_of("qwen3_moe", 4, 4)
    assert node_size(run) is None
    two_hosts = type(run)(**{**vars(run), "per_node": 2})
    assert node_size(two_hosts) == 2
