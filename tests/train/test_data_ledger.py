"""Which sample goes to which rank: a step's samples depend on the position alone, and no sample is read twice."""

from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from moe_train.config import accumulation_steps
from moe_train.config.schema import BatchSection
from moe_train.train.loop import Trainer


def samples_of_step(position: int, world: int, micro_size: int, global_size: int = 16) -> list[list[int]]:
    """Sample ids by rank, as the trainer of each rank asks for them."""
    batch = BatchSection(global_size=global_size, micro_size=micro_size)
    by_rank = []
    for rank in range(world):
        trainer = SimpleNamespace(
            recipe=SimpleNamespace(batch=batch),
            groups=SimpleNamespace(data=SimpleNamespace(world_size=world, rank_in_group=rank)),
            sequences=position,
            run=SimpleNamespace(accumulation=accumulation_steps(batch, world)),
            assembly=SimpleNamespace(
                data=SimpleNamespace(
                    train=SimpleNamespace(batch=lambda start, count: np.arange(start, start + count)[:, None])
                )
            ),
        )
        trainer.starts = partial(Trainer.starts, trainer)  # type: ignore[arg-type]
        by_rank.append([int(i) for m in Trainer.micro_batches(trainer) for i in m.flatten()])  # type: ignore[arg-type]
    return by_rank


@pytest.mark.parametrize("micro_size", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_reads_the_same_samples_at_every_layout(world, micro_size):
    """Steps 0 to 2 as one run, 3 and 4 as another one that resumed at another number of ranks."""
    for step in range(5):
        at = world if step < 3 else {1: 4, 2: 1, 4: 2}[world]
        by_rank = samples_of_step(step * 16, at, micro_size)
        assert sorted(chain(*by_rank)) == list(range(step * 16, step * 16 + 16))
        assert len({len(ids) for ids in by_rank}) == 1


def test_ranks_read_their_micro_batches_side_by_side():
    """Micro-batch m of rank r starts at (m * world + r) * size: written out once by hand."""
    assert samples_of_step(32, world=2, micro_size=2, global_size=8) == [[32, 33, 36, 37], [34, 35, 38, 39]]
