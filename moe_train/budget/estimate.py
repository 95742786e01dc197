"""A resolved recipe -> what a step will cost on the fullest rank, and how far a measured run was from that."""

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_train.budget.activations import Activations, Rows, count_activations
from moe_train.budget.states import StateBytes, gradient_bytes, held_bytes, quantised_bytes, sums_in_fp32
from moe_train.budget.traffic import Flow, flows_of, visits_per_rank, worked_tokens
from moe_train.config.deepspeed import LARGEST_BUCKET
from moe_train.diagnostics.metrics_file import read_lines
from moe_train.diagnostics.throughput import peak_flops
from moe_train.errors import ConfigError
from moe_train.model import compute_dtype, count_parameters, num_experts_of
from moe_train.model.build import meta_model
from moe_train.model.held import Held, held_by
from moe_train.moe import KERNEL_BACKENDS, gemms_of_sizes, resolve_backend
from moe_train.train.check import ResolvedRun
from moe_train.train.run import flops_per_token

LINKS: dict[str, float] = {"B200": 900e9, "H200": 450e9, "H100": 450e9, "H800": 200e9, "A100": 300e9}
"""NVLink of one GPU in bytes/s and direction, from the vendor's data sheets."""
NETWORK = 50e9
"""Between hosts, bytes/s of one GPU: a 400 Gb/s adapter each."""

EFFICIENCY = 0.17
"""About what recipes of this package reached on one H200 in bf16: 14 to 23 %."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """flops: peak of one device in FLOP/s. efficiency: the share of it that is reached while it computes.

    link, network: bytes/s that one device sends within a host and between hosts.
    """

    name: str
    flops: float
    efficiency: float
    link: float
    network: float

    @classmethod
    def of(
        cls,
        gpu: str,
        compute: str,
        *,
        flops: float | None = None,
        efficiency: float | None = None,
        link: float | None = None,
        network: float | None = None,
    ) -> "Hardware":
        """Numbers given, or those of a known GPU. Raises `ConfigError` for one that is not known."""
        flops = flops or peak_flops(gpu, compute)
        link = link or next((speed for name, speed in LINKS.items() if name.lower() in gpu.lower()), None)
        if flops is None or link is None:
            missing = "--peak-tflops" if flops is None else "--link-gbs"
            raise ConfigError(
                f"--gpu ({gpu}): its {'peak in ' + compute if flops is None else 'link'} is not known: give {missing}"
            )
        return cls(name=gpu, flops=flops, efficiency=efficiency or EFFICIENCY, link=link, network=network or NETWORK)


@dataclass(frozen=True, kw_only=True)
class AtLoad:
    """With so many times a fair share of rows on this rank. memory: bytes on the device, without the host's share of an
    offload, the allocator's gaps and what CUDA itself takes. seconds: of one optimizer step, nothing overlapped."""

    skew: float
    activations: int
    memory: int
    compute_s: float
    wire_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.wire_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the rank that holds most will need.

    temporary: of the largest layer, what exists only while it is worked on. tokens: of a step, over all ranks.
    """

    rank: int
    world: int
    experts: StateBytes
    dense: StateBytes
    temporary: int
    bucket: int
    flows: tuple[Flow, ...]
    flops_per_token: float
    tokens: int
    loads: tuple[AtLoad, ...]
    hardware: Hardware

    def to_dict(self) -> dict[str, Any]:
        tree = asdict(self)
        for load, found in zip(self.loads, tree["loads"], strict=True):
            found |= {"seconds": load.seconds, "tokens_per_s": self.tokens / load.seconds}
        return tree


def plan_run(run: ResolvedRun, hardware: Hardware, skews: tuple[float, ...] = (1.0, 1.5, 2.0)) -> Plan:
    """Raises `ConfigError` as building the model would."""
    run = _with_any_fused_attention(run)
    recipe, topology = run.recipe, run.topology
    model = meta_model(recipe, run.model_config)
    count = count_parameters(recipe, run.model_config, run.plan, topology)
    held = {rank: held_by(rank, model, recipe, run.plan, topology) for rank in topology.expert_groups()[0]}
    needs = {rank: sum(held_bytes(one, recipe, topology), _NOTHING).total for rank, one in held.items()}
    rank = max(needs, key=lambda rank: needs[rank])
    experts, dense = held_bytes(held[rank], recipe, topology)
    temporary, bucket = _temporary(run, held[rank]), _bucket(run, held[rank])
    flows = tuple(flows_of(run, held[rank], count.num_moe_layers))
    per_token = flops_per_token(run, count)
    # recompute and counting ahead are forwards more, each a third of forward and backward
    passes = (run.forwards + 2) / 3
    in_experts = 6.0 * count.experts * run.model_config.num_experts_per_tok / num_experts_of(run.model_config)
    tokens = run.tokens_per_step / topology.world
    kept_here = experts.total + dense.total
    if recipe.zero.offload == "cpu":
        kept_here -= experts.states + dense.states
    late = experts.gradients if run.accumulation == 1 else 0  # they come as the activations go
    loads = []
    for skew in skews:
        kept = _activations(run, skew).peak(recipe.model.activation_checkpointing)
        flops = tokens * passes * (per_token + (skew - 1) * in_experts)
        grown = min(skew, 1 / visits_per_rank(run))  # a rank gets each token once at most
        loads.append(
            AtLoad(
                skew=skew,
                activations=kept,
                memory=kept_here - late + bucket + max(kept + temporary, _at_the_step(run, late)),
                compute_s=flops / (hardware.flops * hardware.efficiency),
                wire_s=sum(_seconds(flow, run, hardware) * (grown if flow.with_load else 1) for flow in flows),
            )
        )
    return Plan(
        rank=rank,
        world=topology.world,
        experts=experts,
        dense=dense,
        temporary=temporary,
        bucket=bucket,
        flows=flows,
        flops_per_token=per_token,
        tokens=run.tokens_per_step,
        loads=tuple(loads),
        hardware=hardware,
    )


def _at_the_step(run: ResolvedRun, gradients: int) -> int:
    """Bytes of the experts' gradients of one micro-batch when the optimizer reads them: as they came, where nobody adds
    to them and `optim.OnePassAdamW` takes any type."""
    recipe, topology = run.recipe, run.topology
    alone = topology.world == topology.expert * topology.expert_tensor and not run.plan.num_redundant
    if alone and recipe.zero.offload == "none" and recipe.optimizer.name in ("adamw", "one_pass_adamw"):
        return gradients * compute_dtype(recipe).itemsize // gradient_bytes(recipe)
    return gradients


def _with_any_fused_attention(run: ResolvedRun) -> ResolvedRun:
    """transformers builds a model for flash attention only where that is installed; it keeps the same tensors."""
    model = run.recipe.model
    if model.attention != "flash_attention_2":
        return run
    return replace(run, recipe=run.recipe.model_copy(update={"model": model.model_copy(update={"attention": "sdpa"})}))


_NOTHING = StateBytes(weights=0, gradients=0, states=0)


def _activations(run: ResolvedRun, skew: float) -> Activations:
    config, topology, plan = run.model_config, run.topology, run.plan
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    tokens = worked_tokens(run) * topology.token_gather * topology.expert  # of the whole expert group
    fair = tokens * config.num_experts_per_tok / (topology.expert - plan.shared_ranks)
    visits = round(min(tokens * visits_per_rank(run) * skew, tokens)) if topology.expert > 1 else None
    rows = Rows(received=round(fair * skew), width=width // topology.expert_tensor, visits=visits)
    size = (run.recipe.batch.micro_size, run.recipe.data.sequence_length)
    act = getattr(config, "hidden_act", "")
    gpu, dtype = torch.device("cuda"), compute_dtype(run.recipe)
    asked = run.recipe.moe.backend
    if run.recipe.precision.experts == "fp8":
        gemms_of_sizes(config.hidden_size, rows.width, max(plan.slots_per_rank))
        asked = "fused"
    backend = resolve_backend(asked, gpu, dtype, config.hidden_size, rows.width, hidden_act=act)
    return count_activations(run.recipe, config, size, rows, fused=backend in KERNEL_BACKENDS)


def _temporary(run: ResolvedRun, held: Held) -> int:
    """Gradients of a layer's experts before they are reduced, and at ZeRO-3 its weights, gathered.

    There a product in FP8 has its matrix quantised for as long as it takes.
    """
    weight = compute_dtype(run.recipe).itemsize
    layers: dict[str, int] = {}
    quantised = 0
    for parameter in held.stored:
        block = parameter.name.rpartition(".")[0]
        layers[block] = layers.get(block, 0) + parameter.numel
        both = quantised_bytes(parameter, run.recipe) * (parameter.home + parameter.copies)
        quantised = max(quantised, both // 2)
    largest = max(layers.values(), default=0) * weight
    return 2 * largest + quantised if run.recipe.zero.stage == 3 else largest


def _bucket(run: ResolvedRun, held: Held) -> int:
    """DeepSpeed's reduction bucket, allocated whole by its ZeRO optimizers (`config.deepspeed.LARGEST_BUCKET`)."""
    if sums_in_fp32(run.recipe) or (run.recipe.zero.stage == 0 and run.recipe.precision.compute == "fp32"):
        return 0
    return min(held.num_dense, LARGEST_BUCKET) * gradient_bytes(run.recipe)


def _seconds(flow: Flow, run: ResolvedRun, hardware: Hardware) -> float:
    one_host = len({rank // run.per_node for rank in flow.ranks}) == 1
    return flow.nbytes / (hardware.link if one_host else hardware.network)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measured number beside the planned one."""

    what: str
    planned: float
    measured: float

    @property
    def error_percent(self) -> float:
        return 100.0 * (self.planned - self.measured) / self.measured


def compare_with_run(plan: Plan, run_dir: Path) -> list[Comparison]:
    """Of the second half of a run's metrics.jsonl: the median speed, and the peak of memory where it was measured.

    Raises `ConfigError` if there is nothing to compare with.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"--run {run_dir}: there is no metrics.jsonl in it")
    lines = [line for line in read_lines(path) if line and "perf/tokens_per_s" in line]
    lines = lines[len(lines) // 2 :]
    if not lines:
        raise ConfigError(f"--run {run_dir}: its metrics.jsonl has no perf/tokens_per_s")
    speed = statistics.median(float(line["perf/tokens_per_s"]) for line in lines)
    load = plan.loads[0]
    found = [
        Comparison(what="tokens/s", planned=plan.tokens / load.seconds, measured=speed),
        Comparison(what="step, s", planned=load.seconds, measured=plan.tokens / speed),
    ]
    peaks = [float(line["perf/peak_memory_bytes"]) for line in lines if "perf/peak_memory_bytes" in line]
    if peaks:
        found.append(Comparison(what="memory, bytes", planned=load.memory, measured=max(peaks)))
    return found
