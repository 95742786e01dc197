"""Compile every Triton kernel for sm_90 without a GPU: a line per variant with registers per thread and spilled bytes.

    python tests/bench/compile_kernels.py

The operators are called on CPU tensors of real widths; in place of a launch each kernel is compiled for the arguments.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.kernels import AdamWRule, RouterRule
from moe_train.kernels.fp8 import empty_fp8_rows
from moe_train.kernels.triton import (
    activation,
    adamw,
    cross_entropy,
    fp8_activation,
    grouped_gemm,
    norm,
    quantise,
    rotary,
    router,
    router_figures,
    row_maps,
    rows,
)

TARGET = GPUTarget("cuda", 90, 32)
ONE = RouterRule(score="softmax", top_k=1, normalize=True)
ONES = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(()))
"""Gradients for one token and one expert."""


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of `JITFunction.run`."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    fixed = {p.name for p in self.params if p.is_constexpr}
    fixed |= {name for name, v in values.items() if v is None or (type(v) is int and v == 1)}  # as a launch does
    signature = {name: "constexpr" if name in fixed else mangle_type(v) for name, v in values.items()}
    # as a launch sees tensors, whose memory begins at multiples of 16 bytes, and sizes that are such
    aligned = {n for n, v in values.items() if isinstance(v, torch.Tensor) or (type(v) is int and v % 16 == 0)} - fixed
    attributes = {(self.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(self, signature, {name: values[name] for name in fixed}, attributes)
    kernel = triton.compile(source, target=TARGET, options=options)
    registers, spilled = usage(kernel.asm["ptx"])
    print(f"{self.__module__.rpartition('.')[2]}.{self.__name__} {registers} {spilled}", flush=True)


def usage(ptx: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler reports them."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers, report
    assert spilled, report
    return int(registers[1]), int(spilled[1])


def main() -> None:
    JITFunction.run = compile_only  # type: ignore[method-assign]
    rules = {
        128: RouterRule(score="softmax", top_k=8, normalize=True),
        256: RouterRule(score="sigmoid", top_k=8, normalize=True, scale=2.5, num_groups=8, topk_groups=4),
        1024: RouterRule(score="sqrtsoftplus", top_k=32, normalize=True),
        60: RouterRule(score="softmax_after_topk", top_k=4),
    }
    for experts, rule in rules.items():
        logits, bias = torch.zeros(512, experts), torch.zeros(experts)
        valid = torch.ones(512, dtype=torch.bool) if experts == 60 else None
        ids, weights, _, sums, z = router.forward(logits, bias, None, valid, 2, rule)
        router.backward(logits, ids, valid, weights, sums, z, rule)
        router_figures.forward(logits, ids, rule.score)
    router.forward(torch.zeros(512, 128), None, torch.zeros(512, 8, dtype=torch.int64), None, 1, rules[128])
    one = torch.zeros(1, 1, dtype=torch.int64)
    router.backward(
        torch.zeros(1, 1), *router.forward(torch.zeros(1, 1), None, None, None, 1, ONE)[:1], None, *ONES, ONE
    )
    row_maps.row_maps(one.view(1), 1)
    rows.gather_sum(rows.spread(torch.zeros(1, 64), one, 1), one, None)
    activation.forward(torch.zeros(1, 16), torch.zeros(1, dtype=torch.int32), torch.zeros(1), one.view(1), "silu")
    order, place, _ = row_maps.row_maps(torch.zeros(64, dtype=torch.int64), 128)
    for dtype in (torch.bfloat16, torch.float32):
        x, weights, placed = torch.zeros(32, 2048, dtype=dtype), torch.zeros(32, 2), place.view(32, 2)
        spread = rows.spread(x, placed, 64)
        rows.gather_sum(spread, placed, None)
        rows.gather_sum(spread, placed, weights)
        rows.weighted_sum_backward(x, spread, placed, weights)
    h, offsets = torch.zeros(64, 1536, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    for name in activation.KINDS:
        out = activation.forward(h, offsets, torch.zeros(64), order, name)
        activation.backward(out, h, offsets, torch.zeros(64), order, name)
    compile_fp8()
    with patch.object(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)):
        compile_gemms()
        with patch.object(grouped_gemm, "LARGE", 0):  # tiles in groups of rows
            compile_gemms()
        with patch("moe_train.kernels.grouped_gemm.begin_at_lines", lambda dtype, device: True):
            compile_gaps()
    compile_dense()


def compile_fp8() -> None:
    place, order, offsets = torch.zeros(8, 2, dtype=torch.int64), torch.zeros(16, dtype=torch.int64), torch.zeros(8)
    for hidden in (2048, 7168, 20000):
        x = torch.zeros(8, hidden, dtype=torch.bfloat16)
        quantise.spread(x, place, 16, plain=True, fp8=True)
        quantise.spread(x, place, 16, plain=True, fp8=False)
        quantise.spread(x[:, : hidden // 2], place, 16, plain=True, fp8=False)
        quantise.spread(x, place, 16, plain=False, fp8=True)
    for inner in (16, 768, 2048, 14336, 20480):
        h, out = (torch.zeros(16, width, dtype=torch.bfloat16) for width in (2 * inner, inner))
        fp8_activation.forward(h, offsets.int(), torch.zeros(16), order, "silu")
        fp8_activation.backward(out, h, offsets.int(), torch.zeros(16), order, "silu")
    quantise.across(torch.zeros(2, 64, 128, dtype=torch.bfloat16), empty_fp8_rows((2, 128, 64), torch.device("cpu")))


def compile_gemms() -> None:
    offsets, table = grouped_gemm.row_groups(torch.zeros(4, dtype=torch.int64), 64)
    for inner, size in ((2048, 1536), (72, 40)):
        x, weight = torch.zeros(64, inner).bfloat16(), torch.zeros(4, size, inner).bfloat16()
        grouped_gemm.rows_by_weights(x, weight, table, False)
        grouped_gemm.rows_by_weights(x, weight.view(4, inner, size), table, True)
        for tile in (grouped_gemm.Tile(), grouped_gemm.SMALL):
            grouped_gemm.weight_gradient(x, torch.zeros(64, size).bfloat16(), offsets, tile=tile)
    wide = torch.zeros(4, 72, 1024).bfloat16()
    grouped_gemm.weight_gradient(x, torch.zeros(64, 512).bfloat16(), offsets, wide[:, :, 512:])
    one = grouped_gemm.row_groups(torch.zeros(1, dtype=torch.int64), 64)[1]
    grouped_gemm.rows_by_weights(x, torch.zeros(1, 40, 72).bfloat16(), one, False)
    grouped_gemm.weight_gradient(x, x, offsets[:1])
    a, b = empty_fp8_rows((64, 2048), torch.device("cpu")), empty_fp8_rows((4, 1536, 2048), torch.device("cpu"))
    grouped_gemm.rows_by_weights(a.values, b.values, table, False, (a.scales, b.scales))


def compile_gaps() -> None:
    """Rows of 1000, 720 and 360 columns, that begin at multiples of 128 bytes."""
    x, place = torch.zeros(32, 1000).bfloat16(), torch.zeros(32, 2, dtype=torch.int64)
    spread, order, weights = (
        rows.spread(x, place, 64, aligned=True),
        torch.zeros(64, dtype=torch.int64),
        torch.zeros(64),
    )
    quantise.spread(x, place, 64, plain=True, fp8=True, aligned=True)
    rows.gather_sum(spread, place, None)
    offsets, table = grouped_gemm.row_groups(torch.zeros(4, dtype=torch.int64), 64)
    gate_up, down = torch.zeros(4, 720, 1000).bfloat16(), torch.zeros(4, 1000, 360).bfloat16()
    h = grouped_gemm.rows_by_weights(spread, gate_up, table, False)
    for kind in (activation, fp8_activation):
        kind.forward(h, offsets, weights, order, "silu")
        dout = grouped_gemm.rows_by_weights(spread, down, table, True)
        dh = kind.backward(dout, h, offsets, weights, order, "silu", in_place=True)[0]
    grouped_gemm.rows_by_weights(dh, gate_up, table, True)
    grouped_gemm.weight_gradient(spread, dout, offsets)
    grouped_gemm.weight_gradient(dh, spread, offsets)


def compile_dense() -> None:
    for width in (1, 128, 2048, 8192):
        x, weight = torch.zeros(64, width, dtype=torch.bfloat16), torch.zeros(width, dtype=torch.bfloat16)
        norm.backward(x, x, weight, norm.forward(x, weight, 1e-6)[1])
    for width in (2, 64, 128):
        heads, angles = torch.zeros(1, 4, 3, width, dtype=torch.bfloat16), torch.zeros(4, width, dtype=torch.bfloat16)
        rotary.backward(rotary.forward(heads, angles, angles), angles, angles)
    rule = AdamWRule(lr=1e-3, beta_1=0.9, beta_2=0.95, eps=1e-8, weight_decay=0.1)
    flat, one, two = torch.zeros(4096), torch.zeros(1), torch.zeros(2)
    adamw.step_(flat, flat, flat, flat.bfloat16(), one, two, flat.bfloat16(), rule)
    adamw.step_(flat, flat, flat, flat, one, two, None, rule)
    for vocabulary in (1, 257, 151936):
        logits, labels = torch.zeros(4, vocabulary, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
        cross_entropy.cross_entropy_(logits, labels, True)
        cross_entropy.cross_entropy_(logits, labels, False)


if __name__ == "__main__":
    main()
