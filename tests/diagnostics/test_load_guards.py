"""Rules on expert loads: when they hold, how often they are reported, and that their state survives a checkpoint."""

import json

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


def growth(**changes) -> GuardSection:
    return GuardSection(**{"when": "router_logit_growth", "value": 2.0, "reference_step": 3, "steps": 2, **changes})


def sizes(found: LoadGuards, step: int, *rms: float) -> list[str]:
    return [str(alarm) for alarm in found.look(np.array([EVEN, EVEN]), step, np.array(rms))]


def test_router_logits_that_have_grown_since_a_step():
    found = guards(growth())
    assert sizes(found, 2, 50.0, 50.0) == [], "before the reference"
    assert sizes(found, 3, 1.0, 4.0) == []
    assert sizes(found, 4, 2.5, 7.9) == []
    assert sizes(found, 5, 2.0, 9.0) == [], "not more than twice, and one step is not two"
    said = "MoE layer 1: router logits of size 8.8 (RMS), more than 2.0 x the 4 of step 3, for 2 steps"
    assert sizes(found, 6, 2.5, 8.8) == [said]


def test_the_layer_that_has_grown_most_is_named_not_the_largest():
    found = guards(growth(steps=1))
    sizes(found, 3, 1.0, 10.0)
    assert sizes(found, 4, 5.0, 21.0)[0].startswith("MoE layer 0: router logits of size 5 (RMS)")


def test_what_logits_are_compared_with_is_in_the_state():
    first = guards(growth(steps=1))
    sizes(first, 3, 1.0, 1.0)
    state = json.loads(json.dumps(first.state_dict()))
    again, fresh = guards(growth(steps=1)), guards(growth(steps=1))
    again.load_state_dict(state)
    assert sizes(again, 4, 1.0, 2.1)
    assert sizes(fresh, 4, 1.0, 2.1) == [], "the first step that it sees"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"when": "router_logit_growth", "value": 2.0, "steps": 1}, "needs a reference_step"),
        ({"when": "dead_experts", "steps": 1, "reference_step": 4}, "takes no reference_step"),
        ({"when": "router_logit_growth", "reference_step": 4, "steps": 1}, "needs a value"),
    ],
)
def test_rules_that_lack_something(rule, said):
    with pytest.raises(ValueError, match=said):
        GuardSection(**rule)
