"""Rules on expert loads: when they hold, how often they are reported, and that their state survives a checkpoint."""

import numpy as np
import pytest

from moe_train.config.schema import GuardSection
from moe_train.diagnostics.guards import LoadGuards

EVEN, ONE_DEAD, SKEWED = [4, 4, 4, 4], [8, 8, 0, 0], [13, 1, 1, 1]
# SKEWED: entropy -(13 log 13/16 + 3 log 1/16) / 16 / log 4 = 0.497, MaxVio 13 / 4 - 1 = 2.25


def guards(*rules: GuardSection, watched=(0, 1)) -> LoadGuards:
    return LoadGuards(rules, num_layers=2, num_experts=4, watched=watched)


def look(found: LoadGuards, *layers: list[int]) -> list[str]:
    return [str(alarm) for alarm in found.look(np.array(layers))]


def test_an_expert_without_a_token_for_some_steps_is_dead():
    found = guards(GuardSection(when="dead_experts", steps=3))
    assert look(found, EVEN, ONE_DEAD) == []
    assert look(found, EVEN, ONE_DEAD) == []
    assert look(found, EVEN, [8, 4, 4, 0]) == ["MoE layer 1: 1 experts without a token for 3 steps"]
    for _ in range(2):
        assert look(found, EVEN, ONE_DEAD) == [], "counted from zero again"
    assert look(found, EVEN, ONE_DEAD) == ["MoE layer 1: 2 experts without a token for 3 steps"]


def test_different_experts_that_miss_a_step_are_not_dead():
    found = guards(GuardSection(when="dead_experts", steps=2))
    for _ in range(3):
        assert look(found, [0, 5, 5, 6], EVEN) == []
        assert look(found, [5, 0, 5, 6], EVEN) == []


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (GuardSection(when="max_vio_above", value=2.0, steps=2), "MoE layer 0: MaxVio 2.25 above 2.0 for 2 steps"),
        (GuardSection(when="entropy_below", value=0.6, steps=2), "MoE layer 0: entropy 0.497 below 0.6 for 2 steps"),
    ],
)
def test_a_bound_has_to_be_crossed_in_a_row_and_the_worst_layer_is_named(rule, sentence):
    found, mild = guards(rule), [9, 3, 2, 2]
    assert look(found, SKEWED, EVEN) == []
    assert look(found, EVEN, SKEWED) == [], "another layer"
    assert look(found, mild, EVEN) == []
    assert look(found, SKEWED, EVEN) == []
    assert look(found, SKEWED, mild) == [sentence]


def test_layers_that_nothing_balances_are_not_watched():
    found = guards(GuardSection(when="max_vio_above", value=1.0, steps=1), watched=[1])
    assert look(found, SKEWED, EVEN) == []
    assert look(found, EVEN, SKEWED) != []


def test_state_goes_on_where_it_was_and_other_rules_begin_again():
    rule = GuardSection(when="dead_experts", steps=2)
    first = guards(rule)
    assert look(first, EVEN, ONE_DEAD) == []
    resumed, changed = guards(rule), guards(GuardSection(when="dead_experts", steps=2, action="stop"))
    for other in (resumed, changed):
        other.load_state_dict(first.state_dict())
    assert look(resumed, EVEN, ONE_DEAD) != []
    assert look(changed, EVEN, ONE_DEAD) == []
