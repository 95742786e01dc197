"""Every kernel on a GPU at real sizes against float64 or float32 references; outputs start as NaN; the same bits twice.

    python tests/bench/check_gpu_kernels.py          (a CUDA GPU with 100 GiB free)
    python tests/bench/check_gpu_kernels.py --toy    (anywhere)

A line per check; exits 1 if one fails. The last check moves rows whose offsets pass 2^31 elements.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import Shape, pick, versions

from moe_train.kernels import (
    Fp8Gemms,
    RouterRule,
    RowMaps,
    fp8_local_experts,
    local_experts,
    quantise_weights,
    route,
    router_figures,
    row_maps,
    runs_triton,
)
from moe_train.kernels.choose import implementation
from moe_train.kernels.fp8 import Fp8Rows, grouped_product, quantise_weight
from moe_train.kernels.grouped_gemm import RowGroups, row_groups, rows_by_weights, weight_gradient
from moe_train.kernels.reference import activation as reference_activation
from moe_train.kernels.reference import fp8_activation as reference_fp8_activation
from moe_train.kernels.reference import quantise as reference_quantise
from moe_train.kernels.reference import router as reference_router
from moe_train.kernels.reference import router_figures as reference_router_figures
from moe_train.kernels.reference import row_maps as reference_row_maps

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float8_e4m3fn: 0.15}
"""Largest relative L2 error."""
RULES = [
    (128, RouterRule(score="softmax", top_k=8, normalize=True)),
    (256, RouterRule(score="sigmoid", top_k=8, normalize=True, eps=1e-20, scale=2.5, num_groups=8, topk_groups=4)),
    (160, RouterRule(score="softmax", top_k=6, num_groups=8, topk_groups=3, best_two=False, scale=16.0)),
    (1024, RouterRule(score="sqrtsoftplus", top_k=32, normalize=True, scale=1.5)),
    (60, RouterRule(score="softmax_after_topk", top_k=4)),
    (7, RouterRule(score="softmax", top_k=7)),
]

Check = tuple[str, Callable[[], dict[str, float]]]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinite where the kernel left NaN."""
    found = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def twice(call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    first, second = call(), call()
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"output {number} differs between two runs of the same call"
    return first


def check_router(tokens: int, experts: int, rule: RouterRule, device: torch.device) -> dict[str, float]:
    sequences = 3 if tokens % 3 == 0 else 1
    logits = torch.randn(tokens, experts, device=device) * 2
    logits[: tokens // 8] = logits[: tokens // 8].round()  # ties
    bias = torch.randn(experts, device=device) * 0.01 if rule.score == "sigmoid" else None
    valid = torch.rand(tokens, device=device) > 0.1
    directions = [torch.randn(shape, device=device) for shape in ((tokens, rule.top_k), (sequences, experts))]

    def call() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        out = route(leaf, rule, bias_E=bias, valid_T=valid, num_sequences=sequences)
        outputs = [out.weights_TK, out.share_sums_SE, out.z_sum]
        torch.autograd.backward(outputs, [*directions, torch.full_like(out.z_sum, 1e-3)])
        assert leaf.grad is not None
        figures = router_figures(logits, out.ids_TK, rule.score)
        return [out.ids_TK, out.counts_SE, *(o.detach() for o in outputs), leaf.grad, figures]

    ids, counts, *values = twice(call)
    # the choice is the kernel's own: a rounding of a score may order near ties the other way
    wide = logits.double()
    expected = reference_router.forward(wide, None, ids.clamp(min=0), valid, sequences, rule)
    assert torch.equal(counts, expected[2]), "counts are not those of the ids"
    chosen = reference_router.forward(logits, bias, None, valid, sequences, rule)[0]
    agree = float((chosen == ids).all(dim=1).double().mean()) if tokens else 1.0
    assert agree > 0.999, f"{1 - agree:.2%} of the tokens are routed otherwise than by the reference"
    z_direction = wide.new_full((), 1e-3)
    gradient = reference_router.backward(wide, ids, valid, directions[0], directions[1], z_direction, rule)
    figures = reference_router_figures.forward(wide, ids, rule.score)
    wanted = [expected[1], expected[3], expected[4], gradient, figures]
    names = ("weights", "sums", "z", "gradient", "figures")
    return {n: error(a, b) if tokens else 0.0 for n, a, b in zip(names, values, wanted, strict=True)}


def check_row_maps(copies: int, size: int, device: torch.device) -> dict[str, float]:
    goals = torch.randint(-1, size, (copies,), device=device)
    goals[: copies // 3] = 0
    maps = twice(lambda: list(vars(row_maps(goals, size)).values()))
    for found, wanted in zip(maps, reference_row_maps.row_maps(goals, size), strict=True):
        assert torch.equal(found, wanted), "not the stable sort's maps"
    return {}


def check_activation(rows: int, inner: int, name: str, device: torch.device) -> dict[str, float]:
    glue = implementation("activation", device)
    h = torch.randn(rows, 2 * inner, device=device).bfloat16() * 3
    dout = torch.randn(rows, inner, device=device).bfloat16()
    weights, order = torch.rand(rows, device=device), torch.randperm(rows, device=device)
    offsets = torch.tensor([rows // 2, rows], dtype=torch.int32, device=device)
    found = twice(
        lambda: [
            glue.forward(h, offsets, weights, order, name),
            *glue.backward(dout, h, offsets, weights, order, name),
        ]
    )
    expected = [
        reference_activation.forward(h.double(), offsets, weights, order, name),
        *reference_activation.backward(dout.double(), h.double(), offsets, weights.double(), order, name),
    ]
    names = ("output", "dh", "output again", "d weights")
    return {n: error(a, b) for n, a, b in zip(names, found, expected, strict=True)}


def draw_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, weights, gate_up, down; ids of which a third go to one expert and none to the last."""
    leaves = [torch.randn(shape.T, shape.H, device=device), torch.rand(shape.T, shape.K, device=device)]
    leaves.append(torch.randn(shape.E, 2 * shape.I, shape.H, device=device) / shape.H**0.5)
    leaves.append(torch.randn(shape.E, shape.H, shape.I, device=device) / shape.I**0.5)
    scores = torch.rand(shape.T, max(shape.E - 1, shape.K), device=device)
    scores[: shape.T // 3, 0] += 1
    ids = scores.topk(shape.K, dim=1).indices
    kinds = (dtype, torch.float32, dtype, dtype)
    return [leaf.to(kind).requires_grad_() for leaf, kind in zip(leaves, kinds, strict=True)], ids


def check_experts(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    leaves, ids = draw_layer(shape, dtype, device)
    dy = torch.randn(shape.T, shape.H, device=device).to(dtype)

    def call() -> list[torch.Tensor]:
        x, weights, gate_up, down = leaves
        y = local_experts(x, weights, row_maps(ids.reshape(-1), shape.E), gate_up, down, "silu")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    found = twice(call)
    expected = loops(leaves, ids, dy)
    names = ("y", "dx", "d weights", "d gate_up", "d down")
    return {n: error(a, b) for n, a, b in zip(names, found, expected, strict=True)}


def loops(leaves: list[torch.Tensor], ids: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and gradients of (x, weights, gate_up, down), expert by expert in float32."""
    x, weights = (leaf.detach().float() for leaf in leaves[:2])
    y, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    dgate_up, ddown = (torch.empty_like(leaf) for leaf in leaves[2:])
    for e in range(len(leaves[2])):
        token, copy = torch.where(ids == e)
        parts = [x[token], weights[token, copy], leaves[2][e].detach().float(), leaves[3][e].detach().float()]
        part = [p.requires_grad_() for p in parts]
        gate, up = F.linear(part[0], part[2]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, part[3]) * part[1].unsqueeze(1)
        grads = torch.autograd.grad(out, part, dy[token].float())
        y.index_add_(0, token, out.detach())
        dx.index_add_(0, token, grads[0])
        dweights[token, copy] = grads[1]
        dgate_up[e], ddown[e] = grads[2], grads[3]
    return [y, dx, dweights, dgate_up, ddown]


def shares(ids: torch.Tensor, experts: int) -> Iterator[tuple[slice, RowMaps]]:
    """As two ranks have them: half of the experts, and maps of their copies that end where their rows do."""
    for part in (slice(0, experts // 2), slice(experts // 2, experts)):
        mine = (ids >= part.start) & (ids < part.stop)
        maps = row_maps(torch.where(mine, ids - part.start, -1).reshape(-1), part.stop - part.start)
        yield part, replace(maps, order_R=maps.order_R[: int(mine.sum())])


def check_share(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Tokens of which a part of the copies is for the experts of another rank; and the sum of both ranks."""
    leaves, ids = draw_layer(shape, dtype, device)
    x, weights, gate_up, down = leaves
    dy = torch.randn(shape.T, shape.H, device=device).to(dtype)

    def call() -> list[torch.Tensor]:
        y = torch.zeros_like(x, dtype=torch.float32)
        for part, maps in shares(ids, shape.E):
            y = y + local_experts(x, weights, maps, gate_up[part], down[part], "silu")
        y = y.to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    found, wanted = twice(call), loops(leaves, ids, dy)
    names = ("y", "dx", "d weights", "d gate_up", "d down")
    return {n: error(a, b) for n, a, b in zip(names, found, wanted, strict=True)}


def check_long_rows(toy: bool, device: torch.device) -> dict[str, float]:
    """More than 2^31 elements: the last rows are compared with indexing."""
    tokens, copies, hidden = (64, 4, 96) if toy else (49152, 8, 7168)
    if not toy:
        assert tokens * copies * hidden > 2**31
    rows = implementation("rows", device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    maps = row_maps(torch.randint(0, 8, (tokens * copies,), device=device), 8)
    place = maps.place_R.view(tokens, copies)
    spread = rows.spread(x, place, tokens * copies)
    last = slice(tokens * copies - 4096, None)
    assert torch.equal(spread[last], x[maps.order_R[last] // copies]), "the last rows are others"
    tail = slice(max(tokens - 2048, 0), None)
    total = rows.gather_sum(spread, place, None)
    weights = torch.rand(tokens, copies, device=device)
    drows, dweights = rows.weighted_sum_backward(x, spread, place, weights)
    wide = x[tail].float()
    by_copy = drows[place[tail].reshape(-1)].view(-1, copies, hidden)
    found = {
        "sum": error(total[tail], wide * copies),
        "d rows": error(by_copy, wide.unsqueeze(1) * weights[tail].unsqueeze(-1)),
        "d weights": error(dweights[tail], wide.square().sum(-1, keepdim=True).expand(-1, copies)),
    }
    del drows, by_copy, total, spread
    inner = 64 if toy else 4096
    height = 512 if toy else 2**31 // (2 * inner) + 4096
    h = torch.randn(height, 2 * inner, dtype=torch.bfloat16, device=device)
    glue, end = implementation("activation", device), slice(height - 256, None)
    offsets, order = torch.tensor([height], dtype=torch.int32, device=device), torch.arange(height, device=device)
    ones = torch.ones(height, device=device)
    out = glue.forward(h, offsets, ones, order, "silu")
    dh, again, _ = glue.backward(out, h, offsets, ones, order, "silu")
    assert torch.equal(out[end], again[end])
    few, first = torch.tensor([256], dtype=torch.int32, device=device), order[:256]
    wanted = reference_activation.backward(out[end].double(), h[end].double(), few, ones[:256].double(), first, "silu")
    return found | {"activation": error(out[end], wanted[1]), "dh": error(dh[end], wanted[0])}


def dequantised(rows: Fp8Rows) -> torch.Tensor:
    return rows.values.float() * rows.scales.unsqueeze(-1)


def same_bits(found: Fp8Rows, expected: Fp8Rows) -> None:
    assert torch.equal(found.scales, expected.scales), "other scales"
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8)), "other e4m3 numbers"


def check_quantise(tokens: int, hidden: int, copies: int, device: torch.device) -> dict[str, float]:
    kernel = implementation("quantise", device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    x[::3] *= 1e-3
    x[::7] = 0
    place = row_maps(torch.randint(0, 8, (tokens * copies,), device=device), 8).place_R.view(tokens, copies)
    to = (x, place, tokens * copies)
    rows, *parts = twice(lambda: [(both := kernel.spread(*to, plain=True, fp8=True))[0], *map(as_bytes, both[1])])
    expected_rows, expected = reference_quantise.spread(*to, plain=True, fp8=True)
    assert torch.equal(rows, expected_rows), "rows that are not those of the tokens"
    same_bits(Fp8Rows(parts[0].view(torch.float8_e4m3fn), parts[1].view(torch.float32)), expected)
    if not tokens:
        return {}
    x[0, 0], x[1, 1] = float("inf"), float("nan")
    _, broken = kernel.spread(x, torch.arange(tokens, device=device).unsqueeze(1), tokens, plain=False, fp8=True)
    assert not torch.isfinite(broken.scales[:2]).any(), "an infinity or NaN was turned into a number"
    assert torch.isfinite(broken.scales[2:]).all()
    return {}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def check_weights(shape: Shape, device: torch.device) -> dict[str, float]:
    weight = torch.randn(shape.E, 2 * shape.I, shape.H, device=device).bfloat16()
    found = {}
    for across in (False, True):
        quantised = quantise_weight(weight, across)
        expected = reference_quantise.rounded(weight.transpose(1, 2) if across else weight)
        same_bits(quantised, expected)
        found["across" if across else "along"] = error(dequantised(quantised)[0], dequantised(expected)[0])
    return found


def check_fp8_activation(rows: int, inner: int, name: str, device: torch.device) -> dict[str, float]:
    glue = implementation("fp8_activation", device)
    h = torch.randn(rows, 2 * inner, device=device).bfloat16() * 3
    dout = torch.randn(rows, inner, device=device).bfloat16()
    weights, order = torch.rand(rows, device=device), torch.randperm(rows, device=device)
    offsets = torch.tensor([rows // 2, rows], dtype=torch.int32, device=device)
    forward, backward = (h, offsets, weights, order, name), (dout, h, offsets, weights, order, name)
    twice(lambda: [*map(as_bytes, glue.forward(*forward))])
    dh, quantised, again, dweights = glue.backward(*backward)
    wanted_dh, wanted, wanted_again, wanted_dweights = reference_fp8_activation.backward(*backward)
    pairs = {
        "output": (dequantised(glue.forward(*forward)), dequantised(reference_fp8_activation.forward(*forward))),
        "dh": (dh, wanted_dh),
        "dh in fp8": (dequantised(quantised), dequantised(wanted)),
        "output again": (again, wanted_again),
        "d weights": (dweights, wanted_dweights),
    }
    return {what: error(*pair) for what, pair in pairs.items()}


def check_gemms(rows: int, columns: int, size: int, experts: int, device: torch.device) -> dict[str, float]:
    """The three products against float32, NaN behind the last expert; the first one and every third have no rows."""
    cuts = torch.randint(0, rows - rows // 9, (experts - 1,)).sort().values.tolist()
    ends = [0, *cuts]
    ends[2::3] = ends[1::3][: len(ends[2::3])]
    groups = groups_of(ends, rows, device)
    x, y = (torch.randn(rows, width, device=device).bfloat16() for width in (columns, size))
    x[ends[-1] :], y[ends[-1] :] = float("nan"), float("nan")
    weight = (torch.randn(experts, size, columns, device=device) / columns**0.5).bfloat16()
    turned = weight.transpose(1, 2).contiguous()

    def call() -> list[torch.Tensor]:
        both = rows_by_weights(x, weight, groups), rows_by_weights(x, turned, groups, across=True)
        return [*(each[: ends[-1]] for each in both), weight_gradient(x, y, groups.offsets_L)]

    found, expected, gradient = twice(call), [], []
    for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)):
        expected.append(x[s:t].float() @ weight[e].float().t())
        gradient.append(x[s:t].float().t() @ y[s:t].float())
    wanted = [torch.cat(expected), torch.cat(expected), torch.stack(gradient)]
    return {n: error(a, b) for n, a, b in zip(("rows", "across", "gradient"), found, wanted, strict=True)}


def check_product(rows: int, columns: int, size: int, experts: int, device: torch.device) -> dict[str, float]:
    """torch's scaled GEMM against the same e4m3 numbers in float32; the first expert and the last rows have none."""
    a = reference_quantise.rounded(torch.randn(rows, columns, device=device))
    b = reference_quantise.rounded(torch.randn(experts, size, columns, device=device) / columns**0.5)
    ends = [rows // 2 * e // (experts - 1) for e in range(experts)]
    groups = groups_of(ends, rows, device)
    (found,) = twice(lambda: [grouped_product(a, b, groups)[: ends[-1]]])
    expected = torch.cat(
        [dequantised(a)[s:t] @ dequantised(b)[e].t() for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False))]
    )
    return {"product": error(found, expected)}


def groups_of(ends: list[int], rows: int, device: torch.device) -> RowGroups:
    return row_groups(
        torch.tensor(ends, device=device).diff(prepend=torch.zeros(1, dtype=torch.int64, device=device)), rows
    )


def check_fp8_experts(shape: Shape, device: torch.device) -> dict[str, float]:
    """Tokens with all experts here, or half of them, with the weights quantised beforehand or not: the same bits."""
    leaves, ids = draw_layer(shape, torch.bfloat16, device)
    x, weights, gate_up, down = leaves
    dy = torch.randn(shape.T, shape.H, device=device).bfloat16()
    maps, gemms = row_maps(ids.reshape(-1), shape.E), Fp8Gemms()
    beforehand = quantise_weights(gate_up, down, gemms)

    def call(quantised: list[torch.Tensor]) -> list[torch.Tensor]:
        y = fp8_local_experts(x, weights, maps, gate_up, down, "silu", gemms, quantised)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    found = twice(lambda: call(beforehand))
    assert all(torch.equal(a, b) for a, b in zip(found, call([]), strict=True)), "quantised on the way is another"
    expected = loops(leaves, ids, dy)
    names = ("y", "dx", "d weights", "d gate_up", "d down")
    errors = {n: error(a, b) for n, a, b in zip(names, found, expected, strict=True)}
    of_rank = torch.zeros_like(x, dtype=torch.float32)
    for part, half in shares(ids, shape.E):
        of_rank += fp8_local_experts(x, weights, half, gate_up[part], down[part], "silu", gemms).detach()
    return errors | {"y of two ranks": error(of_rank, expected[0])}


def fp8_checks(shapes: dict[str, Shape], toy: bool, device: torch.device) -> Iterator[Check]:
    for size in ((0, 64, 2), (37, 48, 3)) if toy else ((0, 64, 2), (4097, 2048, 8), (8191, 7168, 8), (1003, 20000, 2)):
        yield f"rows in fp8, tokens, hidden, copies {size}", lambda s=size: check_quantise(*s, device)
    for rows, inner in ((9, 32),) if toy else ((40961, 768), (8192, 14336), (1024, 20480)):
        for name in ("silu", "gelu_tanh"):
            yield (
                f"activation in fp8, {name}, {rows} x {inner}",
                lambda n=name, r=rows, i=inner: check_fp8_activation(r, i, n, device),
            )
    for name, shape in shapes.items():
        yield f"weights in fp8, {name}", lambda s=shape: check_weights(s, device)
    for size in ((40, 48, 32, 3),) if toy else ((5003, 2048, 768, 9), (9001, 16, 16, 4), (40000, 7168, 2048, 5)):
        yield f"product in fp8, rows, K, N, experts {size}", lambda s=size: check_product(*s, device)
    for name, shape in shapes.items():
        yield f"experts in fp8, {name}", lambda s=shape: check_fp8_experts(s, device)


def checks(shapes: dict[str, Shape], toy: bool, device: torch.device) -> Iterator[Check]:
    sizes = (0, 1, 37, 48) if toy else (0, 1, 4097, 16384, 49152)
    for tokens in sizes:
        for experts, rule in RULES[-2:] if toy and tokens > 1 else RULES:
            yield (
                f"router, T {tokens}, E {experts}, {rule.score}",
                lambda *a, t=tokens, e=experts, r=rule: check_router(t, e, r, device),
            )
    for copies, size in ((0, 4), (1, 1), (300, 60)) if toy else ((0, 4), (131071, 128), (131072, 1024), (524288, 8)):
        yield f"row maps, {copies} copies, {size} experts", lambda c=copies, s=size: check_row_maps(c, s, device)
    for name in reference_activation.ACTIVATION_NAMES:
        rows, inner = (9, 24) if toy else (40961, 768)
        yield f"activation {name}", lambda n=name, r=rows, i=inner: check_activation(r, i, n, device)
    gemms = ((5003, 2048, 768, 9), (9001, 16, 24, 40), (131, 72, 200, 5), (30000, 7168, 2048, 7), (1, 8, 8, 2))
    gemms += ((20001, 640, 512, 100), (5003, 1000, 360, 9), (7001, 360, 1000, 4))
    for size in ((40, 48, 32, 3), (1, 8, 8, 2)) if toy else gemms:
        yield f"grouped GEMMs, bf16, rows, K, N, experts {size}", lambda s=size: check_gemms(*s, device)
    for name, shape in shapes.items():
        yield f"experts {name}, bf16", lambda s=shape: check_experts(s, torch.bfloat16, device)
        yield f"half of the experts {name}, bf16", lambda s=shape: check_share(s, torch.bfloat16, device)
    small = next(iter(shapes.values())) if toy else Shape(2003, 512, 256, 60, 4)
    yield "experts, float32", lambda: check_experts(small, torch.float32, device)
    yield from fp8_checks(shapes, toy, device)
    yield "rows and offsets beyond 2^31 elements", lambda: check_long_rows(toy, device)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true", help="small sizes, on any device")
    parser.add_argument("--only", default="", help="checks whose name has this in it")
    arguments = parser.parse_args()
    toy = arguments.toy
    shapes, device = pick(toy)
    # widths that FP8 takes and that fill no line of the cache
    shapes = shapes | {"uneven": Shape(37, 48, 16, 5, 2) if toy else Shape(5003, 1008, 368, 30, 4)}
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{versions(device)}; {'Triton' if runs_triton(device) else 'plain torch'}")
    failed = 0
    for name, check in checks(shapes, toy, device):
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        # new memory is NaN: what a kernel leaves unwritten is seen
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        wide = any(word in name for word in ("bf16", "activation", "beyond", "product"))
        limit = LIMIT[torch.bfloat16 if wide else torch.float32]
        if name.startswith("experts in fp8"):
            limit = LIMIT[torch.float8_e4m3fn]
        try:
            errors = check()
            wrong = {what: value for what, value in errors.items() if not value <= limit}
            verdict = f"FAILED {wrong}" if wrong else "ok"
        except Exception:  # noqa: BLE001 - the other checks are run all the same, and the exit code says so
            errors, verdict = {}, f"FAILED\n{traceback.format_exc(limit=-3)}"
        failed += verdict != "ok"
        worst = f"{max(errors.values()):.1e}" if errors else "-"
        print(f"{name:<52} {worst:>8}  {verdict}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("all ok" if not failed else f"{failed} FAILED")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
