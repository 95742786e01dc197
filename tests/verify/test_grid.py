"""Which layouts a certificate runs, and what the shrunk recipe keeps. Pure: nothing is built."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
from small_configs import FAMILIES, small_recipe

from moe_train.config import accumulation_steps
from moe_train.errors import ConfigError
from moe_train.model import load_model_config, num_experts_of
from moe_train.model.profiles import profile_of
from moe_train.moe import check_counts
from moe_train.parallel import Topology
from moe_train.verify import full_grid, quick_grid, shrink
from moe_train.verify.grid import AXES, QUICK_LIMIT, Layout, Traits
from moe_train.verify.shrink import at_layout, global_batch, traits_of

WORLDS = (1, 2, 3, 4)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


SHARED = Traits(num_experts=6, has_shared=True, tensors=(1, 2, 4), width=96)
PLAIN = Traits(num_experts=6, has_shared=False, tensors=(1, 2), width=96)


def plain(layout: Layout) -> bool:
    return layout.tensor == layout.expert_tensor == 1 and layout.shared == "local" and not layout.redundant


@pytest.mark.parametrize("worlds", [WORLDS, (1, 2), (4,), (2, 3)])
def test_full_grid_holds_the_product_of_data_and_expert_parallelism(worlds):
    size = global_batch(worlds)
    grid = [g for g in full_grid(size, worlds, SHARED) if plain(g)]
    found = {(g.world, g.expert, g.precision, g.backend, g.stage, g.micro_size, g.recompute) for g in grid}
    expected = set()
    for world in worlds:
        sizes = divisors(size // world)
        middle = sizes[1:-1]
        kept = {1, size // world, *middle[len(middle) // 2 : len(middle) // 2 + 1]}
        computed = [("fp32", "loop"), ("fp32", "grouped"), ("fp64", "loop"), ("bf16", "grouped")]
        combinations = product([world], divisors(world), computed, range(4), kept, [False, True])
        expected |= {(w, e, *c, s, m, r) for w, e, c, s, m, r in combinations}
    assert found == expected
    assert len(grid) == len(expected), "each once"


def test_full_grid_divides_ranks_in_every_legal_way_at_every_stage():
    size = global_batch(WORLDS)
    grid = full_grid(size, WORLDS, SHARED)
    assert len(set(grid)) == len(grid)
    for g in grid:  # what a run would refuse is in no grid
        topology = Topology(world=g.world, expert=g.expert, tensor=g.tensor, expert_tensor=g.expert_tensor)
        check_counts(6, g.expert, g.shared_ranks, g.redundant)
        assert g.micro_size * g.accumulation * topology.data == size
    divided = [g for g in grid if not plain(g)]
    keys = ("world", "expert", "tensor", "expert_tensor", "redundant", "shared", "after")
    ways = {tuple(getattr(g, key) for key in keys) for g in divided}
    for way in ways:
        mine = [g for g in divided if tuple(getattr(g, key) for key in keys) == way]
        assert {(g.stage, g.precision) for g in mine} == set(product(range(4), ("fp32", "fp64", "bf16"))), way
    # counted by hand for 2 ranks: (TP, expert TP) (2,1) EP 1, 2; (1,2) and (2,2) EP 1; (1,1) EP 2
    two = {way[1:] for way in ways if way[0] == 2}
    assert {(e, t, m) for e, t, m, *_ in two} == {(1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 1)}
    assert {way[3:5] for way in two if way[:3] == (2, 1, 1)} == {(3, "local"), (0, "external")}
    assert {way[3:5] for way in two if way[:3] == (2, 2, 1)} == {
        *((r, s) for r in (0, 3) for s in ("local", "split")),
        (0, "external"),
    }
    without = full_grid(size, WORLDS, PLAIN)
    assert {g.shared for g in without} == {"local"}
    assert {g.tensor for g in without} == {1, 2}


def test_the_fused_backend_is_certified_beside_the_others_if_asked_for():
    size = global_batch(WORLDS)
    traits = replace(PLAIN, fused=True)
    plain_ones, asked = full_grid(size, WORLDS, PLAIN), full_grid(size, WORLDS, traits)
    assert {g.backend for g in plain_ones} == {"loop", "grouped"}
    for layouts in (asked, quick_grid(size, WORLDS, traits)):
        fused = [g for g in layouts if g.backend == "fused"]
        assert {g.precision for g in fused} == {"fp32", "bf16"}
        assert {1, 2} <= {g.expert for g in fused}
    kept = [g for g in plain_ones if plain(g)]
    assert [g for g in asked if plain(g) and g.backend != "fused"] == kept, "nothing is left out for it"


@pytest.mark.parametrize("traits", [SHARED, PLAIN])
@pytest.mark.parametrize("worlds", [WORLDS, (1, 2), (4,), (2, 3)])
def test_quick_grid_shows_every_value_of_every_axis(worlds, traits):
    size = global_batch(worlds)
    quick, full = quick_grid(size, worlds, traits), full_grid(size, worlds, traits)
    assert len(quick) <= QUICK_LIMIT
    assert set(quick) <= set(full)
    for axis in AXES:
        if axis != "redundant":
            assert {getattr(g, axis) for g in quick} == {getattr(g, axis) for g in full}, axis
    assert {bool(g.redundant) for g in quick} == {bool(g.redundant) for g in full}
    assert {(g.world, g.expert) for g in quick} == {(g.world, g.expert) for g in full}
    # both engines see several ranks, ZeRO sharding, accumulation and recompute
    for precision in ("fp32", "fp64", "bf16"):
        mine = [g for g in quick if g.precision == precision and g.world > 1]
        assert any(g.stage >= 2 for g in mine)
        assert any(g.accumulation > 1 for g in mine)
        assert any(g.recompute for g in mine)
    if 4 in worlds:
        assert any(g.expert_data > 1 and g.expert > 1 and g.stage >= 2 and g.precision == "fp32" for g in quick)
        assert any(g.redundant and g.stage >= 2 and g.precision == "fp32" for g in quick)
    assert quick == quick_grid(size, worlds, traits), "the same every time"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_runs_the_same_batch(family):
    recipe = shrink(small_recipe(family), WORLDS)
    for layout in quick_grid(recipe.batch.global_size, WORLDS, traits_of(recipe)):
        cut = at_layout(recipe, layout)
        assert cut.batch.global_size == recipe.batch.global_size
        assert accumulation_steps(cut.batch, layout.data) == layout.accumulation
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


@pytest.mark.parametrize(
    "moe", [{"capacity_factor": 2.0}, {"router": "sinkhorn"}, {"force_load": {"histogram": "of_60.json"}}]
)
def test_choices_over_whole_sequences_are_not_made_on_shares_of_them(moe, tmp_path):
    if "force_load" in moe:
        path = tmp_path / "of_60.json"
        path.write_text(json.dumps([1] * 60))
        moe = {"force_load": {"histogram": str(path)}}
    recipe = shrink(small_recipe("qwen2_moe", moe=moe), WORLDS)
    traits = traits_of(recipe)
    assert traits.whole_sequences
    assert not any(layout.after for layout in full_grid(recipe.batch.global_size, WORLDS, traits))
    assert any(layout.tensor > 1 for layout in full_grid(recipe.batch.global_size, WORLDS, traits))
    if "force_load" in moe:
        assert str(recipe.moe.force_load) == "zipf 1", "the shrunk model has fewer experts"
    if "capacity_factor" in moe:
        assert recipe.moe.capacity_factor == 1.0, "so that something is dropped"
