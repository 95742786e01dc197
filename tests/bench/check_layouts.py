"""The same run at several layouts, step by step: losses, gradient norms, and which expert got how many tokens.

    python tests/bench/check_layouts.py recipes/quickstart.yaml --layouts "1; 1; 2 parallel.expert=2 zero.stage=1"

A layout is a number of ranks and overrides of the recipe, runs begin with the first one's. Prints how far losses and
norms are from the first layout's, and the first step at which an expert of some layer got another number of tokens:
from there on a difference is a near-tie of a router that was decided otherwise, not an error of arithmetic. Exit code 1
if a loss differs by more than --bound before that. `--together` runs layouts beside one another, as GPUs allow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]
    counts: list[list[list[int]]]


def start(recipe: Path, layout: str, steps: int, folder: Path, first_gpu: int) -> subprocess.Popen:
    ranks, *overrides = layout.split()
    overrides = [f"train.steps={steps}", "diagnostics.log_interval=1", "tracking.mode=disabled", *overrides]
    gpus = ",".join(str(first_gpu + rank) for rank in range(int(ranks)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "launch"]
    command += [str(recipe), "--run-dir", str(folder), *(part for each in overrides for part in ("--set", each))]
    out = (folder.parent / f"{folder.name}.log").open("w")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)


def read(folder: Path) -> Run:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    loads = [line for line in lines if line.get("event") == "load"]
    return Run(
        [line["train/loss"] for line in steps],
        [line["train/grad_norm"] for line in steps],
        [line["counts"] for line in loads],
    )


def compare(first: Run, other: Run, bound: float) -> tuple[str, bool]:
    def apart(a: list[float], b: list[float], until: int) -> float:
        return max((abs(x - y) / abs(x) for x, y in list(zip(a, b, strict=True))[:until]), default=0.0)

    steps = len(first.losses)
    same = next((n for n, both in enumerate(zip(first.counts, other.counts, strict=True)) if both[0] != both[1]), steps)
    losses = apart(first.losses, other.losses, same)
    line = f"{losses:.1e} | {apart(first.norms, other.norms, same):.1e} | "
    line += f"{same + 1 if same < steps else 'never'} | {apart(first.losses, other.losses, steps):.1e}"
    return f"{line} | {other.losses[-1]:.6f}", len(other.losses) == steps and losses <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--layouts", required=True, help="separated by semicolons")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bound", type=float, default=1e-6)
    parser.add_argument("--together", type=int, default=1, metavar="GPUS")
    arguments = parser.parse_args()
    layouts, found, good = [each.strip() for each in arguments.layouts.split(";")], {}, True
    with tempfile.TemporaryDirectory() as root:
        waiting = list(enumerate(layouts))
        while waiting:
            batch, used = [], 0
            while waiting and (not batch or used + int(waiting[0][1].split()[0]) <= arguments.together):
                number, layout = waiting.pop(0)
                folder = Path(root) / str(number)
                batch.append((number, folder, start(arguments.recipe, layout, arguments.steps, folder, used)))
                used += int(layout.split()[0])
            for number, folder, process in batch:
                if process.wait():
                    print((Path(root) / f"{number}.log").read_text()[-3000:])
                    return 1
                found[number] = read(folder)
    print(
        "| layout | loss apart, while experts get the same | norm | first step with other counts | loss, all | last |"
    )
    print("|---|---|---|---|---|---|")
    for number, layout in enumerate(layouts):
        line, close = compare(found[0], found[number], arguments.bound)
        print(f"| {layout} | {line} |", flush=True)
        good &= close
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
