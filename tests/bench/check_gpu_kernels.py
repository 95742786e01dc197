"""Every kernel on a GPU at real sizes against float64 or float32 references; outputs start as NaN; the same bits twice.

    python tests/bench/check_gpu_kernels.py          (a CUDA GPU with 100 GiB free)
    python tests/bench/check_gpu_kernels.py --toy    (anywhere)

A line per check; exits 1 if one fails. The last check moves rows whose offsets pass 2^31 elements.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import Shape, pick, versions

from moe_train.kernels import RouterRule, expert_rows, local_experts, route, row_maps, runs_triton, weighted_sum
from moe_train.kernels.choose import implementation
from moe_train.kernels.reference import activation as reference_activation
from moe_train.kernels.reference import router as reference_router
from moe_train.kernels.reference import row_maps as reference_row_maps

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
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
        return [out.ids_TK, out.counts_SE, *(o.detach() for o in outputs), leaf.grad]

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
    wanted = [expected[1], expected[3], expected[4], gradient]
    names = ("weights", "sums", "z", "gradient")
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


def check_rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Rows as they come from other ranks, and their weighted sum."""
    (x, weights, gate_up, down), ids = draw_layer(shape, dtype, device)
    maps = row_maps(ids.reshape(-1), shape.E)
    rows = x.detach()[maps.order_R // shape.K].requires_grad_()
    leaves = [rows, weights, gate_up, down]
    dy = torch.randn(shape.T, shape.H, device=device).to(dtype)

    def call() -> list[torch.Tensor]:
        y_rows = expert_rows(rows, maps.counts_D, gate_up, down, "silu")
        y = weighted_sum(y_rows, weights, maps.place_R)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    y, drows, *found = twice(call)
    wanted_y, wanted_dx, *wanted = loops([x, weights, gate_up, down], ids, dy)
    dx = drows.float()[maps.place_R].view(shape.T, shape.K, shape.H).sum(dim=1)
    names = ("y", "dx", "d weights", "d gate_up", "d down")
    pairs = zip(names, [y, dx, *found], [wanted_y, wanted_dx, *wanted], strict=True)
    return {n: error(a, b) for n, a, b in pairs}


def check_long_rows(toy: bool, device: torch.device) -> dict[str, float]:
    """More than 2^31 elements: the last rows are compared with indexing."""
    tokens, copies, hidden = (64, 4, 96) if toy else (49152, 8, 7168)
    if not toy:
        assert tokens * copies * hidden > 2**31
    rows = implementation("rows", device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    maps = row_maps(torch.randint(0, 8, (tokens * copies,), device=device), 8)
    place = maps.place_R.view(tokens, copies)
    spread = rows.spread(x, place)
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
    wanted = reference_activation.backward(out[end].double(), h[end].double(), few, None, first, "silu")
    return found | {"activation": error(out[end], wanted[1]), "dh": error(dh[end], wanted[0])}


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
    for name, shape in shapes.items():
        yield f"experts {name}, bf16", lambda s=shape: check_experts(s, torch.bfloat16, device)
        yield f"rows {name}, bf16", lambda s=shape: check_rows(s, torch.bfloat16, device)
    small = next(iter(shapes.values())) if toy else Shape(2003, 512, 256, 60, 4)
    yield "experts, float32", lambda: check_experts(small, torch.float32, device)
    yield "rows and offsets beyond 2^31 elements", lambda: check_long_rows(toy, device)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true", help="small sizes, on any device")
    toy = parser.parse_args().toy
    shapes, device = pick(toy)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{versions(device)}; {'Triton' if runs_triton(device) else 'plain torch'}")
    failed = 0
    for name, check in checks(shapes, toy, device):
        torch.manual_seed(0)
        # new memory is NaN: what a kernel leaves unwritten is seen
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        limit = LIMIT[torch.bfloat16 if "bf16" in name or "activation" in name or "beyond" in name else torch.float32]
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
