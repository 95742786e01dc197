"""Whole training steps: ours, DeepSpeed AutoEP and transformers, each in processes of its own, in one run.

    python tests/bench/bench_train_step.py                    (a CUDA GPU of 139 GiB)
    python tests/bench/bench_train_step.py --shapes qwen3 --peers ours --profile
    python tests/bench/bench_train_step.py --set optimizer.name=one_pass_adamw --set model.kernels=[rotary]
    python tests/bench/bench_train_step.py --ranks 2          (as many GPUs: EP 2; transformers: data parallel)
    python tests/bench/bench_train_step.py --toy              (anywhere; the numbers mean nothing)

A Hugging Face Qwen3-MoE of 8 layers, hidden 2048, vocabulary 32768, 4 sequences of 4096 bytes of Python's standard
library per rank and step, ZeRO-1, torch's fused AdamW, bf16, no recompute, no router losses. All begin with the same
weights, read the same tokens, and losses are compared step by step; `--peers ours,transformers,transformers:again`
runs a peer twice, to see by how much its own losses differ. Ours is the real trainer's step. AutoEP (deepspeed 0.19.8)
starts with transformers 5.17, not with 5.23.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import versions

from moe_train.config import Recipe, load_recipe
from moe_train.model.build import build_model, find_blocks, meta_model
from moe_train.model.initialize import draw_expert
from moe_train.moe import ResidentExperts, SlotPlan
from moe_train.parallel import Ranks, Topology, build_groups, close_process_group, init_process_group
from moe_train.train.check import ResolvedRun

SUSTAINED = 680e12
"""FLOP/s of dense bf16 products that an H200 keeps up; MFU is against these."""
RANKS = Ranks.from_environment()
COUNTED = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item", "DtoH")


@dataclass(frozen=True)
class Shape:
    experts: int
    width: int
    top_k: int = 8
    layers: int = 8
    hidden: int = 2048
    heads: int = 32
    head_dim: int = 128
    vocabulary: int = 32768
    sequences: int = 4
    length: int = 4096


SHAPES = {"qwen3": Shape(128, 768), "olmoe": Shape(64, 1024)}
TOY = {"toy": Shape(8, 32, 2, layers=2, hidden=64, heads=4, head_dim=16, vocabulary=512, sequences=2, length=32)}


@dataclass
class Result:
    """Seconds of each step, their losses in nats per token, and bytes: `held` after a step (weights and states),
    `gradients` besides at the end of backward, `activations` besides at the end of forward, `peak` of all."""

    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held: int = 0
    gradients: int = 0
    activations: int = 0
    peak: int = 0


def recipe_of(shape: Shape, steps: int, overrides: Sequence[str] = ()) -> Recipe:
    """What all of them train; the learning rate is constant."""
    tree = {
        "seed": 7,
        "model": {
            "model_type": "qwen3_moe",
            "config": {
                "vocab_size": shape.vocabulary,
                "hidden_size": shape.hidden,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": max(shape.heads // 8, 1),
                "head_dim": shape.head_dim,
                "num_experts": shape.experts,
                "num_experts_per_tok": shape.top_k,
                "moe_intermediate_size": shape.width,
                "norm_topk_prob": True,
                "max_position_embeddings": shape.length,
                "tie_word_embeddings": False,
            },
        },
        "moe": {"aux_loss_coef": 0.0},
        "parallel": {"expert": RANKS.world},
        "zero": {"stage": 1},
        "precision": {"compute": "bf16"},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.0, "grad_clip": 1.0},
        "schedule": {"kind": "constant"},
        "data": {"corpora": [{"text": "python-stdlib"}], "sequence_length": shape.length},
        "batch": {"global_size": shape.sequences * RANKS.world, "micro_size": shape.sequences},
        "train": {"steps": steps},
        "tracking": {"mode": "disabled"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_step.yaml"
        path.write_text(json.dumps(tree))  # which is YAML
        return load_recipe(path, overrides)


def tokens_of(shape: Shape, steps: int) -> np.ndarray:
    """[steps, sequences of all ranks, length + 1] real bytes, the same at every call."""
    folder, sequences = Path(os.__file__).parent, shape.sequences * RANKS.world
    size, text = steps * sequences * (shape.length + 1), bytearray()
    for path in sorted(folder.rglob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    assert len(text) >= size, f"{folder} has too few bytes"
    return np.frombuffer(bytes(text[:size]), dtype=np.uint8).astype(np.int64).reshape(steps, sequences, -1)


class Clock:
    """Times steps on the device, without making the host wait for it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if not self.cuda:
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# -------------------------------------------------------------------------------------------------------------- peers


Step = Callable[[int, dict[str, int] | None], torch.Tensor | float]
"""Number of a step, and where to note allocated bytes after its forward and its backward -> its loss."""


def ours(
    shape: Shape, tokens: np.ndarray, device: torch.device, overrides: Sequence[str], compiled: bool = False
) -> Step:
    """compiled: with `model.compile`."""
    from moe_train.diagnostics.progress import NullProgress
    from moe_train.diagnostics.throughput import Throughput
    from moe_train.diagnostics.tracker import NullTracker
    from moe_train.train.assemble import assemble_around
    from moe_train.train.loop import Trainer
    from moe_train.train.state import Position
    from moe_train.train.stop import StopRequest
    from moe_train.verify.worker import Data, Samples

    overrides = (*overrides, "model.compile=true") if compiled else overrides
    topology = Topology(world=RANKS.world, expert=RANKS.world)
    run, groups = ResolvedRun.at(recipe_of(shape, len(tokens), overrides), topology), build_groups(topology)
    assembly = assemble_around(Data(Samples(tokens)), run, groups, device)  # type: ignore[arg-type]
    position = Position(step=0, sequences=0, data="", run_id="", history={}, counts=[])
    trainer = Trainer(assembly, position, Path(), NullTracker(), NullProgress(), Throughput(), StopRequest())
    forward, backward = trainer.forward_loss, trainer.engine.backward
    trainer.observer.logs_at = lambda step: False  # type: ignore[method-assign]

    def step(number: int, note: dict[str, int] | None) -> float:
        def noted_forward(batch):
            loss = forward(batch)
            if note is not None:
                note["forward"] = allocated(device)
            return loss

        def noted_backward(loss, last):
            backward(loss, last)
            if note is not None:
                note["backward"] = allocated(device)

        trainer.forward_loss, trainer.engine.backward = noted_forward, noted_backward  # type: ignore[method-assign]
        sums, _ = trainer.train_step()
        return sums.loss

    return step


def stock(shape: Shape, tokens: np.ndarray, device: torch.device, expert_parallel: bool) -> Step:
    """A Hugging Face model under DeepSpeed ZeRO-1, with AutoEP or with transformers' own grouped GEMM."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(shape, len(tokens))
    run = ResolvedRun.at(recipe, Topology(world=RANKS.world, expert=RANKS.world))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(run.model_config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.config._experts_implementation = "grouped_mm"
    same_weights(model, recipe, run, device)
    model.train()
    optimizer = recipe.optimizer
    settings = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps, "weight_decay": 0.0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.sequences,
        "bf16": {"enabled": True},
        "gradient_clipping": optimizer.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {**settings, "torch_adam": True, "fused": device.type == "cuda"},
        },
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
    }
    if expert_parallel:
        config["expert_parallel"] = {"enabled": True, "autoep_size": RANKS.world, "preset_model": "qwen3_moe"}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(number: int, note: dict[str, int] | None) -> torch.Tensor:
        mine = tokens[number, RANKS.rank * shape.sequences :][: shape.sequences]
        batch = torch.from_numpy(mine).to(device, non_blocking=True)
        labels = batch[:, 1:].contiguous()
        loss = engine(input_ids=batch[:, :-1].contiguous(), labels=labels, shift_labels=labels).loss
        if note is not None:
            note["forward"] = allocated(device)
        engine.backward(loss)
        if note is not None:
            note["backward"] = allocated(device)
        engine.step()
        return loss.detach() if RANKS.world == 1 else all_reduce_mean(loss)

    return step


def all_reduce_mean(loss: torch.Tensor) -> torch.Tensor:
    """Every rank has as many tokens."""
    mean = loss.detach() / RANKS.world
    torch.distributed.all_reduce(mean)
    return mean


class _KeepsNothing:
    def experts(self, block, draw, plan):
        return ResidentExperts(torch.zeros(0), torch.zeros(0))

    def shared(self, block, draw):
        raise AssertionError("Qwen3-MoE has no shared experts")


@torch.no_grad()
def same_weights(model: torch.nn.Module, recipe: Recipe, run: ResolvedRun, device: torch.device) -> None:
    """Those that our trainer draws for the recipe."""
    plan = SlotPlan(run.model_config.num_experts, 1)
    alone = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"expert": 1})})
    groups = build_groups(Topology(world=RANKS.world, expert=1))
    built = build_model(alone, run.model_config, groups, plan, device, _KeepsNothing())
    drawn, held = built.model.state_dict(), dict(model.named_parameters())
    meta = meta_model(recipe, run.model_config)
    for block in find_blocks(meta):
        for expert in range(plan.num_experts):
            found = draw_expert(meta, block.experts, block.experts_name, expert, device, recipe.seed)
            for key, value in found.items():
                held[f"{block.experts_name}.{key}"][expert].copy_(value)
    for name in held.keys() & drawn.keys():
        held[name].copy_(drawn[name])


PEERS: dict[str, Callable[[Shape, np.ndarray, torch.device, Sequence[str]], Step]] = {
    "ours": ours,
    "ours_compiled": lambda *given: ours(*given, compiled=True),
    "deepspeed_autoep": lambda shape, tokens, device, _: stock(shape, tokens, device, expert_parallel=True),
    "transformers": lambda shape, tokens, device, _: stock(shape, tokens, device, expert_parallel=False),
}


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(
    peer: str, shape: Shape, steps: int, device: torch.device, overrides: Sequence[str], profiled: bool
) -> Result:
    """Steps, of which the first three are not timed; one more after them notes memory, and three are profiled."""
    began = time.perf_counter()
    tokens = tokens_of(shape, steps + 4)
    step, result, clock, note = (
        PEERS[peer.partition(":")[0]](shape, tokens, device, overrides),
        Result(),
        Clock(device),
        {},
    )
    losses = [step(0, None)]
    result.losses.append(float(losses.pop()))
    result.first_s = time.perf_counter() - began
    for number in range(1, steps):
        if number >= 3:
            clock.mark()
        losses.append(step(number, None))
    clock.mark()
    result.seconds = clock.seconds()
    result.losses += [float(loss) for loss in losses]
    result.held = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(steps, note)
    result.peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    result.activations, result.gradients = note["forward"] - result.held, note["backward"] - result.held
    if profiled:  # on every rank, as all of them must step
        show_profile(lambda number: step(steps + 1 + number, None), device)
    return result


def show_profile(step: Callable[[int], Any], device: torch.device, rows: int = 25) -> None:
    """The kernels that take longest in a step, and how often the host waits or copies."""
    number = 3
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for index in range(number):
            step(index)
        if device.type == "cuda":
            torch.cuda.synchronize()
    if RANKS.rank:
        return
    found = seen.key_averages()
    kernels = sorted(
        (
            (row.self_device_time_total / number / 1e3, row.count / number, row.key)
            for row in found
            if row.device_type != torch.autograd.DeviceType.CPU
        ),
        reverse=True,
    )
    total = sum(row[0] for row in kernels)
    print(f"\na step's kernels: {total:.1f} ms in all, {sum(row[1] for row in kernels):.0f} launches")
    print("| ms | of all | launches | kernel |\n|---|---|---|---|")
    for ms, count, name in kernels[:rows]:
        print(f"| {ms:.2f} | {ms / max(total, 1e-9):.1%} | {count:.0f} | {name[:110]} |")
    for wanted in COUNTED:
        counts = sum(row.count for row in found if wanted in row.key)
        print(f"{wanted}: {counts / number:.1f} a step")
    print(flush=True)


def flops_per_token(shape: Shape) -> float:
    """6 per parameter that a token is multiplied with, and its causal attention (PaLM, arXiv 2204.02311, B)."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * max(shape.heads // 8, 1))
    experts = 3 * shape.top_k * shape.width * shape.hidden + shape.experts * shape.hidden
    active = shape.layers * (attention + experts) + shape.hidden * shape.vocabulary
    return 6.0 * active + 12.0 * shape.layers * shape.heads * shape.head_dim * shape.length / 2


def table(shape: Shape, results: dict[str, Result]) -> None:
    print(
        "| | tokens/s | ms | model TFLOP/s | MFU of 680 | peak GiB | held | gradients | activations | first step, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for peer, result in results.items():
        seconds = statistics.median(result.seconds)
        rate = shape.sequences * shape.length / seconds  # of one rank
        flops = rate * flops_per_token(shape)
        gib = [size / 2**30 for size in (result.peak, result.held, result.gradients, result.activations)]
        print(
            f"| {peer} | {rate:,.0f} | {1e3 * seconds:.1f} | {flops / 1e12:.0f} | {flops / SUSTAINED:.1%} | "
            f"{' | '.join(f'{size:.1f}' for size in gib)} | {result.first_s:.0f} |"
        )
    if "ours" not in results:
        return
    mine = results["ours"]
    for peer, result in results.items():
        if peer == "ours":
            continue
        ratio = statistics.median(result.seconds) / statistics.median(mine.seconds)
        gaps = [abs(a - b) for a, b in zip(mine.losses, result.losses, strict=True)]
        few = range(0, len(gaps), max(len(gaps) // 8, 1))
        print(f"\nours is {ratio:.2f}x {peer}; losses differ by {max(gaps):.4f} at most, {gaps[-1]:.4f} at the end")
        print("  " + ", ".join(f"{n + 1}: {mine.losses[n]:.4f} / {result.losses[n]:.4f}" for n in few))
    others = [peer for peer in results if peer != "ours"]
    for first, second in itertools.combinations(others, 2):
        gaps = [abs(a - b) for a, b in zip(results[first].losses, results[second].losses, strict=True)]
        print(f"{first} and {second}: losses differ by {max(gaps):.4f} at most, {gaps[-1]:.4f} at the end")
    print(flush=True)


# --------------------------------------------------------------------------------------------------------------- main


def alone(peer: str, shape_name: str, arguments: argparse.Namespace, folder: str) -> Result | None:
    """One peer in a process of its own."""
    out = Path(folder) / f"{shape_name}-{peer}.json"
    command = [sys.executable, __file__, "--child", str(out), "--peers", peer, "--shapes", shape_name]
    command += ["--steps", str(arguments.steps)]
    command += ["--toy"] if arguments.toy else []
    command += [part for override in arguments.overrides for part in ("--set", override)]
    command += ["--profile"] if arguments.profile and peer == "ours" else []
    if arguments.ranks > 1:
        started = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
        command[1:1] = started
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    if done.returncode:
        print(f"{peer} failed:", *lines[-40:], sep="\n", flush=True)
        return None
    start = next((i for i, line in enumerate(lines) if line.startswith("a step's kernels")), len(lines))
    print(*lines[start:], sep="\n", end="\n" if start < len(lines) else "", flush=True)
    return Result(**json.loads(out.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="ours,deepspeed_autoep,transformers", help="of " + ", ".join(PEERS))
    parser.add_argument("--shapes", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="of our recipe: dotted.key=value")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of this host; experts are divided over them")
    parser.add_argument("--profile", action="store_true", help="of ours: kernels by time, waits and copies")
    parser.add_argument("--toy", action="store_true", help="a small model, on any device")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = TOY if arguments.toy else SHAPES
    names = [name for name in arguments.shapes.split(",") if name] or list(shapes)
    peers = arguments.peers.split(",")
    device = torch.device("cuda", RANKS.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda" and not arguments.toy:
        raise SystemExit("these sizes need a CUDA GPU; --toy runs small ones anywhere")
    if arguments.child is not None:
        init_process_group(RANKS, device, 600)
        result = measure(peers[0], shapes[names[0]], arguments.steps, device, arguments.overrides, arguments.profile)
        if not RANKS.rank:
            arguments.child.write_text(json.dumps(asdict(result)))
        close_process_group()
        return 0
    print(versions(device), flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            ranks = f"; {arguments.ranks} ranks, tokens/s and memory of one" if arguments.ranks > 1 else ""
            print(f"\n{name}: {shapes[name]}{ranks}", flush=True)
            found = {peer: alone(peer, name, arguments, folder) for peer in peers}
            failed |= None in found.values()
            table(shapes[name], {peer: result for peer, result in found.items() if result is not None})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
