"""The layer under expert parallelism on one GPU: this rank's work, with the other ranks left to a copy in memory.

    python tests/bench/bench_mirror_ranks.py [--ranks 2] [--shapes qwen3]
    python tests/bench/bench_mirror_ranks.py --toy     (anywhere; the numbers mean nothing)

Every rank is taken to route as this one does: it gets from every other what it keeps itself. Only time is measured: the
tokens that arrive are others than another rank would have sent. A shape's experts are
divided over the ranks. Backends take turns; medians over five loops of at least 0.3 s of forward and backward, lowest
and highest in brackets.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_moe_layer import BF16, Gate, leaf
from gpu_shapes import Shape, median_ms, pick, versions

from moe_train.moe import (
    ChildNames,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    RouterSpec,
    ScoreRouter,
    SlotPlan,
)
from moe_train.parallel import ParallelGroup, Topology, build_groups, collectives

BACKENDS = ("grouped", "fused")


class Mirrored(ParallelGroup):
    """Rank 0 of a group of ranks that are not there."""

    def __init__(self, ranks: int):
        self.ranks, self.rank_in_group, self.process_group = tuple(range(ranks)), 0, None


def copy_rows(received: torch.Tensor, sent: torch.Tensor, outputs=None, inputs=None, group: object = None) -> None:
    """In place of `all_to_all_single`: from everybody what this rank has for itself, cut or filled up with zeros."""
    own = sent[: inputs[0] if inputs else 1]
    for part in received.split(outputs or 1):
        part[: len(own)].copy_(own[: len(part)])
        part[len(own) :] = 0


def make(shape: Shape, backend: str, ranks: int, device: torch.device) -> ParallelMoELayer:
    torch.manual_seed(5)
    local = shape.E // ranks

    def draw(*sizes: int) -> torch.nn.Parameter:
        return leaf((torch.randn(*sizes, device=device) / sizes[-1] ** 0.5).to(BF16))

    groups = replace(build_groups(Topology(world=1, expert=1)), expert=Mirrored(ranks))
    return ParallelMoELayer(
        children={"gate": Gate(draw(shape.E, shape.H) * 2)},
        names=ChildNames(router="gate", experts="experts"),
        experts=ResidentExperts(draw(local, 2 * shape.I, shape.H), draw(local, shape.H, shape.I)),
        activation=F.silu,
        router=ScoreRouter(RouterSpec(num_experts=shape.E, top_k=shape.K, score="softmax", normalize=True)),
        plan=SlotPlan(shape.E, ranks),
        options=LayerOptions(backend=backend),
        groups=groups,
        context=MoEContext(1, shape.E, device),
        index=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", default="")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args()
    shapes, device = pick(arguments.toy)
    loops, seconds = (1, 0.0) if arguments.toy else (5, 0.3)
    print(f"{versions(device)}; a rank of EP {arguments.ranks}")
    for name in arguments.shapes.split(",") if arguments.shapes else shapes:
        shape = shapes[name]
        x = torch.randn(shape.T, shape.H, device=device).to(BF16).requires_grad_()
        dy = torch.randn_like(x)
        layers = {backend: make(shape, backend, arguments.ranks, device) for backend in BACKENDS}
        found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}

        def both(layer: ParallelMoELayer, x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            x.grad = None
            for parameter in (*layer.parameters(), *layer.expert_source.home):  # type: ignore[attr-defined]
                parameter.grad = None
            layer(x).backward(dy)

        with patch.object(collectives, "dist", SimpleNamespace(all_to_all_single=copy_rows)):
            for loop in range(loops + 1):
                for backend, layer in layers.items():
                    time = median_ms(lambda layer=layer: both(layer), device, 1, seconds if loop else 0.0)
                    found[backend] += [time] if loop else []
        for backend, times in found.items():
            print(f"{name}: {backend} {statistics.median(times):.2f} ms ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
