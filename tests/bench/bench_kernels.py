"""Every glue kernel: time, ratio to its torch reference, and share of the time that its bytes need at copy speed.

on the GPU: the same calls replayed as a CUDA graph, so without launching them one by one from Python.

python tests/bench/bench_kernels.py          (a CUDA GPU)
python tests/bench/bench_kernels.py --toy    (anywhere; the numbers mean nothing)
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import Shape, copy_bandwidth, device_ms, median_ms, pick, versions

from moe_train.kernels import AdamWRule, RouterRule
from moe_train.kernels.choose import runs_triton
from moe_train.kernels.fp8 import quantise_weight
from moe_train.kernels.grouped_gemm import is_hopper
from moe_train.kernels.reference import activation as reference_activation
from moe_train.kernels.reference import adamw as reference_adamw
from moe_train.kernels.reference import cross_entropy as reference_cross_entropy
from moe_train.kernels.reference import fp8_activation as reference_fp8_activation
from moe_train.kernels.reference import grouped_gemm as reference_grouped_gemm
from moe_train.kernels.reference import norm as reference_norm
from moe_train.kernels.reference import quantise as reference_quantise
from moe_train.kernels.reference import rotary as reference_rotary
from moe_train.kernels.reference import router as reference_router
from moe_train.kernels.reference import router_figures as reference_router_figures
from moe_train.kernels.reference import row_maps as reference_row_maps
from moe_train.kernels.reference import rows as reference_rows

Row = tuple[str, Callable[[], object], Callable[[], object], int]


def cases(shape: Shape, device: torch.device) -> Iterator[Row]:
    """Name, kernel, reference, bytes that must be read and written."""
    from moe_train.kernels.triton import (
        activation,
        adamw,
        cross_entropy,
        norm,
        rotary,
        router,
        router_figures,
        row_maps,
        rows,
    )

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
    pair = (router_figures, reference_router_figures)
    yield "router figures", *(lambda m=m: m.forward(logits, ids, "softmax") for m in pair), routed - chosen * 4
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
    sorted_rows = reference_rows.spread(x, place, chosen)
    moved = x.nbytes + sorted_rows.nbytes
    pair = (rows, reference_rows)
    yield "spread", *(lambda m=m: m.spread(x, place, chosen) for m in pair), moved
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


def gemm_cases(shape: Shape, device: torch.device) -> Iterator[Row]:
    """The six products of a layer beside torch's grouped GEMM, on Hopper: bound by arithmetic, not by bytes."""
    from moe_train.kernels.triton import grouped_gemm

    ids = torch.rand(shape.T, shape.E, device=device).topk(shape.K, dim=1).indices
    counts = reference_row_maps.row_maps(ids.reshape(-1), shape.E)[2]
    rows = shape.T * shape.K
    offsets, table = grouped_gemm.row_groups(counts, rows)
    x, h, a = (torch.randn(rows, w, device=device, dtype=torch.bfloat16) for w in (shape.H, 2 * shape.I, shape.I))
    gate_up = torch.randn(shape.E, 2 * shape.I, shape.H, device=device, dtype=x.dtype)
    down = torch.randn(shape.E, shape.H, shape.I, device=device, dtype=x.dtype)
    pair = (grouped_gemm, reference_grouped_gemm)
    products = {"h": (x, gate_up, False), "y": (a, down, False), "dA": (x, down, True), "dX": (h, gate_up, True)}
    for name, (left, weight, across) in products.items():
        groups = ((grouped_gemm, table), (reference_grouped_gemm, offsets))
        calls = (lambda m=m, g=g, i=left, w=weight, t=across: m.rows_by_weights(i, w, g, t) for m, g in groups)
        yield f"grouped GEMM, {name}", *calls, left.nbytes + weight.nbytes + rows * 2 * weight.shape[2 if across else 1]
    for name, left, right, weight in (("d down", x, a, down), ("d gate_up", h, x, gate_up)):
        calls = (lambda m=m, i=left, j=right: m.weight_gradient(i, j, offsets) for m in pair)
        yield f"grouped GEMM, {name}", *calls, left.nbytes + right.nbytes + weight.nbytes


def fp8_cases(shape: Shape, device: torch.device) -> Iterator[Row]:
    """The kernels that quantise. A weight's bytes are read twice: for its scales, and to divide by them."""
    from moe_train.kernels.triton import fp8_activation, quantise

    chosen = shape.T * shape.K
    ids = torch.rand(shape.T, shape.E, device=device).topk(shape.K, dim=1).indices
    order, place, counts = reference_row_maps.row_maps(ids.reshape(-1), shape.E)
    place = place.view(shape.T, shape.K)
    x = torch.randn(shape.T, shape.H, device=device, dtype=torch.bfloat16)
    pair, size = (quantise, reference_quantise), chosen * shape.H
    for what, plain, fp8 in (("fp8", False, True), ("bf16 and fp8", True, True), ("bf16", True, False)):
        calls = (lambda m=m, p=plain, f=fp8: m.spread(x, place, chosen, plain=p, fp8=f) for m in pair)
        yield f"token to rows, {what}", *calls, x.nbytes + size * (2 * plain + fp8)
    h = torch.randn(chosen, 2 * shape.I, device=device, dtype=torch.bfloat16)
    da = torch.randn(chosen, shape.I, device=device, dtype=torch.bfloat16)
    offsets, by_copy = counts.cumsum(0).to(torch.int32), torch.rand(chosen, device=device)
    glue = (fp8_activation, reference_fp8_activation)
    calls = (lambda m=m: m.forward(h, offsets, by_copy, order, "silu") for m in glue)
    yield "activation in fp8", *calls, h.nbytes + h.nbytes // 4
    calls = (lambda m=m: m.backward(da, h, offsets, by_copy, order, "silu") for m in glue)
    yield "activation in fp8, backward", *calls, 3 * h.nbytes + h.nbytes // 2
    weight = torch.randn(shape.E, 2 * shape.I, shape.H, device=device, dtype=torch.bfloat16)
    for name, across in (("along", False), ("across", True)):
        into = quantise_weight(weight, across)
        calls = (lambda m=m, n=name, i=into: getattr(m, n)(weight, i) for m in pair)
        yield f"gate_up in fp8, {name}", *calls, weight.nbytes * 5 // 2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true", help="small sizes, one call each, on any device")
    parser.add_argument("--shapes", default="", help="by name, separated by commas")
    parser.add_argument("--kernels", default="", help="whose name starts so, separated by commas")
    arguments = parser.parse_args()
    toy, names = arguments.toy, tuple(arguments.kernels.split(","))
    shapes, device = pick(toy)
    shapes = {name: shapes[name] for name in arguments.shapes.split(",")} if arguments.shapes else shapes
    if not runs_triton(device):
        raise SystemExit("Triton does not run here: on a CPU set TRITON_INTERPRET=1")
    loops, seconds = (1, 0.0) if toy else (5, 0.3)
    torch.manual_seed(0)
    speed = copy_bandwidth(device, 2**16 if toy else 2**32)
    print(f"{versions(device)}; copies run at {speed / 1e12:.2f} TB/s\n")
    print("| shape | kernel | ms | on the GPU, ms | torch reference, ms | ratio | at copy speed, ms | share of it |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in shapes.items():
        hopper = device.type == "cuda" and is_hopper(device.index or 0)
        gemms = gemm_cases(shape, device) if hopper else ()
        for kernel, ours, reference, size in chain(cases(shape, device), gemms, fp8_cases(shape, device)):
            if not kernel.startswith(names):
                continue
            fast, slow = (median_ms(call, device, loops, seconds) for call in (ours, reference))
            alone = device_ms(ours, device, loops, seconds)
            limit = size / speed * 1e3
            print(
                f"| {name} | {kernel} | {fast:.3f} | {alone:.3f} | {slow:.3f} | {slow / fast:.2f}x | {limit:.3f} "
                f"| {limit / alone:.0%} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
