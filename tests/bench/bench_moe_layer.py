"""One MoE layer (router, experts, combine), forward and backward in bf16, against its peers on one GPU.

    python tests/bench/bench_moe_layer.py [--peers ours_fused,sonicmoe] [--shapes qwen3,dsv3] [--skew]
    python tests/bench/bench_moe_layer.py --toy     (anywhere, seconds; the numbers mean nothing)

Everybody has the same weights, tokens and gradient; peers that are not installed are listed as such. Before anything
is timed, the output and all gradients are compared with float32 loops over experts. Times are medians over five loops
of at least 0.3 s that all peers take in turns, so that a GPU that lowers its clock does so for all; the lowest and
highest are in brackets; of forward alone three loops of 0.1 s. held: what forward leaves for backward; peak: the most
in use until backward has ended, gradients included; both beyond weights and tokens. FLOPs are those of the six grouped
GEMMs; the share is of a dense 8192^3 bf16 product, measured after warming up. The first line is what torch's six
grouped GEMMs take alone. ours_fp8 has its weights quantised beforehand, as in all micro-batches of an optimizer step
but the first; ours_fp8_quantising does it in every pass. With --skew one expert has 8 times the mean (or all tokens,
if that is less) and a sixteenth of the experts, but at least one, has none. SonicMoE is left eleven of QuACK's tiles
to choose from for each product: with all of them it compiles and tunes for many minutes. Prints a Markdown table.
"""

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_shapes import OTHERS, Shape, median_ms, pick, versions, wait

from moe_train.kernels import has_quack, runs_triton
from moe_train.moe import (
    ChildNames,
    ExpertWeights,
    LayerOptions,
    MoEContext,
    ParallelMoELayer,
    ResidentExperts,
    RouterSpec,
    ScoreRouter,
    SlotPlan,
    fp8_gemms,
)
from moe_train.parallel import Topology, build_groups

BF16 = torch.bfloat16
LIMIT = 2.5e-2
"""Largest relative L2 error of an output or gradient against float32 loops."""
FP8_LIMIT = 0.15
"""e4m3 has 3 bits behind the point: 0.03 for each operand, and the router's gradient is a difference."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Weights, tokens x and the gradient dy of the output; router [E, H], gate_up [E, 2I, H], down [E, H, I]."""

    shape: Shape
    x: torch.Tensor
    dy: torch.Tensor
    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Peer:
    """run: [T, H] -> [T, H]. gradients: of router, gate_up and down as `Case` has them."""

    run: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[torch.Tensor]
    gradients: Callable[[], list[torch.Tensor]]


def make_case(shape: Shape, device: torch.device, skew: bool = False) -> Case:
    """Tokens whose k-th and next best logit are apart, so that nobody's rounding routes them otherwise."""
    torch.manual_seed(17)
    apart = 0.05

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device) / sizes[-1] ** 0.5

    def tokens() -> torch.Tensor:
        x = torch.randn(4 * shape.T, shape.H, device=device).to(BF16)
        if skew:
            x[:, 0] = 1.0  # the first column of the router is a bias
        return x

    router = (draw(shape.E, shape.H) * 2).to(BF16)
    if skew:
        router[:, 0] = 0.0
        router[-max(1, shape.E // 16) :, 0] = -1000.0
        logits = tokens().float() @ router.float().t()
        rest = logits[:, 1:].topk(shape.K, dim=-1).values[:, -1] - logits[:, 0]
        router[0, 0] = rest.quantile(min(1.0, 8 * shape.K / shape.E)) + apart
    kept: list[torch.Tensor] = []
    while sum(map(len, kept)) < shape.T:
        x = tokens()
        best = (x.float() @ router.float().t()).topk(min(shape.K + 1, shape.E), dim=-1).values
        kept.append(x[best[:, shape.K - 1] - best[:, -1] > apart] if shape.K < shape.E else x)
    return Case(
        shape=shape,
        x=torch.cat(kept)[: shape.T].contiguous(),
        dy=torch.randn(shape.T, shape.H, device=device).to(BF16),
        router=router,
        gate_up=torch.stack([draw(2 * shape.I, shape.H).to(BF16) for _ in range(shape.E)]),
        down=torch.stack([draw(shape.H, shape.I).to(BF16) for _ in range(shape.E)]),
    )


def leaf(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone().contiguous())


# ------------------------------------------------------------------------------------------------------------- peers


class Gate(nn.Module):
    """Logits in the type of the tokens, as all peers compute them."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = leaf(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class KeptExperts(ResidentExperts):
    """Weights that say that they are the same all the time, or others each time they are asked for."""

    changes, asked = False, 0

    @contextmanager
    def fetch(self) -> Iterator[ExpertWeights]:
        self.asked += self.changes
        yield ExpertWeights(*self.home, version=self.asked)


def ours(case: Case, backend: str, *, fp8: bool = False, quantising: bool = False) -> Peer:
    gate_up, down = leaf(case.gate_up), leaf(case.down)
    shape, device = case.shape, case.x.device
    if backend == "hopper" and not has_quack():
        raise ModuleNotFoundError(name="quack")
    source = KeptExperts(gate_up, down)
    source.changes = quantising
    gemms = fp8_gemms("fp8" if fp8 else None, device, shape.H, shape.I, shape.E)
    context = MoEContext(1, shape.E, device)
    layer = ParallelMoELayer(
        children={"gate": Gate(case.router)},
        names=ChildNames(router="gate", experts="experts"),
        experts=source,
        activation=F.silu,
        router=ScoreRouter(RouterSpec(num_experts=shape.E, top_k=shape.K, score="softmax", normalize=True)),
        plan=SlotPlan(shape.E, 1),
        options=LayerOptions(backend=backend, fp8=gemms),
        groups=build_groups(Topology(world=1, expert=1)),
        context=context,
        index=0,
    )
    gate = layer.get_parameter("gate.weight")
    parameters: list[torch.Tensor] = [gate, gate_up, down]
    return Peer(run=layer, parameters=parameters, gradients=lambda: [p.grad for p in parameters])  # type: ignore[misc]


def stock_block(case: Case, implementation: str) -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = case.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = leaf(case.router)
    block.experts.gate_up_proj, block.experts.down_proj = leaf(case.gate_up), leaf(case.down)
    return block


def transformers_peer(case: Case, *, compiled: bool) -> Peer:
    block = stock_block(case, "grouped_mm")
    parameters = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    call = torch.compile(block) if compiled else block
    return Peer(
        run=lambda x: call(x[None])[0],
        parameters=parameters,
        gradients=lambda: [p.grad for p in parameters],  # type: ignore[misc]
    )


def deepspeed_peer(case: Case) -> Peer:
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    shape = case.shape
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="qwen3_moe",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.E,
        top_k=shape.K,
        hidden_size=shape.H,
        ffn_hidden_size=shape.I,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    config = AutoEPConfig(enabled=True)
    layer = AutoEPMoELayer(spec, stock_block(case, "eager"), ep_size=1, ep_rank=0, config=config).to(case.x.device)
    router, experts = layer.router.gate.weight, layer.experts
    return Peer(
        run=lambda x: layer(x[None])[0],
        parameters=[router, experts.w1, experts.w3, experts.w2],
        gradients=lambda: [router.grad, torch.cat([experts.w1.grad, experts.w3.grad], dim=1), experts.w2.grad],
    )


def torchtitan_peer(case: Case, *, compiled: bool) -> Peer:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    shape, width = case.shape, case.shape.I
    inner = GroupedExperts.Config(dim=shape.H, hidden_dim=shape.I, num_experts=shape.E)
    dispatcher = LocalTokenDispatcher.Config(num_experts=shape.E, top_k=shape.K)
    config = MoE.Config(
        num_experts=shape.E,
        load_balance_coeff=None,
        routed_experts=RoutedExperts.Config(inner_experts=inner, token_dispatcher=dispatcher),
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.E,
            top_k=shape.K,
            score_func="softmax",
            route_norm=True,
            gate=Linear.Config(in_features=shape.H, out_features=shape.E, bias=False),
        ),
    )
    with torch.device("meta"):
        layer = config.build()
    experts = layer.routed_experts.inner_experts
    layer.router.gate.weight = leaf(case.router)
    experts.w1_EFD, experts.w3_EFD = leaf(case.gate_up[:, :width]), leaf(case.gate_up[:, width:])
    experts.w2_EDF = leaf(case.down)
    layer.tokens_per_expert_E = torch.zeros(shape.E, device=case.x.device)
    call = torch.compile(layer) if compiled else layer
    router = layer.router.gate.weight
    return Peer(
        run=lambda x: call(x[None])[0],
        parameters=[router, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF],
        gradients=lambda: [
            router.grad,
            torch.cat([experts.w1_EFD.grad, experts.w3_EFD.grad], dim=1),
            experts.w2_EDF.grad,
        ],
    )


TILES = (128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False), (128, 160, True), (128, 128, True)
TILES += (192, 128, True), (256, 160, False), (128, 224, False), (256, 208, False), (128, 208, True)


def limit_tiles() -> None:
    """Of QuACK's GEMMs, height, width and ping-pong: all of its own for Hopper, with one cluster."""
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig

    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
        fits = [t for t in TILES if name == "gemm_tuned" or (t[1] % 32 == 0 and t[0] != 192)]
        getattr(gemm_interface, name).configs = [
            AutotuneConfig(config=GemmConfig(tile_m=m, tile_n=n, pingpong=p, is_dynamic_persistent=False))
            for m, n, p in fits
        ]


def sonic_peer(case: Case) -> Peer:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    limit_tiles()
    shape = case.shape
    halves = [case.gate_up[:, : shape.I], case.gate_up[:, shape.I :]]
    router, down = leaf(case.router), leaf(case.down)
    gate_up = leaf(torch.stack(halves, dim=2).reshape(shape.E, 2 * shape.I, shape.H))  # rows of both halves in turn
    stream = torch.cuda.current_stream().cuda_stream

    def run(x: torch.Tensor) -> torch.Tensor:
        first, second = gate_up.permute(1, 2, 0), down.permute(1, 2, 0)
        kind = ActivationType.SWIGLU
        return moe_TC_softmax_topk_layer(x, router, first, None, second, None, shape.K, stream, kind, False)[0]

    def gradients() -> list[torch.Tensor]:
        return [router.grad, torch.cat([gate_up.grad[:, 0::2], gate_up.grad[:, 1::2]], dim=1), down.grad]

    return Peer(run=run, parameters=[router, gate_up, down], gradients=gradients)


PEERS: dict[str, Callable[[Case], Peer]] = {
    "ours_loop": lambda case: ours(case, "loop"),
    "ours_grouped": lambda case: ours(case, "grouped"),
    "ours_fused": lambda case: ours(case, "fused"),
    "ours_hopper": lambda case: ours(case, "hopper"),
    "ours_fp8": lambda case: ours(case, "fused", fp8=True),
    "ours_fp8_quantising": lambda case: ours(case, "fused", fp8=True, quantising=True),
    "transformers": lambda case: transformers_peer(case, compiled=False),
    "transformers_compiled": lambda case: transformers_peer(case, compiled=True),
    "deepspeed_autoep": deepspeed_peer,
    "torchtitan": lambda case: torchtitan_peer(case, compiled=False),
    "torchtitan_compiled": lambda case: torchtitan_peer(case, compiled=True),
    "sonicmoe": sonic_peer,
}
SLOW_ON_CPU = ("transformers_compiled", "torchtitan_compiled", "ours_fp8_quantising")
"""They compile C++ there, or interpret a minute long, for numbers that mean nothing."""


# --------------------------------------------------------------------------------------------------------- measuring


def reference(case: Case) -> list[torch.Tensor]:
    """y and the gradients of x, router, gate_up and down, expert by expert in float32."""
    x, router = case.x.float().requires_grad_(), case.router.float().requires_grad_()
    best, ids = (x @ router.t()).softmax(-1).topk(case.shape.K, dim=-1)
    weights = best / best.sum(-1, keepdim=True)
    given, y = torch.zeros_like(weights), torch.zeros_like(x)
    dx = torch.zeros_like(x)
    dgate_up, ddown = torch.empty_like(case.gate_up), torch.empty_like(case.down)
    for e in range(case.shape.E):
        token, copy = torch.where(ids == e)
        parts = (x.detach()[token], case.gate_up[e].float(), case.down[e].float(), weights.detach()[token, copy])
        part = [p.requires_grad_() for p in parts]
        gate, up = F.linear(part[0], part[1]).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, part[2]) * part[3].unsqueeze(1)
        grads = torch.autograd.grad(out, part, case.dy[token].float())
        y.index_add_(0, token, out.detach())
        dx.index_add_(0, token, grads[0])
        dgate_up[e], ddown[e], given[token, copy] = grads[1], grads[2], grads[3]
    weights.backward(given)
    assert x.grad is not None
    assert router.grad is not None
    return [y, dx + x.grad, router.grad, dgate_up, ddown]


def errors(peer: Peer, case: Case, expected: list[torch.Tensor]) -> float:
    """Largest relative L2 error of the output and all gradients."""
    x = case.x.clone().requires_grad_()
    y = peer.run(x)
    y.backward(case.dy)
    found = [y.detach(), x.grad, *peer.gradients()]
    relative = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)]
    return max(e if e == e else float("inf") for e in relative)


def clear(peer: Peer, x: torch.Tensor) -> None:
    for tensor in (x, *peer.parameters):
        tensor.grad = None


def memory(peer: Peer, case: Case) -> tuple[float, float]:
    """Held and peak, MiB; 0 without a GPU."""
    device, x = case.x.device, case.x.clone().requires_grad_()
    if device.type != "cuda":
        return 0.0, 0.0
    clear(peer, x)
    gc.collect()
    wait(device)
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = peer.run(x)
    wait(device)
    held = torch.cuda.memory_allocated() - base
    y.backward(case.dy)
    wait(device)
    peak = torch.cuda.max_memory_allocated() - base
    clear(peer, x)
    return held / 2**20, peak / 2**20


def times(peers: dict[str, Peer], case: Case, loops: int, seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Of each peer, ms of forward and of both, a number per loop."""
    device, x = case.x.device, case.x.clone().requires_grad_()
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in peers}

    def both(peer: Peer) -> None:
        clear(peer, x)
        peer.run(x).backward(case.dy)

    for peer in peers.values():
        for _ in range(3):
            both(peer)
    for loop in range(loops):
        for name, peer in peers.items():
            found[name][1].append(median_ms(lambda p=peer: both(p), device, 1, seconds))
            clear(peer, x)
            if loop < 3:
                found[name][0].append(median_ms(lambda p=peer: p.run(x), device, 1, seconds / 3))
    return found


def dense_flops(device: torch.device, size: int, seconds: float) -> float:
    """Sustained FLOP/s of a dense bf16 product."""
    a, b = (torch.randn(size, size, device=device).to(BF16) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b, device, 5, seconds) * 1e-3)


def floor(case: Case, loads_E: torch.Tensor) -> Peer:
    """torch's six grouped GEMMs with these loads, and nothing else."""
    shape, device = case.shape, case.x.device
    rows = shape.T * shape.K
    x, h, a = (torch.randn(rows, width, device=device).to(BF16) for width in (shape.H, 2 * shape.I, shape.I))
    offsets = loads_E.cumsum(0).to(torch.int32)
    up, down = case.gate_up, case.down

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, _):
            F.grouped_mm(x, up.transpose(1, 2), offs=offsets)
            return F.grouped_mm(a, down.transpose(1, 2), offs=offsets)[: shape.T]

        @staticmethod
        def backward(ctx, _):
            F.grouped_mm(x, down, offs=offsets)
            F.grouped_mm(x.t(), a, offs=offsets)
            F.grouped_mm(h, up, offs=offsets)
            F.grouped_mm(h.t(), x, offs=offsets)

    return Peer(run=Products.apply, parameters=[], gradients=list)


def build(name: str, case: Case, expected: list[torch.Tensor]) -> tuple[Peer | None, str, float]:
    """The peer, or why there is none; and its error."""
    try:
        peer = PEERS[name](case)
        error = errors(peer, case, expected)
    except ImportError as missing:
        return None, f"not installed ({missing.name})", 0.0
    except Exception as failure:  # noqa: BLE001 - the other peers are measured all the same
        traceback.print_exc(file=sys.stderr)
        return None, f"failed: {type(failure).__name__} {str(failure).splitlines()[0][:80]}", 0.0
    if not error <= (FP8_LIMIT if "fp8" in name else LIMIT):
        return None, f"wrong: error {error:.1e}", error
    return peer, "", error


def table(case: Case, names: list[str], dense: float, loops: int, seconds: float) -> bool:
    """Prints it; whether all of ours are right."""
    expected = reference(case)
    ids = (case.x.float() @ case.router.float().t()).topk(case.shape.K, dim=-1).indices
    loads = ids.flatten().bincount(minlength=case.shape.E)
    print(f"{case.shape}; rows of an expert: {loads.min()} to {loads.max()}\n")
    peers, notes, wrong, right = {"grouped GEMMs alone": floor(case, loads)}, {}, [], True
    for name in names:
        peer, why, error = build(name, case, expected)
        right &= not (name.startswith("ours") and why.startswith(("failed", "wrong")))
        if peer is None:
            wrong.append(f"| {name} | {why} | | | | | | |")
        else:
            held, peak = memory(peer, case)
            peers[name], notes[name] = peer, f"{held:.0f} | {peak:.0f} | {error:.1e}"
    found = times(peers, case, loops, seconds)
    best = statistics.median(found["sonicmoe"][1]) if "sonicmoe" in found else None
    print("| layer | forward, ms | forward + backward, ms | to SonicMoE | of dense | held, MiB | peak, MiB | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (first, both) in found.items():
        middle = statistics.median(both)
        ratio = f"{middle / best:.2f}x" if best else ""
        share = case.shape.flops / (middle * 1e-3) / dense
        row = f"{middle:.2f} ({min(both):.2f} to {max(both):.2f}) | {ratio} | {share:.0%}"
        print(f"| {name} | {statistics.median(first):.2f} | {row} | {notes.get(name, '| |')} |")
    print("\n".join(wrong), flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--shapes", default="")
    parser.add_argument("--skew", action="store_true")
    parser.add_argument("--toy", action="store_true", help="small sizes, one call each, on any device")
    arguments = parser.parse_args()
    shapes, device = pick(arguments.toy)
    wanted = arguments.shapes.split(",") if arguments.shapes else list(shapes)
    shapes = shapes if arguments.toy else shapes | OTHERS
    names = [n for n in arguments.peers.split(",") if device.type == "cuda" or n not in SLOW_ON_CPU]
    unknown = [n for n in names if n not in PEERS] + [s for s in wanted if s not in shapes]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; peers: {', '.join(PEERS)}; shapes: {', '.join(shapes)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    loops, seconds = (1, 0.0) if arguments.toy else (5, 0.3)
    dense = dense_flops(device, 128 if arguments.toy else 8192, 0.0 if arguments.toy else 1.0)
    kernels = "Triton" if runs_triton(device) else "plain torch"
    print(f"{versions(device)}; kernels: {kernels}; dense bf16 {dense / 1e12:.0f} TFLOP/s\n")
    failed = False
    for shape_name in wanted:
        print(f"{shape_name}{', skewed' * arguments.skew}: ", end="")
        failed |= not table(make_case(shapes[shape_name], device, arguments.skew), names, dense, loops, seconds)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
