"""What a step reads from the device: listed here, and nothing else. On a GPU each read waits for all that is queued."""

import sys
from pathlib import Path

import pytest
from tiny_run import DEEPSEEK, start, tiny_recipe, train_until, write_corpus
from torch.overrides import TorchFunctionMode

from moe_train.testing import run_distributed

READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "equal", "unique",
    "is_nonzero", "masked_select", "argwhere", "allclose", "repeat_interleave", "__contains__", "__array__",
}  # fmt: skip


class Reads(TorchFunctionMode):
    """Notes each call that needs a value on the host, if it is made by a line of the package, or by one of DeepSpeed's:
    of these how often."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()
        self.by_deepspeed: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if name in READS and not sized:
            frame = sys._getframe(1)
            # torch's optimizers keep their count of steps on the host
            while "/torch/" in frame.f_code.co_filename and "/optim/" not in frame.f_code.co_filename and frame.f_back:
                frame = frame.f_back
            place = frame.f_code.co_filename
            if "/site-packages/deepspeed/" in place:
                self.by_deepspeed.append(f"{Path(place).stem}.{frame.f_code.co_name}: {name}")
            if "/moe_train/" in place and "site-packages" not in place:
                self.found.add(f"{Path(place).stem}.{frame.f_code.co_name}: {name}")
        return func(*args, **(kwargs or {}))


def reads_of_a_step(rank: int, recipe: dict, folder: str) -> list[str]:
    run = start(recipe, folder)
    train_until(run, 1, save=False)  # states are made in the first step
    with Reads() as reads:
        run.trainer.train_step()
    return sorted(reads.found)


HOST_COPY = "readback.read: numpy"
"""Of memory on the host, filled by a copy that was started before the optimizer's own wait."""
ROWS_OF_ALL_TO_ALL = "dispatch._travel: tolist"
"""The sizes of an exchange are arguments of a call on the host: once per layer and micro-batch."""
LOOP = "experts.loop_experts: tolist"
"""The reference backend; grouped GEMM leaves the offsets on the device."""
OWN_DECISION = "engine._clip_plain: __float__"
"""To step or skip, where DeepSpeed has no optimizer that decides it."""


@pytest.mark.parametrize(
    ("stage", "expert", "backend", "precision", "expected"),
    [
        (0, 2, "loop", "fp32", [ROWS_OF_ALL_TO_ALL, OWN_DECISION, LOOP]),
        (1, 2, "loop", "fp32", [ROWS_OF_ALL_TO_ALL, LOOP]),
        (1, 1, "grouped", "bf16", []),
        (2, 2, "grouped", "bf16", [ROWS_OF_ALL_TO_ALL]),
        (3, 1, "grouped", "bf16", []),
    ],
)
def test_a_step_reads_nothing_else(tmp_path, stage, expert, backend, precision, expected):
    corpus = write_corpus(tmp_path / "tiny")
    recipe = tiny_recipe(
        corpus,
        DEEPSEEK,
        zero={"stage": stage},
        parallel={"expert": expert},
        moe={"backend": backend, "bias_update_rate": 1e-2, "aux_loss_coef": 0.01, "z_loss_coef": 1e-3},
        precision={"compute": precision},
    )
    for found in run_distributed(reads_of_a_step, 2, recipe, str(tmp_path / "run")):
        assert found == sorted([HOST_COPY, *expected])


def deepspeeds_reads_of_a_step(rank: int, recipe: dict, folder: str) -> list[str]:
    run = start(recipe, folder)
    train_until(run, 1, save=False)
    with Reads() as reads:
        run.trainer.train_step()
    return reads.by_deepspeed


DECISION = "utils.is_invalid_grad_norm: __bool__"
CLIP = "utils.clip_tensors_by_global_norm: __bool__"
"""Its bf16 optimizer, which stage 1 is in bf16, looks whether there is anything to clip."""


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [(1, "fp32", [DECISION]), (2, "fp32", [DECISION]), (1, "bf16", [DECISION, CLIP]), (2, "bf16", [DECISION])],
)
def test_whether_a_step_is_finite_is_read_once(tmp_path, stage, precision, expected):
    recipe = tiny_recipe(
        write_corpus(tmp_path / "tiny"),
        DEEPSEEK,
        zero={"stage": stage},
        optimizer={"grad_clip": 0.5},
        precision={"compute": precision},
    )
    for found in run_distributed(deepspeeds_reads_of_a_step, 2, recipe, str(tmp_path / "run")):
        assert sorted(found) == sorted(expected)
