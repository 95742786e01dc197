"""The certificate of the backend `fused`: every layout of the grid that has a grouped GEMM, run by it instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from small_configs import small_recipe

from moe_train import kernels
from moe_train.errors import ConfigError
from moe_train.kernels import choose
from moe_train.model import build
from moe_train.moe import resolve_backend
from moe_train.verify import check_layout, prepare_case, quick_grid, shrink
from moe_train.verify.grid import full_grid
from moe_train.verify.shrink import traits_of

LOSSES = {"aux_loss_coef": 0.02, "z_loss_coef": 0.01}


def resolved(name: str, *rest, **options) -> str:
    return "fused" if name == "grouped" else resolve_backend(name, *rest, **options)


@contextmanager
def fused() -> Iterator[None]:
    """Plain torch in the place of the kernels: what is certified is how they are put together."""
    with patch.object(build, "resolve_backend", resolved), patch.object(choose, "runs_triton", lambda device: False):
        yield


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen3_moe", LOSSES, marks=pytest.mark.slow),
        ("deepseek_v3", LOSSES | {"bias_update_rate": 0.02}),
    ],
)
def test_equal_at_every_layout_that_has_a_grouped_gemm(family, options):
    recipe = shrink(small_recipe(family, moe=options), (1, 2))
    case = prepare_case(recipe)
    grid = [g for g in quick_grid(recipe.batch.global_size, (1, 2), traits_of(recipe)) if g.backend == "grouped"]
    assert {(g.world, g.expert) for g in grid} == {(1, 1), (2, 1), (2, 2)}
    for layout in grid:
        result = check_layout(case, layout, fused)
        assert result.passed, f"{layout}: {result.verdict}"


def test_a_recipe_that_asks_for_it_is_certified_with_tritons_kernels():
    pytest.importorskip("triton", reason="the test extra installs it on Linux")
    moe = LOSSES | {"bias_update_rate": 0.02, "backend": "fused"}
    recipe = shrink(small_recipe("deepseek_v3", moe=moe), (1,))
    case = prepare_case(recipe)
    grid = full_grid(recipe.batch.global_size, (1,), traits_of(recipe))
    layout = next(g for g in grid if (g.backend, g.split, g.precision) == ("fused", "whole", "fp32"))
    result = check_layout(case, layout)
    assert result.passed, result.verdict


def test_refused_where_triton_does_not_run(monkeypatch):
    monkeypatch.setattr(kernels, "runs_triton", lambda device: False)
    recipe = shrink(small_recipe("olmoe", moe={"backend": "fused"}), (1,))
    with pytest.raises(ConfigError, match=r"moe\.backend \(fused\) .* set TRITON_INTERPRET=1"):
        traits_of(recipe)
