"""The same model trained twice on the standard library's sources, with `precision.experts` bf16 and fp8: both curves.

    python tests/bench/bench_fp8_training.py [--steps 1000] [--out runs/fp8]      (one H100 or H200, a few minutes)
    TRITON_INTERPRET=1 python tests/bench/bench_fp8_training.py --toy             (anywhere; the numbers mean nothing)
    python tests/bench/bench_fp8_training.py --from FILE.csv                      (the table and the picture again)

A Qwen3-MoE of 0.12 B parameters, 0.04 B active, all of whose expert products are large enough for FP8, started by
`deepspeed launch`. Writes <name>.csv and <name>.png to --results and prints the relative difference of the last tenth
of the training losses, smoothed over it, and of the validation losses at the end. Exits 1 if either is beyond 0.5 %.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.diagnostics.metrics_file import read_curve

ROOT = Path(__file__).parents[2]
LIMIT = 0.005
PRECISIONS = ("bf16", "fp8")
RECIPE = """\
model:
  model_type: qwen3_moe
  config:
    hidden_size: {hidden}
    num_hidden_layers: 4
    num_attention_heads: {heads}
    num_key_value_heads: {heads}
    head_dim: 64
    num_experts: 16
    num_experts_per_tok: 4
    moe_intermediate_size: {inner}
    norm_topk_prob: true
    max_position_embeddings: 1024
moe: {{backend: fused, aux_loss_coef: 0.01}}
parallel: {{expert: 1}}
precision: {{compute: bf16}}
optimizer: {{lr: 6.0e-4}}
schedule: {{kind: cosine, warmup_steps: {warmup}}}
data: {{corpora: [{{text: python-stdlib}}], sequence_length: {length}}}
batch: {{global_size: 16, micro_size: 16}}
train: {{steps: {steps}, eval_sequences: {evaluated}}}
checkpoint: {{at_end: false}}
diagnostics: {{log_interval: {every}, load_picture: false, report: false}}
tracking: {{mode: disabled}}
seed: 1
"""

Curves = dict[str, dict[str, list[tuple[int, float]]]]
"""By precision: `train` and `val`, (step, loss)."""


def train(recipe: Path, run_dir: Path, precision: str) -> dict[str, list[tuple[int, float]]]:
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "1", "--log_level", "error", "launch"]
    command = [sys.executable, "-m", *launcher, str(recipe), "--run-dir", str(run_dir)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--set", f"precision.experts={precision}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{precision}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    banner = [line for line in done.stdout.splitlines() if line.startswith(("parameters", "experts"))]
    metrics = run_dir / "metrics.jsonl"
    speeds = [value for _, value in read_curve(metrics, "perf/tokens_per_s")]
    middle = sorted(speeds)[len(speeds) // 2] if speeds else float("nan")
    print(f"{precision}: {time.perf_counter() - began:.0f} s in all, median {middle:,.0f} tokens/s")
    print("\n".join(f"  {line}" for line in banner), flush=True)
    return {"train": read_curve(metrics, "train/loss"), "val": read_curve(metrics, "val/loss")}


def write_csv(curves: Curves, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *(f"{what}_{name}" for what in ("train", "val") for name in PRECISIONS)])
        columns = [dict(curves[name][what]) for what in ("train", "val") for name in PRECISIONS]
        for step in sorted({step for column in columns for step in column}):
            writer.writerow([step, *(f"{column[step]:.5f}" if step in column else "" for column in columns)])


def read_csv(path: Path) -> Curves:
    curves: Curves = {name: {"train": [], "val": []} for name in PRECISIONS}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name in PRECISIONS:
                for what in ("train", "val"):
                    if row[f"{what}_{name}"]:
                        curves[name][what].append((int(row["step"]), float(row[f"{what}_{name}"])))
    return curves


def ends(curves: Curves) -> dict[str, tuple[float, float]]:
    """Losses of bf16 and fp8: the mean of the last tenth of the steps, and the last validation."""
    last = curves["bf16"]["train"][-1][0]

    def smoothed(name: str) -> float:
        kept = [loss for step, loss in curves[name]["train"] if step > 0.9 * last]
        return sum(kept) / len(kept)

    validation = [curves[name]["val"][-1][1] for name in PRECISIONS]
    return {
        "training, mean of the last tenth": (smoothed("bf16"), smoothed("fp8")),
        "validation, at the end": (validation[0], validation[1]),
    }


def picture(curves: Curves, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, difference = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, style in zip(PRECISIONS, ("-", "--"), strict=True):
        loss.plot(*zip(*curves[name]["train"], strict=True), style, linewidth=1, label=f"experts in {name}")
    pairs = zip(curves["bf16"]["train"], curves["fp8"]["train"], strict=True)
    percent = [(step, 100 * (other / one - 1)) for (step, one), (_, other) in pairs]
    difference.plot(*zip(*percent, strict=True), color="grey", linewidth=1)
    difference.axhline(0, color="black", linewidth=0.5)
    loss.set(ylabel="training loss, nats per byte", yscale="log")
    difference.set(xlabel="optimizer step", ylabel="fp8 to bf16, %", ylim=(-2, 2))
    loss.legend()
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"), help="of both runs; must not be there")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="fp8_training")
    parser.add_argument("--from", dest="given", type=Path, help="a CSV of an earlier call, in place of training")
    parser.add_argument("--toy", action="store_true", help="a tiny model, a few steps")
    arguments = parser.parse_args()
    if arguments.given is not None:
        curves = read_csv(arguments.given)
    else:
        sizes = {"hidden": 1024, "heads": 16, "inner": 512, "length": 1024, "evaluated": 256, "every": 5, "warmup": 50}
        if arguments.toy:
            sizes = {"hidden": 32, "heads": 1, "inner": 16, "length": 4, "evaluated": 2, "every": 1, "warmup": 1}
        arguments.out.mkdir(parents=True)
        recipe = arguments.out.absolute() / "recipe.yaml"
        sizes["warmup"] = min(sizes["warmup"], arguments.steps)
        recipe.write_text(RECIPE.format(steps=arguments.steps, **sizes))
        curves = {name: train(recipe, arguments.out.absolute() / name, name) for name in PRECISIONS}
        write_csv(curves, arguments.results / f"{arguments.name}.csv")
    picture(curves, arguments.results / f"{arguments.name}.png")
    print("\n| loss | bf16 | fp8 | difference |\n|---|---|---|---|")
    worst = 0.0
    for what, (one, other) in ends(curves).items():
        worst = max(worst, abs(other / one - 1))
        print(f"| {what} | {one:.4f} | {other:.4f} | {100 * (other / one - 1):+.2f} % |")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
