"""A dense Hugging Face folder -> a Mixture-of-Experts folder that computes the same function, to be trained on.

Each expert begins as a copy of its layer's MLP (sparse upcycling, arXiv 2212.05055). With granularity G every copy is
cut along its width into G slices, which are experts of their own: a virtual group (arXiv 2410.07524). The slices of a
group share one row of the router, so that at first the top-k picks whole copies. A token's chosen weights sum to 1, and
each of its slices has 1 / G of its copy's: down_proj is multiplied by G. The factor lies there alone because the output
is linear in it; powers of two change no bit.

qwen2_moe has a shared expert too. It is one more copy; its gate begins at 0, sigmoid(0) = 1/2, and the routed half is
halved by the same factor.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from moe_train.checkpoint.threads import Crew
from moe_train.errors import ConfigError
from moe_train.hub.fingerprint import Fingerprint
from moe_train.hub.folder import Entry, entries_of
from moe_train.hub.layout import FolderLayout, Place, Tensor
from moe_train.hub.reader import NEVER_WEIGHTS, READABLE, refuse
from moe_train.hub.tokenizer import COPIED
from moe_train.hub.write import SHARD_BYTES, TYPES, FolderPlan, plan_folder, write_folder
from moe_train.model.build import find_blocks
from moe_train.model.family import build_config, known_fields, read_config_file
from moe_train.model.initialize import draw_modules, seed_of
from moe_train.model.profiles import profile_of

CHUNK = 1 << 20
"""Elements read at once of what is copied as it is."""
NOT_CARRIED = {*PretrainedConfig().to_dict(), "model_type", "use_cache"}
"""Fields of every configuration, which say how a model is loaded or called."""
RECORD = "upcycle.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a dense family becomes. width: the field of the experts' size. fixed: fields that make it the same function.

    without: fields of the dense family that the other lacks, and the value that each must have; None: any.
    """

    model_type: str
    width: str
    fixed: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)


_NORMALISED = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
TARGETS: dict[str, Target] = {
    "llama": Target(
        model_type="mixtral",
        width="intermediate_size",
        without={"pretraining_tp": None, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Target(model_type="mixtral", width="intermediate_size"),
    "qwen2": Target(model_type="qwen2_moe", width="moe_intermediate_size", fixed=_NORMALISED | {"qkv_bias": True}),
    "qwen3": Target(
        model_type="qwen3_moe",
        width="moe_intermediate_size",
        fixed=_NORMALISED,
        without={"max_window_layers": None, "use_sliding_window": False},
    ),
}
"""Pairs whose layers are the same outside of the MLP, and whose top-k weights sum to 1."""


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """copies: of each MLP. copies_per_token: of them, how many a token meets. granularity: experts made of each copy.

    noise: standard deviation of what is added to every expert's weights, in units of that of the matrix.
    seed: of the router and the noise.
    """

    copies: int = 8
    copies_per_token: int = 2
    granularity: int = 1
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """entries: the dense tensors by name. routers: drawn, by name."""

    source: str
    options: UpcycleOptions
    layout: FolderLayout
    folder: FolderPlan
    entries: dict[str, Entry]
    routers: dict[str, torch.Tensor]
    factor: float


def plan_upcycle(
    source: Path, out: Path, options: UpcycleOptions, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> UpcyclePlan:
    """Everything that can be refused without writing.

    Args:
        source: a folder with config.json and safetensors of a llama, mistral, qwen2 or qwen3.
        dtype: fp32 or bf16; None: bf16 if the source is, else fp32.

    Raises:
        ConfigError: another family, a field that the MoE family has no place for, sizes that do not divide.
        CheckpointError: weights that are missing, superfluous or have no place; the folder exists; no space.
    """
    dense, config, record = _configs(source, options)
    entries = entries_of(source)
    layout = FolderLayout(config)
    _check_weights(source, entries, dense, layout)
    default = "bf16" if all(entry.dtype == "BF16" for entry in entries.values()) else "fp32"
    small = {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}
    small[RECORD] = (json.dumps(record, indent=2) + "\n").encode()
    folder = plan_folder(layout, out, source, TYPES[dtype or default], shard_bytes, small)
    halves = 2 if profile_of(config.model_type).names.shared_experts else 1
    return UpcyclePlan(
        source=dense.model_type,
        options=options,
        layout=layout,
        folder=folder,
        entries=entries,
        routers=_routers(layout, options),
        factor=options.granularity / halves,
    )


def upcycle(plan: UpcyclePlan, crew: Crew | None = None) -> Fingerprint:
    """Write what was planned, one expert's matrix in memory at a time. Returns and raises as `write_folder` does."""
    return write_folder(plan.folder, partial(_values, plan), crew)


def _configs(source: Path, options: UpcycleOptions) -> tuple[PretrainedConfig, PretrainedConfig, dict[str, Any]]:
    """The dense model's, the other's, and a record of where each field of that comes from."""
    tree = read_config_file(source, str(source))
    model_type = tree["model_type"]
    if model_type not in TARGETS:
        raise ConfigError(
            f"{source}: model_type ({model_type}) cannot be upcycled to the same function; supported: "
            + ", ".join(f"{name} -> {target.model_type}" for name, target in TARGETS.items())
        )
    if "quantization_config" in tree:
        raise ConfigError(f"{source}: the weights are quantised; give a folder of bf16, fp16 or fp32 weights")
    target, ignored = TARGETS[model_type], {"model_type", "dtype", "torch_dtype", "architectures"}
    dense = build_config(model_type, {name: value for name, value in tree.items() if name not in ignored}, str(source))
    known, carried, problems = known_fields(target.model_type), {}, []
    for name, value in dense.to_dict().items():
        if name in target.without:
            wanted = target.without[name]
            if wanted is not None and value != wanted:
                problems.append(f"{source}: {name} ({value}) in config.json has no place in a {target.model_type}")
        elif name in known and name not in NOT_CARRIED:
            carried[name] = value
    width, parts = dense.intermediate_size, options.granularity
    if width % parts:
        problems.append(f"--granularity ({parts}) must divide intermediate_size ({width}) of {source}")
    if not 1 <= options.copies_per_token <= options.copies:
        problems.append(f"--top-k ({options.copies_per_token}) must lie between 1 and --experts ({options.copies})")
    if problems:
        raise ConfigError("\n".join(problems))
    profile = profile_of(target.model_type)
    chosen = {
        profile.num_experts: options.copies * parts,
        "num_experts_per_tok": options.copies_per_token * parts,
        target.width: width // parts,
    }
    fixed = target.fixed | ({"shared_expert_intermediate_size": width} if profile.names.shared_experts else {})
    config = build_config(target.model_type, carried | chosen | fixed, str(source))
    record = {
        "from_source": {name: value for name, value in carried.items() if name not in chosen | fixed},
        "from_options": chosen,
        "fixed": fixed,
        "options": vars(options),
        "source_model_type": model_type,
    }
    return dense, config, record


def _check_weights(source: Path, entries: dict[str, Entry], dense: PretrainedConfig, layout: FolderLayout) -> None:
    """The folder holds the dense model and each of its tensors has a place, or `CheckpointError` with all others."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense, dtype=torch.float32)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    used = {name for _, name, _ in layout.tensors}
    for block in find_blocks(layout.model):
        used |= {f"{block.name}.{part}_proj.weight" for part in ("gate", "up", "down")}
    family = layout.model.config.model_type
    problems = []
    for name, shape in wanted.items():
        if name not in entries:
            problems.append(f"{name} is missing")
        elif entries[name].shape != shape:
            problems.append(f"{name}: {list(entries[name].shape)} in the folder, {list(shape)} in the model")
        elif entries[name].dtype not in READABLE:
            problems.append(f"{name} is stored as {entries[name].dtype}: weights are read from {', '.join(READABLE)}")
        elif name not in used:
            problems.append(f"{name} has no place in a {family}")
    known = wanted.keys() | tied
    problems += [
        f"{name} is in the folder, and has no place in a {family}"
        for name in sorted(entries.keys() - known)
        if not NEVER_WEIGHTS.search(name)
    ]
    refuse(f"{source} cannot be upcycled to a {family}", problems)


def _routers(layout: FolderLayout, options: UpcycleOptions) -> dict[str, torch.Tensor]:
    """As a run with this seed would draw them, every row then given to a whole virtual group."""
    model, parts = layout.model, options.granularity
    attribute = profile_of(model.config.model_type).names.router
    found = {}
    for block in find_blocks(model):
        modules = {attribute: model.get_submodule(f"{block.name}.{attribute}")}
        for name, value in draw_modules(model, modules, block.name, torch.device("cpu"), options.seed).items():
            found[f"{block.name}.{name}"] = value[::parts].repeat_interleave(parts, 0)
    return found


def _values(plan: UpcyclePlan, logical: Tensor, place: Place) -> Iterator[torch.Tensor]:
    """What lies in a place of the new folder."""
    _, name, expert = logical
    names = profile_of(plan.layout.model.config.model_type).names
    block, _, leaf = name.rpartition(".")
    if expert is not None:
        block = block.removesuffix(f".{names.experts}")
        matrices = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
        parts = [_slice(plan, f"{block}.{matrix}_proj.weight", matrix == "down", expert) for matrix in matrices]
        yield place.take(torch.cat(parts).flatten())
    elif name in plan.routers:
        yield plan.routers[name].flatten()
    elif names.shared_experts_gate and name.endswith(f".{names.shared_experts_gate}.weight"):
        yield torch.zeros(len(place.elements))
    else:
        if names.shared_experts:
            name = name.replace(f".{names.shared_experts}.", ".")
        numel = len(place.elements)
        for start in range(0, numel, CHUNK):
            yield _read(plan.entries[name], start, min(start + CHUNK, numel))


def _slice(plan: UpcyclePlan, name: str, down: bool, expert: int) -> torch.Tensor:
    """One expert's part of a dense matrix: rows, or columns of down_proj; scaled and with its noise."""
    entry, options = plan.entries[name], plan.options
    rows, columns = entry.shape
    width = (columns if down else rows) // options.granularity
    first = expert % options.granularity * width
    if down:
        value = _read(entry, 0, rows * columns).view(rows, columns)[:, first : first + width]
    else:
        value = _read(entry, first * columns, (first + width) * columns).view(width, columns)
    if options.noise:
        generator = torch.Generator().manual_seed(seed_of(options.seed, "upcycle", name, expert))
        spread = options.noise * float(value.std())
        value = value + (torch.randn(value.shape, generator=generator) * spread).to(torch.float32)
    return value * plan.factor if down and plan.factor != 1 else value


def _read(entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Elements of a tensor, flat, in float32 or wider."""
    dtype = READABLE[entry.dtype]
    out = np.empty((stop - start) * dtype.itemsize, dtype=np.uint8)
    entry.read(start * dtype.itemsize, out)
    found = torch.from_numpy(out).view(dtype)
    return found.to(torch.promote_types(dtype, torch.float32))
