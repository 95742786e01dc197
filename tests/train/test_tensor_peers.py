"""Ranks that share the dense layers read the same samples, or the run ends before its first step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_configs import small_recipe

from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.errors import DataError, TopologyError, TrainingError
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed
from moe_train.train.assemble import assemble_around
from moe_train.train.check import ResolvedRun
from moe_train.train.loop import Trainer
from moe_train.train.state import Position
from moe_train.train.stop import StopRequest
from moe_train.verify.worker import Data, Samples


def recipe():
    return small_recipe("qwen3_moe", train={"steps": 1}, checkpoint={"at_end": False}, batch={"micro_size": 2})


class Unreadable(Samples):
    """A disk that fails."""

    def batch(self, start: int, size: int) -> np.ndarray:
        raise OSError(5, "Input/output error", "corpus.bin")


def train(rank: int, world: int, different: tuple[int, ...], unreadable: tuple[int, ...] = ()):
    """Steps done, or the error's text. `different`: ranks whose corpus is another one; `unreadable`: fails there."""
    run = ResolvedRun.at(recipe(), Topology(world=world, expert=1, tensor=2))
    tokens = np.random.default_rng(int(rank in different)).integers(0, 61, (1, 8, 17))
    samples = Unreadable(tokens) if rank in unreadable else Samples(tokens)
    assembly = assemble_around(Data(samples), run, build_groups(run.topology), torch.device("cpu"))
    position = Position(step=0, sequences=0, data="", run_id="")
    parts = NullTracker(), NullProgress(), Throughput(), StopRequest()
    trainer = Trainer(assembly, position, Path(), *parts)
    try:
        trainer.train()
    except (DataError, TrainingError) as error:
        return str(error)
    return trainer.step


def test_peers_with_the_same_samples_train():
    assert run_distributed(train, 2, 2, ()) == [1, 1]
    assert run_distributed(train, 4, 4, (2, 3)) == [1] * 4, "ranks that share nothing may well differ"


def test_peers_with_different_samples_are_refused_on_every_rank():
    texts = run_distributed(train, 4, 4, (3,))
    for text in texts:
        assert isinstance(text, str)
        assert "ranks [2, 3] share the dense layers (parallel.tensor 2) and read different samples" in text
        assert "data.corpora" in text


def test_a_disk_that_fails_on_one_rank_ends_all_of_them():
    texts = run_distributed(train, 4, 4, (), (3,))
    assert texts == ["rank 3: corpus.bin: Input/output error"] * 3 + ["corpus.bin: Input/output error"]


def test_a_model_that_cannot_be_shared_out_is_refused_before_anything_starts():
    with pytest.raises(TopologyError, match=r"parallel\.tensor \(4\) must divide model\.config\.num_key_value_heads"):
        ResolvedRun.at(recipe(), Topology(world=4, expert=1, tensor=4))
