"""The same run at several layouts, step by step: losses, gradient norms, and which expert got how many tokens.

    python tests/bench/check_layouts.py recipes/quickstart.yaml --layouts "1; 1; 2 parallel.expert=2 zero.stage=1"

A layout is a number of ranks, on GPUs where there are any, and overrides of the recipe. Prints how far losses and norms
are from the first layout's, and the first step at which an expert of some layer got another number of tokens, with the
number of choices that moved: what differs from there on began with a near-tie that was decided otherwise. Exit code 1
if a loss differs by more than --bound before that, if more than one choice in a thousand moved at once, or if anything
is not finite.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.parallel import Ranks, build_groups, close_process_group, init_process_group
from moe_train.train.assemble import assemble
from moe_train.train.check import pick_device, resolve_run
from moe_train.train.loop import Trainer
from moe_train.train.run import _free_memory
from moe_train.train.state import Position
from moe_train.train.stop import StopRequest


@dataclass
class Run:
    """By step; counts: tokens of each layer and expert."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)


def steps_of(recipe: Path, overrides: list[str], steps: int) -> Run:
    ranks, found = Ranks.from_environment(), Run()
    device = pick_device(ranks)
    run = resolve_run(recipe, (*overrides, "tracking.mode=disabled"), ranks.world, ranks.per_node)
    init_process_group(ranks, device, 600)
    assembly = assemble(run, build_groups(run.topology, 600), device)
    position = Position(step=0, sequences=0, data="", run_id="", history={}, counts=[])
    trainer = Trainer(assembly, position, Path(), NullTracker(), NullProgress(), Throughput(), StopRequest())
    trainer.observer.logs_at = lambda step: False  # type: ignore[method-assign]
    for _ in range(steps):
        sums, result = trainer.train_step()
        found.losses.append(sums.loss)
        found.norms.append(float(result.grad_norm))
        found.counts.append(sums.counts_LE.tolist())
    del trainer, assembly
    _free_memory(device)
    return found


TIES = 1e-3
"""Of all choices, how many may part at once: more are no near-ties."""


def line_of(first: Run, other: Run, bound: float) -> tuple[str, bool]:
    """As a row of the table; and whether it is the same run, but for near-ties."""

    def apart(a: list[float], b: list[float], until: int) -> float:
        return max((abs(x - y) / abs(x) for x, y in list(zip(a, b, strict=True))[:until]), default=0.0)

    steps = len(first.losses)
    same = next((n for n, both in enumerate(zip(first.counts, other.counts, strict=True)) if both[0] != both[1]), steps)
    losses = apart(first.losses, other.losses, same)
    parts, moved, all_choices = "never", 0, sum(map(sum, first.counts[0]))
    if same < steps:
        both = (itertools.chain.from_iterable(run.counts[same]) for run in (first, other))
        moved = sum(abs(a - b) for a, b in zip(*both, strict=True)) // 2
        parts = f"{same + 1}: {moved} of {all_choices}"
    cells = [f"{losses:.1e}", f"{apart(first.norms, other.norms, same):.1e}", parts]
    cells += [f"{apart(first.losses, other.losses, steps):.1e}", f"{other.losses[-1]:.6f}"]
    finite = all(map(math.isfinite, [*other.losses, *other.norms]))
    return " | ".join(cells), finite and losses <= bound and moved <= TIES * all_choices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--layouts", required=True, help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bound", type=float, default=1e-6)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layouts = [each.split() for each in arguments.layouts.split(";")]
    if arguments.child is not None:
        for number, (ranks, *overrides) in enumerate(layouts):
            if int(ranks) == Ranks.from_environment().world:
                found = steps_of(arguments.recipe, overrides, arguments.steps)
                if not Ranks.from_environment().rank:
                    (arguments.child / f"{number}.json").write_text(json.dumps(asdict(found)))
        close_process_group()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for ranks in dict.fromkeys(layout[0] for layout in layouts):
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
            command += [*sys.argv[1:], "--child", folder]
            if subprocess.run([sys.executable, *command]).returncode:
                return 1
        runs = [Run(**json.loads((Path(folder) / f"{number}.json").read_text())) for number in range(len(layouts))]
    print("| layout | loss apart while counts agree | norm | counts part at step: choices | loss, all | last loss |")
    print("|---|---|---|---|---|---|")
    good = True
    for layout, run in zip(layouts, runs, strict=True):
        line, same = line_of(runs[0], run, arguments.bound)
        print(f"| {' '.join(layout)} | {line} |", flush=True)
        good &= same
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
