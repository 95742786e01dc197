"""Multi-rank tests on one machine: plain functions, run on N processes that stay alive between tests."""

import atexit
import functools
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 180
ANSWER_TIMEOUT_S = 400

PRELOADED = ["torch.distributed", "deepspeed", "transformers", "moe_train.train", "torch._inductor.compile_fx"]
"""The last is what ZeRO-3 imports. One that cannot be imported is left to the workers."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error, relative to the largest element of the reference, by type of computation."""


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    what: str = "values",
    dtype: torch.dtype | None = None,
    floor: float = 0.0,
) -> None:
    """Within TOLERANCE of `expected`, relative to its largest element.

    Args:
        dtype: what the computation ran in; default: the coarser of the two types.
        floor: smallest scale to compare with, for references that may vanish.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    tolerance = TOLERANCE[dtype] if dtype else max(TOLERANCE[actual.dtype], TOLERANCE[expected.dtype])
    if not expected.numel():
        return
    scale = max(float(expected.abs().max()), floor)
    error = float((actual.double() - expected.double()).abs().max())
    assert error <= tolerance * scale, f"{what}: error {error:.3e} at scale {scale:.3e} ({tolerance:.0e})"


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu") -> list[Any]:
    """Call `function(rank, *args)` on every rank of a world; its results in rank order.

    `function` must be importable (module level). If a rank raises, the error of the first one is raised here with its
    traceback, and the processes are replaced.

    Args:
        device: `cpu`: the ranks talk over gloo. `cuda`: over NCCL, and rank r has GPU r; more ranks than GPUs share
            them and talk over gloo, because NCCL takes one rank per GPU.
    """
    return _pool(world_size, device).run(function, args)


@functools.cache
def _pool(world_size: int, device: str) -> "WorkerPool":
    pool = WorkerPool(world_size, device)
    atexit.register(pool.close)
    return pool


class WorkerPool:
    """N processes with a process group among them, started when first needed."""

    def __init__(self, world_size: int, device: str = "cpu"):
        self.world_size, self.device = world_size, device
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], args: tuple) -> list[Any]:
        if not self.processes:
            self._start()
        # what cannot be sent raises here, before any rank has a task; the path may have grown since they started
        tasks = [bytes(ForkingPickler.dumps((function, args))) for _ in self.pipes]
        for pipe, task in zip(self.pipes, tasks, strict=True):
            pipe.send((list(sys.path), task))
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=ANSWER_TIMEOUT_S)
            if not ready:
                answers |= dict.fromkeys(waiting.values(), (False, f"no answer in {ANSWER_TIMEOUT_S} s"))
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, f"rank {rank} died")
            if any(not ok for ok, _ in answers.values()):
                ready_soon = wait(list(waiting), timeout=2)  # whoever failed too; the rest may wait for it for ever
                for pipe in ready_soon:
                    rank = waiting.pop(pipe)  # type: ignore[arg-type]
                    try:
                        answers[rank] = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        answers[rank] = (False, f"rank {rank} died")
                break
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failures:
            self.close()
            raise AssertionError("\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
        return [answers[rank][1] for rank in range(self.world_size)]

    def _start(self) -> None:
        context, port = _context(self.device), free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, port, self.device), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


@functools.cache
def _context(device: str) -> Any:
    """Starts workers: on a CPU as copies of one process that has imported what they all need, five seconds' worth.

    CUDA does not survive being copied.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, DS_ACCELERATOR=device):  # DeepSpeed reads it when it is imported
        forkserver.ensure_running()
    return context


def _serve(pipe: Connection, rank: int, world_size: int, port: int, device: str) -> None:
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    gpu = torch.device(device, rank % gpus) if gpus else None
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank if gpu is None else gpu.index),  # DeepSpeed makes it the current device
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=device,  # gloo, also on a host with GPUs; and DeepSpeed says nothing about its choice
    )
    torch.set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        "nccl" if gpus >= world_size else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=gpu if gpus >= world_size else None,
    )
    # DeepSpeed collects garbage up to six times whenever an engine is made: most of a second each, spent on the modules
    # that are there to stay
    gc.freeze()
    modules = len(sys.modules)
    while True:
        try:
            sys.path[:], task = pipe.recv()
        except EOFError:
            os._exit(0)
        function = args = None
        try:
            function, args = pickle.loads(task)
            answer = (True, function(rank, *args))
        except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        del function, args, answer, task
        if len(sys.modules) > modules:
            modules = len(sys.modules)
            gc.collect()
            gc.freeze()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
