"""Learning-rate shapes at their corners."""

import itertools
import math

import pytest

from moe_train.config.schema import ScheduleSection
from moe_train.optim import lr_factor


def factors(total=20, **fields):
    section = ScheduleSection(**fields)
    return [lr_factor(section, step, total) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak(kind):
    assert factors(kind=kind, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_ends_at_the_minimum_and_never_rises(kind):
    values = factors(kind=kind, warmup_steps=4, min_lr_ratio=0.1)
    assert values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[3:]))


def test_cosine_and_linear_half_way():
    assert factors(total=10, kind="cosine", min_lr_ratio=0.0)[4] == pytest.approx(0.5)
    assert factors(total=10, kind="linear", min_lr_ratio=0.2)[4] == pytest.approx(0.6)
    assert factors(total=8, kind="cosine", min_lr_ratio=0.0)[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_constant_until_its_decay():
    values = factors(total=20, kind="wsd", warmup_steps=2, decay_steps=5, min_lr_ratio=0.0)
    assert values[1:15] == [1.0] * 14
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant_stays():
    assert set(factors(kind="constant")) == {1.0}
