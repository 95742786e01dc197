"""Every glue kernel: time, ratio to its torch reference, and share of the time that its bytes need at copy speed.

python tests/bench/bench_kernels.py          (a CUDA GPU)
python tests/bench/bench_kernels.py --toy    (anywhere; the numbers mean nothing)
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import Shape, copy_bandwidth, median_ms, pick, versions

from moe_train.kernels import AdamWRule, RouterRule
from moe_train.kernels.choose import runs_triton
from moe_train.kernels.reference import activation as reference_activation
from moe_train.kernels.reference import adamw as reference_adamw
from moe_train.kernels.reference import cross_entropy as reference_cross_entropy
from moe_train.kernels.reference import norm as reference_norm
from moe_train.kernels.reference import rotary as reference_rotary
from moe_train.kernels.reference import router as reference_router
from moe_train.kernels.reference import row_maps as reference_row_maps
from moe_train.kernels.reference import rows as reference_rows

Row = tuple[str, Callable[[], object], Callable[[], object], int]


def cases(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Name, kernel, reference, bytes that must be read and written."""
    from moe_train.kernels.triton import activation, adamw, cross_entropy, norm, rotary, router, row_maps, rows

    rule = RouterRule(score="softmax", top_k=shape.K, normalize=True)
    logits = torch.randn(shape.T, shape.E, device=device)
    forward = (logits, None, None, None, 1, rule)
    ids, weights, _, sums, z = reference_router.forward(*forward)
    chosen = shape.T * shape.K
    routed = logits.nbytes + chosen * 12
    yield "router", lambda: router.forward(*forward), lambda: reference_router.forward(*forward), routed
    backward = (logits, ids, None, weights, sums, z, rule)
    yield (
        "router, backward",
        lambda: router.backward(*backward),
        lambda: reference_router.backward(*backward),
        routed + logits.nbytes,
    )
    flat = ids.reshape(-1)
    order, place, counts = reference_row_maps.row_maps(flat, shape.E)
    yield (
        "row maps",
        lambda: row_maps.row_maps(flat, shape.E),
        lambda: reference_row_maps.row_maps(flat, shape.E),
        chosen * 24,
    )
    x = torch.randn(shape.T, shape.H, device=device, dtype=torch.bfloat16)
    place = place.view(shape.T, shape.K)
    sorted_rows = reference_rows.gather(x, order, shape.K)
    moved = x.nbytes + sorted_rows.nbytes
    pair = (rows, reference_rows)
    yield "gather", *(lambda m=m: m.gather(x, order, shape.K) for m in pair), moved
    yield "gather-sum", *(lambda m=m: m.gather_sum(sorted_rows, place, None) for m in pair), moved
    yield "weighted sum", *(lambda m=m: m.gather_sum(sorted_rows, place, weights) for m in pair), moved
    yield (
        "weighted sum, backward",
        *(lambda m=m: m.weighted_sum_backward(x, sorted_rows, place, weights) for m in pair),
        moved + sorted_rows.nbytes,
    )
    h = torch.randn(chosen, 2 * shape.I, device=device, dtype=torch.bfloat16)
    offsets, by_copy = counts.cumsum(0).to(torch.int32), weights.reshape(-1)
    glue = (activation, reference_activation)
    yield (
        "activation",
        *(lambda m=m: m.forward(h, offsets, by_copy, order, "silu") for m in glue),
        h.nbytes + h.nbytes // 2,
    )
    da = torch.randn(chosen, shape.I, device=device, dtype=torch.bfloat16)
    yield (
        "activation, backward",
        *(lambda m=m: m.backward(da, h, offsets, by_copy, order, "silu") for m in glue),
        3 * h.nbytes,
    )
    heads = torch.randn(shape.T * 32, 128, device=device, dtype=x.dtype)
    pair = (norm, reference_norm)
    for name, values in (("norm", x), ("norm of heads", heads)):
        weight = torch.ones(values.shape[1], device=device, dtype=x.dtype)
        scale = norm.forward(values, weight, 1e-6)[1]
        yield name, *(lambda m=m, x=values, w=weight: m.forward(x, w, 1e-6) for m in pair), 2 * values.nbytes
        yield (
            f"{name}, backward",
            *(lambda m=m, x=values, w=weight, s=scale: m.backward(x, x, w, s) for m in pair),
            3 * values.nbytes,
        )
    turned, angles = heads.view(1, shape.T, 32, 128), torch.randn(shape.T, 128, device=device, dtype=x.dtype)
    yield (
        "rotary",
        *(lambda m=m: m.forward(turned, angles, angles) for m in (rotary, reference_rotary)),
        2 * (turned.nbytes + angles.nbytes),
    )
    flat = [torch.zeros(x.numel(), device=device) for _ in range(3)]
    gradient, used = torch.randn_like(x).view(-1), torch.empty_like(x).view(-1)
    ones, update = torch.ones(2, device=device), AdamWRule(lr=1e-3, beta_1=0.9, beta_2=0.95, eps=1e-8, weight_decay=0.1)
    yield (
        "AdamW",
        *(lambda m=m: m.step_(*flat, gradient, ones[:1], ones, used, update) for m in (adamw, reference_adamw)),
        x.numel() * 28,
    )
    logits = torch.randn(min(shape.T, 4096), 16 * shape.H, device=device, dtype=x.dtype)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=device)
    yield (
        "cross-entropy",
        *(lambda m=m: m.cross_entropy_(logits, labels, True) for m in (cross_entropy, reference_cross_entropy)),
        2 * logits.nbytes,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true", help="small sizes, one call each, on any device")
    toy = parser.parse_args().toy
    shapes, device = pick(toy)
    if not runs_triton(device):
        raise SystemExit("Triton does not run here: on a CPU set TRITON_INTERPRET=1")
    loops, seconds = (1, 0.0) if toy else (5, 0.3)
    torch.manual_seed(0)
    speed = copy_bandwidth(device, 2**16 if toy else 2**32)
    print(f"{versions(device)}; copies run at {speed / 1e12:.2f} TB/s\n")
    print("| shape | kernel | ms | torch reference, ms | ratio | at copy speed, ms | share of it |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in shapes.items():
        for kernel, ours, reference, size in cases(shape, device):
            fast, slow = (median_ms(call, device, loops, seconds) for call in (ours, reference))
            limit = size / speed * 1e3
            print(
                f"| {name} | {kernel} | {fast:.3f} | {slow:.3f} | {slow / fast:.2f}x | {limit:.3f} "
                f"| {limit / fast:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
