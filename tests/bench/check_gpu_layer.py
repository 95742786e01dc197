"""The layer on one GPU in bf16 against float32 loops over experts, on random sizes; and twice, to the bit.

    python tests/bench/check_gpu_layer.py
    python tests/bench/check_gpu_layer.py --toy     (the smallest size, anywhere)

Prints a row per size and backend (relative L2 error of the output and of every gradient) and exits 1 beyond 1e-2.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import pick, versions

from moe_train.moe import (
    ChildNames,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    RouterSpec,
    ScoreRouter,
    SlotPlan,
    router_logits,
)
from moe_train.parallel import Topology, build_groups

SIZES = [  # tokens, hidden, intermediate, experts, top-k
    (7, 64, 64, 4, 2),
    (127, 256, 128, 8, 2),
    (1000, 512, 256, 64, 8),
    (4096, 1024, 512, 60, 4),
    (8192, 2048, 768, 128, 8),
]
LIMIT = 1e-2


class Router(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return router_logits(x, self.weight)


def layer_pass(backend, x, dy, router, gate_up, down, top_k):
    experts = router.shape[0]
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
    layer = ParallelMoELayer(
        children={"gate": Router(router.clone())},
        names=ChildNames(router="gate", experts="experts"),
        experts=ResidentExperts(leaves[1], leaves[2]),
        activation=F.silu,
        router=ScoreRouter(RouterSpec(num_experts=experts, top_k=top_k, score="softmax", normalize=True)),
        plan=SlotPlan(experts, 1),
        options=LayerOptions(backend=backend),
        groups=build_groups(Topology(world=1, expert=1)),
        context=MoEContext(1, experts, x.device),
        index=0,
    )
    y = layer(leaves[0])
    y.backward(dy)
    weight = layer.get_submodule("gate").weight
    return [y.detach(), *[t.grad for t in leaves], weight.grad]


def reference_pass(x, dy, router, gate_up, down, top_k):
    leaves = [t.float().requires_grad_() for t in (x, gate_up, down, router)]
    x, gate_up, down, router = leaves
    weights, ids = (x @ router.t()).softmax(-1).topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(router.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, -1)
        y = y.index_add(0, token, (F.silu(gate) * up) @ down[e].t() * weights[token, slot, None])
    y.backward(dy.float())
    return [y.detach(), *[t.grad for t in leaves]]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    torch.backends.cuda.matmul.allow_tf32 = False
    device = pick(toy)[1]
    worst = 0.0
    print(versions(device))
    columns = "".join(f"{name:>10}" for name in ("y", "dx", "dgate_up", "ddown", "drouter"))
    print(f"{'T, H, I, E, k, backend':<36}{columns}  same bits twice")
    for tokens, hidden, inner, experts, top_k in SIZES[: 1 if toy else None]:
        torch.manual_seed(tokens)

        def draw(*shape):
            return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).bfloat16()

        router, gate_up, down = (
            draw(experts, hidden) * 2,
            draw(experts, 2 * inner, hidden),
            draw(experts, hidden, inner),
        )
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        dy = torch.randn(tokens, hidden, device=device).bfloat16()
        reference = reference_pass(x, dy, router, gate_up, down, top_k)
        for backend in ("grouped", "fused"):
            ours = layer_pass(backend, x, dy, router, gate_up, down, top_k)
            again = layer_pass(backend, x, dy, router, gate_up, down, top_k)
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, reference, strict=True)]
            same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
            worst = max(worst, *(e if e == e else 1.0 for e in errors), 0.0 if same else 1.0)
            row = f"{tokens}, {hidden}, {inner}, {experts}, {top_k}, {backend}"
            print(f"{row:<36}" + "".join(f"{error:>10.1e}" for error in errors) + f"  {same}")
    print("ok" if worst <= LIMIT else f"FAILED: beyond {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
