"""A worker runs thousands of layouts: nothing of one is left in it."""

import gc
from itertools import product
from pathlib import Path

from moe_train.config import load_recipe
from moe_train.testing import run_distributed
from moe_train.verify import full_grid, prepare_case, shrink
from moe_train.verify.shrink import traits_of
from moe_train.verify.worker import Job, run_layout

QUICKSTART = Path(__file__).parent.parent.parent / "recipes" / "quickstart.yaml"
LARGE = ("DeepSpeedEngine", "Trainer", "ParallelMoELayer", "Qwen3MoeForCausalLM")


def left_by(rank: int, jobs: list[Job]) -> dict[str, int]:
    before = count()
    for job in jobs:
        run_layout(rank, job)
    return {name: number - before[name] for name, number in count().items()}


def count() -> dict[str, int]:
    gc.collect()
    names = [type(each).__name__ for each in gc.get_objects()]
    return {name: names.count(name) for name in LARGE}


def test_no_layout_leaves_its_model_in_the_worker():
    recipe = shrink(load_recipe(QUICKSTART, ()), (1, 2))
    case = prepare_case(recipe)
    grid = [each for each in full_grid(recipe.batch.global_size, (1, 2), traits_of(recipe)) if each.world == 2]
    one_of_each = {(each.stage, each.precision, each.recompute): each for each in grid}
    assert set(product(range(4), ("fp32", "bf16"), (False, True))) <= set(one_of_each)
    jobs = [Job.of(case, layout, "cpu") for layout in one_of_each.values()]
    assert run_distributed(left_by, 2, jobs) == [dict.fromkeys(LARGE, 0)] * 2
