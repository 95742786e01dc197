"""Kernels of the dense layers on a GPU: right against float64 with outputs that start as NaN, and as fast as torch's?

    python tests/bench/check_gpu_dense.py          (a CUDA GPU; 30 s)
    python tests/bench/check_gpu_dense.py --toy    (anywhere, under TRITON_INTERPRET=1)

A line per check; exits 1 if one fails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import median_ms, versions

from moe_train.kernels import AdamWRule, runs_triton
from moe_train.kernels.reference import adamw as reference_adamw
from moe_train.kernels.reference import cross_entropy as reference_cross_entropy
from moe_train.kernels.reference import norm as reference_norm
from moe_train.kernels.reference import rotary as reference_rotary
from moe_train.model import head

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative L2 error."""
Check = tuple[str, dict[str, float], dict[str, Callable[[], object]]]
"""What it is, errors over their limit, and calls to time."""


def over(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error in units of what is allowed; infinite where the kernel left NaN."""
    found = float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    return found / LIMIT[actual.dtype] if found == found else float("inf")


def check_norm(rows: int, width: int, device: torch.device) -> Check:
    from moe_train.kernels.triton import norm

    x, dy = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
    weight = (1 + 0.3 * torch.randn(width, device=device)).bfloat16()
    y, scale = norm.forward(x, weight, 1e-6)
    dx, dweight = norm.backward(dy, x, weight, scale)
    wide = [t.double() for t in (x, weight, dy)]
    values, scales = reference_norm.forward(wide[0], wide[1], 1e-6)
    of_x, of_weight = reference_norm.backward(wide[2], wide[0], wide[1], scales)
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def theirs() -> object:
        return torch.autograd.grad(F.rms_norm(leaves[0], (width,), leaves[1], 1e-6), leaves, dy)

    errors = {"y": over(y, values), "dx": over(dx, of_x), "d weight": over(dweight, of_weight)}
    ours = lambda: norm.backward(dy, x, weight, norm.forward(x, weight, 1e-6)[1])  # noqa: E731
    return f"norm, {rows} x {width}", errors, {"ours": ours, "torch": theirs}


def check_rotary(sequences: int, length: int, heads: int, width: int, device: torch.device) -> Check:
    from moe_train.kernels.triton import rotary

    x, dy = (torch.randn(sequences, length, heads, width, device=device).bfloat16() for _ in range(2))
    cos, sin = (torch.randn(length, width, device=device).bfloat16() for _ in range(2))
    found = rotary.forward(x, cos, sin), rotary.backward(dy, cos, sin)
    wide = cos.double(), sin.double()
    expected = reference_rotary.forward(x.double(), *wide), reference_rotary.backward(dy.double(), *wide)
    errors = {name: over(a, b) for name, a, b in zip(("y", "dx"), found, expected, strict=True)}
    leaf, c, s = x.detach().requires_grad_(), cos.unsqueeze(1), sin.unsqueeze(1)

    def theirs() -> object:
        half = width // 2
        y = leaf * c + torch.cat((-leaf[..., half:], leaf[..., :half]), -1) * s
        return torch.autograd.grad(y, leaf, dy)

    ours = lambda: (rotary.forward(x, cos, sin), rotary.backward(dy, cos, sin))  # noqa: E731
    return f"rotary, {heads} heads", errors, {"ours": ours, "transformers": theirs}


def check_cross_entropy(tokens: int, vocabulary: int, device: torch.device) -> Check:
    from moe_train.kernels.triton import cross_entropy

    logits = torch.randn(tokens, vocabulary, device=device).bfloat16() * 3
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    slope, expected = logits.clone(), logits.double()
    losses = cross_entropy.cross_entropy_(slope, labels, True)
    wanted = reference_cross_entropy.cross_entropy_(expected, labels, True)
    errors = {"losses": over(losses, wanted), "slope": over(slope, expected)}
    pair = {"ours": cross_entropy, "torch": reference_cross_entropy}
    calls = {name: lambda m=m: m.cross_entropy_(logits, labels, True) for name, m in pair.items()}
    return f"cross-entropy, {tokens} x {vocabulary}", errors, calls


def check_head(tokens: int, hidden: int, vocabulary: int, device: torch.device) -> Check:
    x = torch.randn(tokens, hidden, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device) / hidden**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    labels[::7] = -100
    leaves = [t.detach().float().requires_grad_() for t in (x, weight)]
    wanted = torch.autograd.grad(F.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="sum"), leaves)
    errors = {}
    for fused in (False, True):
        found = torch.autograd.grad(head.linear_cross_entropy(x, weight, labels, fused), (x, weight))
        errors |= {
            f"{name}, {fused=}": over(a, b) for name, a, b in zip(("dx", "d weight"), found, wanted, strict=True)
        }
    calls = {
        name: lambda f=f: torch.autograd.grad(head.linear_cross_entropy(x, weight, labels, f), (x, weight))
        for name, f in (("kernel", True), ("torch", False))
    }
    return f"head, {tokens} x {hidden} x {vocabulary}", errors, calls


def check_adamw(size: int, device: torch.device) -> Check:
    from moe_train.kernels.triton import adamw

    rule = AdamWRule(lr=1e-2, beta_1=0.9, beta_2=0.95, eps=1e-8, weight_decay=0.1)
    gradient = torch.randn(size, device=device).bfloat16()
    state = [torch.randn(size, device=device), torch.randn(size, device=device), torch.rand(size, device=device)]
    wide = [t.double() for t in state]
    used, factor = torch.empty_like(gradient), torch.full((1,), 0.5, device=device)
    corrections = torch.tensor([0.271, 0.377], device=device)
    adamw.step_(*state, gradient, factor, corrections, used, rule)  # type: ignore[arg-type]
    reference_adamw.step_(*wide, gradient, factor.double(), corrections.double(), None, rule)  # type: ignore[arg-type]
    names = ("weights", "first moment", "second moment")
    errors = {name: over(a, b) for name, a, b in zip(names, state, wide, strict=True)} | {"used": over(used, wide[0])}
    theirs = torch.nn.Parameter(state[0].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, fused=device.type == "cuda")

    def in_passes() -> None:
        theirs.grad = gradient * factor
        optimizer.step()
        used.copy_(theirs.detach())

    ours = lambda: adamw.step_(*state, gradient, factor, corrections, used, rule)  # type: ignore[arg-type] # noqa: E731
    return f"AdamW, {size} elements", errors, {"one pass": ours, "torch fused": in_passes}


def checks(toy: bool, device: torch.device) -> Iterator[Check]:
    if toy:
        yield check_norm(9, 24, device)
        yield check_rotary(2, 5, 3, 8, device)
        yield check_cross_entropy(4, 70, device)
        yield check_head(12, 16, 40, device)
        yield check_adamw(3000, device)
        return
    for rows, width in ((524288, 128), (65536, 128), (65536, 512), (16384, 1024), (16384, 2048), (16384, 7168)):
        yield check_norm(rows, width, device)
    for heads in (32, 4):
        yield check_rotary(4, 4096, heads, 128, device)
    for vocabulary in (257, 32768, 151936):
        yield check_cross_entropy(1024, vocabulary, device)
    yield check_head(16384, 2048, 32768, device)
    yield check_adamw(100663296, device)  # a quarter of one layer's gate_up_proj of 128 experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="small sizes, on any device")
    toy = parser.parse_args().toy
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not runs_triton(device):
        raise SystemExit("Triton does not run here: on a CPU set TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    print(versions(device), flush=True)
    good = True
    for name, errors, calls in checks(toy, device):
        torch.utils.deterministic.fill_uninitialized_memory = False
        times = {key: median_ms(call, device, *((1, 0.0) if toy else (5, 0.3))) for key, call in calls.items()}
        torch.utils.deterministic.fill_uninitialized_memory = True
        right = max(errors.values()) <= 1
        good &= right
        said = ", ".join(f"{key} {value:.3f} ms" for key, value in times.items())
        print(f"{name}: {said}: {'ok' if right else f'FAILED {errors}'}", flush=True)
    print("all ok" if good else "FAILED", flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
