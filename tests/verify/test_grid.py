"""Which layouts a certificate runs, and what the shrunk recipe keeps. Pure: nothing is built."""

import math
from itertools import product

import pytest
from small_configs import FAMILIES, small_recipe

from moe_train.config import accumulation_steps
from moe_train.errors import ConfigError
from moe_train.model import load_model_config, num_experts_of
from moe_train.model.profiles import profile_of
from moe_train.verify import full_grid, quick_grid, shrink
from moe_train.verify.grid import AXES
from moe_train.verify.shrink import at_layout, global_batch

WORLDS = (1, 2, 3, 4)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("worlds", [WORLDS, (1, 2), (4,), (2, 3)])
def test_full_grid_is_the_product(worlds):
    size = global_batch(worlds)
    found = {
        (g.world, g.expert, g.precision, g.backend, g.stage, g.micro_size, g.recompute) for g in full_grid(size, worlds)
    }
    expected = set()
    for world in worlds:
        sizes = divisors(size // world)
        middle = sizes[1:-1]
        kept = {1, size // world, *middle[len(middle) // 2 : len(middle) // 2 + 1]}
        computed = [("fp32", "loop"), ("fp32", "grouped"), ("fp64", "loop")]
        combinations = product([world], divisors(world), computed, range(4), kept, [False, True])
        expected |= {(w, e, *c, s, m, r) for w, e, c, s, m, r in combinations}
    assert found == expected
    assert len(full_grid(size, worlds)) == len(expected), "each once"


@pytest.mark.parametrize("worlds", [WORLDS, (1, 2), (4,), (2, 3)])
def test_quick_grid_shows_every_value_of_every_axis(worlds):
    size = global_batch(worlds)
    quick, full = quick_grid(size, worlds), full_grid(size, worlds)
    assert len(quick) <= 12
    assert set(quick) <= set(full)
    for axis in AXES:
        assert {getattr(g, axis) for g in quick} == {getattr(g, axis) for g in full}, axis
    assert {(g.world, g.expert) for g in quick} == {(g.world, g.expert) for g in full}
    # both engines see several ranks, ZeRO sharding, accumulation and recompute
    for precision in ("fp32", "fp64"):
        mine = [g for g in quick if g.precision == precision and g.world > 1]
        assert any(g.stage >= 2 for g in mine)
        assert any(g.accumulation > 1 for g in mine)
        assert any(g.recompute for g in mine)
    if 4 in worlds:
        assert any(g.world > g.expert > 1 and g.stage >= 2 and g.precision == "fp32" for g in quick)
    assert quick == quick_grid(size, worlds), "the same every time"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_runs_the_same_batch(family):
    recipe = shrink(small_recipe(family), WORLDS)
    for layout in quick_grid(recipe.batch.global_size, WORLDS):
        cut = at_layout(recipe, layout)
        assert cut.batch.global_size == recipe.batch.global_size
        assert accumulation_steps(cut.batch, layout.world) == layout.accumulation
        assert (cut.zero.stage, cut.parallel.expert, cut.moe.backend) == (layout.stage, layout.expert, layout.backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_shrinking_keeps_the_family_and_its_options(family):
    big = small_recipe(
        family, moe={"aux_loss_coef": 1e-4}, optimizer={"lr": 1e-4, "weight_decay": 0.07, "betas": [0.8, 0.9]}
    )
    before, recipe = load_model_config(big), shrink(big, WORLDS)
    after = load_model_config(recipe)
    old, new = profile_of(family).spec(before), profile_of(family).spec(after)
    assert after.model_type == before.model_type
    assert (new.score, new.normalize, new.scale, new.has_bias) == (old.score, old.normalize, old.scale, old.has_bias)
    assert (new.num_groups > 1) == (old.num_groups > 1)
    assert (new.topk_groups < new.num_groups) == (old.topk_groups < old.num_groups)
    assert num_experts_of(after) % 4, "uneven on 4 ranks"
    assert (recipe.optimizer.weight_decay, recipe.optimizer.betas) == (0.07, (0.8, 0.9))
    assert recipe.moe.aux_loss_coef >= 0.05, "on, and large enough to be seen"
    assert recipe.moe.z_loss_coef == 0, "off stays off"
    assert recipe.optimizer.grad_clip == 0.1


def test_clip_that_is_off_stays_off():
    assert shrink(small_recipe("olmoe", optimizer={"lr": 0.1, "grad_clip": 0.0}), WORLDS).optimizer.grad_clip == 0


@pytest.mark.parametrize("worlds", [(1,), (1, 2, 3, 4), (2, 4, 8), (5,)])
def test_batch_divides_by_every_world(worlds):
    size = global_batch(worlds)
    assert all(size % world == 0 and size // world >= 2 for world in worlds)
    assert size % math.lcm(*worlds) == 0


def test_worlds_without_a_common_batch_are_refused():
    with pytest.raises(ConfigError, match=r"--world \(5,7,8\): one batch for all of them needs 280 sequences"):
        global_batch((5, 7, 8))


def test_dropout_cannot_be_certified():
    fields = FAMILIES["qwen3_moe"] | {"attention_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"model.config.attention_dropout \(0.1\): .*set it to 0.0 to certify"):
        shrink(small_recipe("qwen3_moe", model={"config": fields}), WORLDS)
