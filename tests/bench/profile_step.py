"""Where a step's time goes: the device at work or idle, kernels by their time, operators by the host's own time.

    python tests/bench/profile_step.py recipes/moe_1b_a200m.yaml --set parallel.expert=1

Steps of the real trainer that are not logged. First their time without a profiler, which slows the host down.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_diagnostics import build, log_every, steps, wait

from moe_train.parallel import close_process_group


def union_ms(spans: list[tuple[float, float]]) -> float:
    """Microseconds in, of all spans together, counting once what overlaps."""
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / 1e3


def show(title: str, times: Counter, calls: Counter, number: int, most: int = 25, often: bool = False) -> None:
    """often: those called most often in place of those that take longest."""
    print(f"\n{title}: ms a step, calls a step")
    for name, _ in (calls if often else times).most_common(most):
        print(f"{times[name] / 1e3 / number:9.2f} {calls[name] / number:8.1f}  {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    trainer = build(arguments.recipe, arguments.overrides)
    number, logs = arguments.steps, log_every(trainer, 0)

    def timed() -> float:
        wait(trainer)
        began = time.perf_counter()
        steps(trainer, number, logs)
        wait(trainer)
        return 1e3 * (time.perf_counter() - began) / number

    steps(trainer, 5, logs)
    plain = sorted(timed() for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        watched = timed()
    device_us, device_calls, host_us, host_calls = Counter(), Counter(), Counter(), Counter()
    spans = []
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            device_us[event.name] += event.time_range.elapsed_us()
            device_calls[event.name] += 1
            spans.append((event.time_range.start, event.time_range.end))
        else:
            host_us[event.name] += event.self_cpu_time_total
            host_calls[event.name] += 1
    if trainer.groups.rank == 0:
        print(f"step {plain[len(plain) // 2]:.1f} ms ({plain[0]:.1f} to {plain[-1]:.1f}); profiled {watched:.1f} ms")
        busy = union_ms(spans) / number
        print(f"device busy {busy:.1f} ms a step, {sum(device_calls.values()) / number:.0f} kernels")
        show("device", device_us, device_calls, number)
        show("device, by calls", device_us, device_calls, number, often=True)
        show("host, own time", host_us, host_calls, number, 40)
    trainer.groups.world.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
