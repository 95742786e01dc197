"""What diagnostics cost: milliseconds of a step, watched and not; and which copies to the host a step makes.

    python tests/bench/bench_diagnostics.py recipes/moe_1b_a200m.yaml --set parallel.expert=1
    torchrun --nproc-per-node 2 tests/bench/bench_diagnostics.py recipes/moe_1b_a200m.yaml

On a GPU first a profile of steps between two log steps: copies from device to host, with and without diagnostics, which
must be the same; and the lines at which the host waits for the device. Then blocks of steps take turns, so that a
machine that slows down slows all of them: no step watched; every tenth logged (the two sampled steps and the line
included); every step logged.
"""

import argparse
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.parallel import Ranks, build_groups, close_process_group, init_process_group
from moe_train.train.assemble import assemble
from moe_train.train.check import pick_device, resolve_run
from moe_train.train.loop import Trainer
from moe_train.train.run import _resume
from moe_train.train.stop import StopRequest

INTERVALS = {"no step watched": 0, "every 10th logged": 10, "every step logged": 1}


def build(recipe: str, overrides: list[str]) -> Trainer:
    ranks = Ranks.from_environment()
    device = pick_device(ranks)
    fixed = ["train.steps=100000", "tracking.mode=disabled", "diagnostics.load_picture=false"]
    run = resolve_run(Path(recipe), (*overrides, *fixed), ranks.world, ranks.per_node)
    init_process_group(ranks, device, 600)
    groups = build_groups(run.topology, 600)
    assembly = assemble(run, groups, device)
    run_dir = Path(tempfile.mkdtemp())
    position = _resume(assembly, run_dir, lambda *args, **kwargs: None)
    throughput = Throughput(num_devices=ranks.world)
    return Trainer(assembly, position, run_dir, NullTracker(), NullProgress(), throughput, StopRequest())


def log_every(trainer: Trainer, interval: int) -> Callable[[int], bool]:
    """From now on lines are written at multiples of `interval` (0: never)."""
    logs = lambda step: bool(interval) and step % interval == 0  # noqa: E731
    trainer.observer.logs_at = logs  # type: ignore[method-assign]
    return logs


def steps(trainer: Trainer, number: int, logs: Callable[[int], bool]) -> None:
    for _ in range(number):
        sums, result = trainer.train_step()
        trainer.counts_since_log += sums.counts_LE
        if logs(trainer.step):
            trainer.log(sums, result, None)


def milliseconds(trainer: Trainer, number: int, interval: int) -> float:
    logs = log_every(trainer, interval)
    wait(trainer)
    began = time.perf_counter()
    steps(trainer, number, logs)
    wait(trainer)
    return 1e3 * (time.perf_counter() - began) / number


def wait(trainer: Trainer) -> None:
    if trainer.assembly.device.type == "cuda":
        torch.cuda.synchronize()
    trainer.groups.world.barrier()


def copies_to_host(trainer: Trainer, interval: int) -> Counter:
    """Of three steps that are followed by no log step, by name."""
    logs = log_every(trainer, interval)
    while trainer.step % 10 != 1:
        steps(trainer, 1, logs)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps(trainer, 3, logs)
        wait(trainer)
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(name for name in names if "memcpy" in name.lower() and "dtoh" in name.lower())


def waits(trainer: Trainer) -> Counter:
    """Lines outside of torch at which one step that is not logged waits for the device."""
    logs, found = log_every(trainer, 0), Counter()

    def note(*args: object, **kwargs: object) -> None:
        lines = [
            frame
            for frame in traceback.extract_stack()[:-1]
            if "/torch/" not in frame.filename and not frame.filename.endswith("warnings.py")
        ]
        found[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in lines[:-4:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        steps(trainer, 1, logs)
        torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--blocks", type=int, default=5)
    arguments = parser.parse_args()
    trainer = build(arguments.recipe, arguments.overrides)
    lead = trainer.groups.rank == 0
    milliseconds(trainer, 5, 1)  # warm
    if trainer.assembly.device.type == "cuda":
        for name, interval in (("without", 0), ("with", 10)):
            copies = copies_to_host(trainer, interval)
            if lead:
                print(f"three steps {name} diagnostics, copies to the host: {dict(copies) or 'none'}", flush=True)
        for line, count in waits(trainer).items():
            if lead:
                print(f"waits {count} times a step: {line}", flush=True)
    found: dict[str, list[float]] = {name: [] for name in INTERVALS}
    for _ in range(arguments.blocks):
        for name, interval in INTERVALS.items():
            found[name].append(milliseconds(trainer, arguments.steps, interval))
    base = statistics.median(found["no step watched"])
    for name, values in found.items():
        middle = statistics.median(values)
        if lead:
            print(
                f"{name:<18} {middle:9.2f} ms a step  {100 * (middle / base - 1):+6.2f} %  "
                f"{min(values):.2f} to {max(values):.2f}"
            )
    trainer.groups.world.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
