"""The certificate as a fixture: somebody else's change to the layer, certified or refused."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
from small_configs import small_recipe

from moe_train.config import dump_recipe
from moe_train.moe import experts


def rounded_loop(rows, rows_per_expert, weights, activation):
    return experts.loop_experts(rows, rows_per_expert, weights, activation).bfloat16().to(rows.dtype)


def reversed_loop(rows, rows_per_expert, weights, activation):
    """The same rows in the other order within each expert, and back: other bits, the same numbers."""
    turned = [part.flip(0) for part in rows.split(rows_per_expert.tolist())]
    import torch

    out = experts.loop_experts(torch.cat(turned), rows_per_expert, weights, activation)
    return torch.cat([part.flip(0) for part in out.split(rows_per_expert.tolist())])


@contextmanager
def with_reversed_loop():
    with patch.dict(experts.BACKENDS, {"loop": reversed_loop}):
        yield


@contextmanager
def with_rounded_loop():
    with patch.dict(experts.BACKENDS, {"loop": rounded_loop}):
        yield


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(small_recipe("olmoe")))
    return path


def test_a_right_backend_is_certified_in_bf16(certify_recipe, recipe):
    """The bounds that GPUs have, with gloo."""
    certificate = certify_recipe(recipe, worlds=(1, 2), modified=with_reversed_loop, precisions=("bf16",))
    assert certificate.passed
    assert {result.layout.precision for result in certificate.results} == {"bf16"}
    assert {result.layout.world for result in certificate.results} == {1, 2}
    assert any(result.layout.backend == "loop" for result in certificate.results)
    measured = certificate.results[0].comparison.worst
    assert {"choices", "logits", "gradient", "parameters", "weights in use"} <= set(measured)


@pytest.mark.slow
def test_a_right_backend_is_certified(certify_recipe, recipe):
    certificate = certify_recipe(recipe, worlds=(2,), modified=with_reversed_loop)
    assert certificate.passed
    assert any(result.layout.backend == "loop" for result in certificate.results)


def test_a_wrong_one_fails_the_test_with_the_quantity(certify_recipe, recipe):
    with pytest.raises(pytest.fail.Exception, match=r"layouts differ(.|\n)*logits.* differs first, at step 1"):
        certify_recipe(recipe, worlds=(2,), modified=with_rounded_loop)
