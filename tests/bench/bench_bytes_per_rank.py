"""Bytes of weights, gradients and optimizer states on each rank, by ZeRO stage and EP size, measured on 4 gloo ranks.

    python tests/bench/bench_bytes_per_rank.py

The quickstart's model in bf16 (fp32 master weights and gradients), after one optimizer step. Counts the tensors that
are really held, experts and dense part apart; activations and communication buffers are not in it.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.config import load_recipe
from moe_train.model import load_model_config
from moe_train.optim import Engine, optimizer_factory
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun

ROOT = Path(__file__).parents[2]
WORLD = 4


def measure(rank: int, expert: int, stage: int) -> dict[str, int]:
    overrides = ["precision.compute=bf16", f"zero.stage={stage}", "batch.micro_size=1", "data.sequence_length=64"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides)
    run = ResolvedRun.at(recipe, Topology(world=WORLD, expert=expert), load_model_config(recipe, 257))
    cpu = torch.device("cpu")
    groups = build_groups(run.topology)
    built, store = build_sharded_model(run, groups, cpu)
    engine = Engine(built.model, store, optimizer_factory(recipe.optimizer, cpu), recipe, groups, run.accumulation)
    for number in range(run.accumulation):
        with built.context.micro_batch():
            logits = engine(input_ids=torch.randint(0, 257, (1, 64))).logits
            engine.backward(logits.float().square().mean(), last=number == run.accumulation - 1)
    engine.step(1e-3)
    states = sum(view.nbytes for f in engine.dense_fragments() for view in f.views.values())
    # below stage 3 the bf16 copy is whole; at stage 3 the parameter is its partition
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in built.model.parameters())
    held = store.bytes_held()
    return {"experts": held["weights"] + held["gradients"] + held["states"], "expert states": held["states"],
            "dense": weights + states, "dense states": states}  # fmt: skip


def main() -> None:
    print(f"{WORLD} gloo ranks, torch {torch.__version__}; MiB on the rank that holds most")
    print(f"{'EP':>3}{'ZeRO':>6}{'experts':>10}{'of it states':>14}{'dense':>8}{'of it states':>14}")
    for expert in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            results = run_distributed(measure, WORLD, expert, stage)
            most = {key: max(result[key] for result in results) / 2**20 for key in results[0]}
            print(
                f"{expert:>3}{stage:>6}{most['experts']:>10.2f}{most['expert states']:>14.2f}"
                f"{most['dense']:>8.2f}{most['dense states']:>14.2f}"
            )


if __name__ == "__main__":
    main()
