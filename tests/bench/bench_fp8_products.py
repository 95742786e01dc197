"""torch's grouped GEMM in FP8 against bf16, by what is summed over (K) and how many columns come out (N), on one GPU.

    python tests/bench/bench_fp8_products.py [--experts 64] [--rows 1024]
    python tests/bench/bench_fp8_products.py --toy     (anywhere; the numbers mean nothing)

Equal loads. `moe.fp8` says from it which products run in FP8; quantising comes on top.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import median_ms, pick, versions

from moe_train.kernels.fp8 import grouped_product
from moe_train.kernels.grouped_gemm import row_groups
from moe_train.kernels.reference.quantise import rounded

SIZES = (256, 512, 768, 1024, 2048)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1024, help="of each expert")
    parser.add_argument("--toy", action="store_true", help="small sizes, one call each, on any device")
    arguments = parser.parse_args()
    toy = arguments.toy
    _, device = pick(toy)
    sizes, loops, seconds = ((16, 32), 1, 0.0) if toy else (SIZES, 3, 0.04)
    experts, rows = (3, 8) if toy else (arguments.experts, arguments.rows)
    groups = row_groups(torch.full((experts,), rows, device=device), experts * rows)
    print(f"{versions(device)}; {experts} experts, {rows} rows each: gain of FP8 (TFLOP/s in FP8)\n")
    print("| K \\ N | " + " | ".join(map(str, sizes)) + " |\n|---|" + "---|" * len(sizes))
    for k in sizes:
        a = torch.randn(experts * rows, k, device=device)
        cells = []
        for n in sizes:
            b = torch.randn(experts, n, k, device=device)
            operands = (rounded(a), rounded(b))
            plain = (a.bfloat16(), b.bfloat16().transpose(1, 2))
            fast = median_ms(lambda o=operands: grouped_product(*o, groups), device, loops, seconds)
            slow = median_ms(lambda o=plain: F.grouped_mm(*o, offs=groups.offsets_L), device, loops, seconds)
            cells.append(f"{slow / fast:.2f} ({2 * experts * rows * k * n / fast * 1e-9:.0f})")
        print(f"| {k} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
