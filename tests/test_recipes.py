"""Every recipe of recipes/ resolves at each of its world sizes, has the published size, and explains itself."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from moe_train.config import accumulation_steps, load_recipe
from moe_train.errors import DataError, TopologyError
from moe_train.model import count_parameters
from moe_train.train import resolve_run

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}
LARGE = ("olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b")
LAYOUTS = {  # world, EP, ZeRO stage
    "olmoe_1b_7b": (8, 8, 1),
    "qwen3_30b_a3b": (16, 8, 1),
    "mixtral_8x7b": (32, 8, 3),
    "deepseek_v3_mini": (1, 1, 1),
    "moe_1b_a200m": (2, 2, 2),
}
PUBLISHED = {  # billions, total and active, as their papers print them
    "olmoe_1b_7b": (6.92, 1.28),
    "qwen3_30b_a3b": (30.5, 3.35),
    "mixtral_8x7b": (46.7, 12.9),
}


def resolve(name: str, world: int, *overrides: str):
    byte = ("data.tokenizer=byte",) if name in LARGE else ()  # their tokenizers are the user's to fetch
    return resolve_run(RECIPES[name], (*byte, *overrides), world, per_node=8)


def test_every_recipe_is_known_here():
    assert set(RECIPES) == {"quickstart", *LAYOUTS}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves_at_each_of_its_world_sizes(name):
    for world in load_recipe(RECIPES[name]).world_sizes or (1, 2, 3, 4):
        overrides = ("batch.global_size=12",) if world == 3 else ()
        run = resolve(name, world, *overrides)
        # the identity that derives the accumulation, from the other side
        assert run.accumulation * run.recipe.batch.micro_size * world == run.recipe.batch.global_size
        assert accumulation_steps(run.recipe.batch, world) == run.accumulation
        assert run.topology.expert * run.topology.expert_data == world


@pytest.mark.parametrize("name", LAYOUTS)
def test_recipe_has_the_layout_it_is_made_for(name):
    world, expert, stage = LAYOUTS[name]
    run = resolve(name, load_recipe(RECIPES[name]).world_sizes[0])
    assert (run.topology.world, run.topology.expert, run.recipe.zero.stage) == (world, expert, stage)
    assert run.recipe.precision.compute == "bf16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_numbers(name):
    run = resolve(name, LAYOUTS[name][0])
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    total, active = PUBLISHED[name]
    assert count.total / 1e9 == pytest.approx(total, rel=0.01)
    assert count.active / 1e9 == pytest.approx(active, rel=0.01)
    assert count.total == count.dense + (count.per_rank[0] - count.dense) * run.topology.expert


@pytest.mark.parametrize(
    ("name", "total", "active"), [("moe_1b_a200m", 1.0e9, 200e6), ("deepseek_v3_mini", 1.0e9, 170e6)]
)
def test_small_recipes_have_the_size_in_their_name(name, total, active):
    run = resolve(name, LAYOUTS[name][0])
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    assert count.total == pytest.approx(total, rel=0.05)
    assert count.active == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize("name", LAYOUTS)
def test_header_prints_the_counted_parameters(name):
    run = resolve(name, LAYOUTS[name][0])
    count = count_parameters(run.recipe, run.model_config, run.plan, run.topology)
    header = " ".join(line.lstrip("# ") for line in RECIPES[name].read_text().split("\n\n")[0].splitlines())
    numbers = re.search(r"([\d.]+) B parameters, ([\d.]+) B active per token", header)
    assert numbers, header
    assert [float(n) for n in numbers.groups()] == [round(count.total / 1e9, 2), round(count.active / 1e9, 2)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_comment_on_steps_says_how_many_tokens_that_is(name):
    run = resolve(name, LAYOUTS[name][0])
    said = re.search(r"^  steps: \d+ # (\d+) ([MB]) tokens", RECIPES[name].read_text(), re.MULTILINE)
    assert said
    unit = {"M": 1e6, "B": 1e9}[said[2]]
    assert round(run.recipe.train.steps * run.tokens_per_step / unit) == int(said[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_key_has_its_reason_beside_it(name):
    """A line that sets a value, or opens a list or mapping of values, ends in a comment."""
    for number, line in enumerate(RECIPES[name].read_text().splitlines(), 1):
        sets_a_value = re.match(r"\s*(- )?\w+: \S", line) and not re.match(r"\s*\w+: #", line)
        assert not sets_a_value or re.search(r" # \S", line), f"{RECIPES[name]}:{number}: {line}"


@pytest.mark.parametrize("name", RECIPES)
def test_each_section_has_a_comment(name):
    text = RECIPES[name].read_text()
    keys = list(YAML(typ="safe").load(text))
    blocks = re.split(r"^(?=[a-z_]+:)", text, flags=re.MULTILINE)[1:]
    assert [block.partition(":")[0] for block in blocks] == keys
    silent = [block for block in blocks if "#" not in block]
    assert all(block.strip() == "diagnostics:\n  log_interval: 10" for block in silent), silent


@pytest.mark.parametrize("name", LARGE)
def test_missing_tokenizer_is_named_with_its_remedy(name):
    with pytest.raises(DataError, match=r"no such tokenizer; set data\.tokenizer to byte"):
        resolve_run(RECIPES[name], (), LAYOUTS[name][0], per_node=8)


def test_other_world_sizes_are_refused():
    with pytest.raises(TopologyError, match=r"world_sizes \(\[8\]\) leaves out 4 ranks"):
        resolve("olmoe_1b_7b", 4)


def test_rope_base_reaches_the_model():
    """Hugging Face moved it into `rope_parameters`; the flat spelling must still arrive."""
    for name in ("qwen3_30b_a3b", "mixtral_8x7b"):
        assert resolve(name, LAYOUTS[name][0]).model_config.rope_parameters["rope_theta"] == 1e6
