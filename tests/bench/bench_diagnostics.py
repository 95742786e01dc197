"""What diagnostics cost: milliseconds of a step, watched and not; and which copies to the host a step makes.

    python tests/bench/bench_diagnostics.py recipes/moe_1b_a200m.yaml --set parallel.expert=1
    torchrun --nproc-per-node 2 tests/bench/bench_diagnostics.py recipes/moe_1b_a200m.yaml

On a GPU first a profile of steps between two log steps: copies from device to host, with and without diagnostics, which
must be the same; and the lines at which the host waits for the device. Then blocks of ten steps take turns, so that a
machine that slows down slows all of them: no step watched; every tenth logged (the two sampled steps and the line
included); every step logged. Each step is timed by itself. A block's step is the mean over its ten places of the median
over the blocks, so that a step that was held up by something else counts for nothing.
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
from moe_train.diagnostics.tracker import NullTracker, Tracker
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
    tracker = Tracker(run_dir, run.recipe.tracking, {}) if ranks.rank == 0 else NullTracker()
    return Trainer(assembly, position, run_dir, tracker, NullProgress(), throughput, StopRequest())


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


def milliseconds(trainer: Trainer, interval: int) -> list[float]:
    """Of ten steps, the last of which has a number that ends in 0."""
    logs, found = log_every(trainer, interval), []
    for _ in range(10):
        wait(trainer)
        began = time.perf_counter()
        steps(trainer, 1, logs)
        wait(trainer)
        found.append(1e3 * (time.perf_counter() - began))
    return found


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
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--times-only", action="store_true", help="no profile before them")
    arguments = parser.parse_args()
    trainer = build(arguments.recipe, arguments.overrides)
    lead = trainer.groups.rank == 0
    milliseconds(trainer, 1)  # warm
    if trainer.assembly.device.type == "cuda" and not arguments.times_only:
        for name, interval in (("without", 0), ("with", 10)):
            copies = copies_to_host(trainer, interval)
            if lead:
                print(f"three steps {name} diagnostics, copies to the host: {dict(copies) or 'none'}", flush=True)
        for line, count in waits(trainer).items():
            if lead:
                print(f"waits {count} times a step: {line}", flush=True)
    steps(trainer, -trainer.step % 10, log_every(trainer, 0))
    found: dict[str, list[list[float]]] = {name: [] for name in INTERVALS}
    for _ in range(arguments.blocks):
        for name, interval in INTERVALS.items():
            found[name].append(milliseconds(trainer, interval))
    middle = {name: statistics.mean(map(statistics.median, zip(*all_, strict=True))) for name, all_ in found.items()}
    base = middle["no step watched"]
    for name, blocks in found.items():
        if lead:
            spread = f"{min(map(statistics.mean, blocks)):.2f} to {max(map(statistics.mean, blocks)):.2f}"
            print(f"{name:<18} {middle[name]:9.2f} ms a step  {100 * (middle[name] / base - 1):+6.2f} %  {spread}")
    if lead:
        tenth = (middle["every step logged"] - base) / 10
        print(f"a tenth of what every step logged costs: {tenth:.3f} ms a step, {100 * tenth / base:+.2f} %")
        places = zip(*found["every 10th logged"], strict=True)
        print("every 10th logged, place by place:", " ".join(f"{statistics.median(each):.1f}" for each in places))
    trainer.groups.world.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
