"""A checkpoint of DeepSpeed's own -> a Hugging Face folder: the weights of AutoEP and of `deepspeed.moe.layer.MoE`.

DeepSpeed writes pickle. Every file is opened with `weights_only=True`, which builds tensors and plain containers and
runs nothing; optimizer files, which need more, are never opened. What is read (deepspeed 0.19.8):

  mp_rank_00_model_states.pt                      `module`: everything but experts, by name
  layer_<L>_expert_<E>_mp_rank_00_model_states.pt  one expert of the L-th MoE layer

  AutoEP      <block>.router.gate.weight and a second name of it; <block>.experts.w1.<E> gate, w3 up, w2 down
  moe.layer   <block>...deepspeed_moe.gate.wg.weight; ...deepspeed_experts.<E>.gate_proj.weight, up_proj, down_proj
              (or w1, w3, w2), if the experts are gated MLPs

DeepSpeed saves no configuration: a config.json of the family has to be given.
"""

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_train.checkpoint.threads import Crew
from moe_train.config.schema import ModelSection
from moe_train.errors import CheckpointError, ConfigError
from moe_train.hub.fingerprint import Fingerprint
from moe_train.hub.layout import FolderLayout, Place, Tensor
from moe_train.hub.reader import NEVER_WEIGHTS, READABLE, refuse
from moe_train.hub.write import SHARD_BYTES, TYPES, FolderPlan, plan_folder, write_folder
from moe_train.model.build import SwappedBlock, find_blocks
from moe_train.model.family import read_config_file, section_config
from moe_train.model.profiles import profile_of

MAIN = "mp_rank_00_model_states.pt"
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
PLAIN_TAG = re.compile(r"[\w\-][\w.\-]*")
GATE, EXPERTS = ".deepspeed_moe.gate.wg.weight", ".deepspeed_moe.experts.deepspeed_experts."
MATRICES = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
"""Of an expert: the names in use, and what we call them here."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPlan:
    """states: every tensor, mapped from its file, by name; those of expert e as `<block>.<e>.gate`, `.up`, `.down`."""

    source: Path
    kind: str
    layout: FolderLayout
    folder: FolderPlan
    states: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer of the checkpoint. path: of its module there. block: what it is in the Hugging Face model."""

    path: str
    prefix: str
    block: SwappedBlock


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint of DeepSpeed's: one tag of it, or all of them beside `latest`."""
    return (folder / "latest").is_file() or any(folder.glob("*mp_rank_*_model_states.pt"))


def plan_deepspeed(
    source: Path,
    out: Path,
    config: Path,
    tag: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> DeepSpeedPlan:
    """Everything that can be refused without writing.

    Args:
        source: the folder given to DeepSpeed's `save_checkpoint`, or one tag of it.
        config: a config.json of the model's family, or a folder with one.
        tag: which save; None: what `latest` says.
        dtype: fp32 or bf16; None: as the weights are stored, fp32 for any mixture.

    Raises:
        CheckpointError: no whole weights, more than tensors in a file, anything missing or left over.
        ConfigError: the configuration.
    """
    folder = _tag_folder(source, tag)
    _check_files(folder)
    read_config_file(config, f"--config {config}")  # its own words for what it refuses
    layout = FolderLayout(section_config(ModelSection(path=str(config))))
    main = read_states(folder / MAIN)
    module = main.get("module")
    if not isinstance(module, dict) or not all(isinstance(value, torch.Tensor) for value in module.values()):
        raise CheckpointError(f"{folder / MAIN} has no `module` of tensors by name: it holds no weights")
    kind, layers = _layers(folder, main, module, layout)
    states, problems = _named(module, layers, layout)
    problems += _read_experts(folder, layers, states)
    problems += _differences(states, layout)
    refuse(f"{folder} does not hold the weights of this {layout.model.config.model_type}", problems)
    types = {value.dtype for value in states.values()}
    chosen = TYPES[dtype] if dtype else torch.bfloat16 if types == {torch.bfloat16} else torch.float32
    return DeepSpeedPlan(
        source=folder,
        kind=kind,
        layout=layout,
        folder=plan_folder(layout, out, folder, chosen, shard_bytes),
        states=states,
    )


def import_deepspeed(plan: DeepSpeedPlan, crew: Crew | None = None) -> Fingerprint:
    """Write what was planned. Returns and raises as `write_folder` does."""
    return write_folder(plan.folder, partial(_values, plan), crew)


def read_states(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, tensors mapped from disk. Raises `CheckpointError`; runs nothing that is in it."""
    try:
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds more than tensors and plain containers, and reading that would run what is in it: refused, "
            "nothing was run"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(states, dict):
        raise CheckpointError(f"{path} holds a {type(states).__name__}, no states of a model")
    return states


def _tag_folder(source: Path, tag: str | None) -> Path:
    latest = source / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(errors="replace").strip()
    if tag is None:
        if not source.is_dir():
            raise CheckpointError(f"{source} is no folder: give the one that DeepSpeed saved to")
        return source
    if not PLAIN_TAG.fullmatch(tag):
        raise CheckpointError(f"{source}: {tag!r} is no name of a tag; give one with --tag")
    if not (source / tag).is_dir():
        raise CheckpointError(f"{source / tag} is no folder: give the tag of a save with --tag")
    return source / tag


def _check_files(folder: Path) -> None:
    """Layouts whose weights do not lie whole in model files."""
    names = [path.name for path in folder.iterdir()]
    if any(re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name) for name in names):
        raise CheckpointError(
            f"{folder} was saved at ZeRO-3: its weights lie in *_optim_states.pt alone, pickle that can run any "
            "program: not opened; load it in DeepSpeed, save it at ZeRO stage 0, 1 or 2, and import that"
        )
    if any(re.fullmatch(r"layer_\d+-model(_\d+)?(-\w+)?_states\.pt", name) for name in names):
        raise CheckpointError(f"{folder} was saved by DeepSpeed's pipeline, whose names are its own: not supported")
    if any(re.search(r"_mp_rank_(?!00)\d+_model_states\.pt$", f"_{name}") for name in names):
        raise CheckpointError(
            f"{folder} holds weights cut over several tensor-parallel ranks (mp_rank_01 and on): save it from one such "
            "rank and import that"
        )
    if MAIN not in names:
        raise CheckpointError(f"{folder} holds no {MAIN}: it is no whole checkpoint of DeepSpeed's")


def _layers(
    folder: Path, main: dict[str, Any], module: dict[str, Any], layout: FolderLayout
) -> tuple[str, list[MoELayer]]:
    """What kind of MoE layers were saved, and which block each of them is, in the order of their numbers."""
    blocks = find_blocks(layout.model)
    found = main.get("ds_autoep_layers")
    if found:
        described = [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []
        described.sort(key=lambda layer: layer.get("moe_layer_id", 0))
        paths = [(str(layer.get("module_path")), str(layer.get("expert_key_prefix"))) for layer in described]
        kind = "AutoEP"
    else:
        paths = [(key.removesuffix(GATE), "") for key in module if key.endswith(GATE)]
        paths = [(path, f"{path}{EXPERTS}") for path, _ in paths]
        kind = "deepspeed.moe"
        _check_gate(layout)
    if not paths:
        raise CheckpointError(f"{folder} holds neither layers of AutoEP nor of deepspeed.moe: it is of no MoE model")
    if len(paths) != len(blocks):
        raise CheckpointError(
            f"{folder} has {len(paths)} MoE layers, the {layout.model.config.model_type} of the config.json "
            f"{len(blocks)}: give the config.json that the model was made with"
        )
    return kind, [
        MoELayer(path=path, prefix=prefix, block=block) for (path, prefix), block in zip(paths, blocks, strict=True)
    ]


def _check_gate(layout: FolderLayout) -> None:
    """deepspeed.moe's gate is a softmax whose chosen weights are normalised from top-2 on, and left alone for one."""
    config = layout.model.config
    spec = profile_of(config.model_type).spec(config)
    if spec.score != "softmax" or spec.has_bias or spec.scale != 1.0 or spec.normalize != (spec.top_k > 1):
        raise ConfigError(
            f"the {config.model_type} of the config.json weighs experts otherwise than deepspeed.moe does (softmax, "
            f"chosen weights normalised if there are two or more, here top-{spec.top_k}): give one of a family that "
            "does the same, such as mixtral with top-2"
        )


def _named(
    module: dict[str, torch.Tensor], layers: list[MoELayer], layout: FolderLayout
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Everything but experts under the model's own names; second names must hold the same."""
    names = profile_of(layout.model.config.model_type).names
    states: dict[str, torch.Tensor] = {}
    problems = []
    tied = {name for name, _ in layout.model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in layout.model.named_parameters()}
    aliases = dict.fromkeys(tied, "model.embed_tokens.weight")
    for key, value in module.items():
        name = key
        for layer in layers:
            rest = key.removeprefix(f"{layer.path}.")
            if rest != key:
                name = f"{layer.block.name}.{_in_block(rest, names.router, names.bias)}"
        name = aliases.get(name, name)
        if NEVER_WEIGHTS.search(name):
            continue
        if name in states:
            if not torch.equal(states[name], value):
                problems.append(f"{key} differs from {name}, of which it is a second name")
            continue
        states[name] = value
    return states, problems


def _in_block(rest: str, router: str, bias: str | None) -> str:
    """A name in an MoE layer as the family has it."""
    return {
        "router.gate.weight": f"{router}.weight",
        f"{router}.gate.weight": f"{router}.weight",
        GATE.removeprefix("."): f"{router}.weight",
        "router.e_score_correction_bias": f"{router}.{bias}",
        f"{router}.e_score_correction_bias": f"{router}.{bias}",
    }.get(rest, rest)


def _read_experts(folder: Path, layers: list[MoELayer], states: dict[str, torch.Tensor]) -> list[str]:
    """Adds the experts of every expert file. Returns what no layer has a place for."""
    problems = []
    for path in sorted(folder.glob("layer_*_expert_*_model_states.pt")):
        matched = EXPERT_FILE.fullmatch(path.name)
        number, expert = (int(matched[1]), int(matched[2])) if matched else (len(layers), 0)
        if number >= len(layers):
            problems.append(f"{path.name} is of no layer of the model")
            continue
        layer = layers[number]
        for key, value in read_states(path).items():
            inner = key.removeprefix(layer.prefix)
            parts = [part for part in inner.split(".") if part not in ("", str(expert), "weight")]
            matrix = MATRICES.get(parts[0]) if len(parts) == 1 and inner != key else None
            if matrix is None or not isinstance(value, torch.Tensor):
                problems.append(f"{key} in {path.name} is no part of a gated expert")
                continue
            states[f"{layer.block.name}.{expert}.{matrix}"] = value
    return problems


def _differences(states: dict[str, torch.Tensor], layout: FolderLayout) -> list[str]:
    """Whatever is missing, left over, or of another shape or type."""
    expected: dict[str, tuple[int, ...]] = {}
    for (_, name, expert), logical in layout.tensors.items():
        if expert is None:
            expected[name] = logical.shape
            continue
        block, leaf = _block_and_leaf(name)
        rows, columns = logical.shape
        matrices = {"gate": (rows // 2, columns), "up": (rows // 2, columns)}
        if leaf == "down_proj":
            matrices = {"down": (rows, columns)}
        expected |= {f"{block}.{expert}.{matrix}": shape for matrix, shape in matrices.items()}
    problems = [f"{name} is missing" for name in expected if name not in states]
    problems += [f"{name} is in the checkpoint, not in the model" for name in states if name not in expected]
    for name in expected.keys() & states.keys():
        found = states[name]
        if tuple(found.shape) != expected[name]:
            problems.append(f"{name}: {list(found.shape)} in the checkpoint, {list(expected[name])} in the model")
        elif found.dtype not in READABLE.values():
            problems.append(f"{name} is stored as {found.dtype}")
    return problems


def _block_and_leaf(name: str) -> tuple[str, str]:
    experts, _, leaf = name.rpartition(".")
    return experts.rpartition(".")[0], leaf


def _values(plan: DeepSpeedPlan, logical: Tensor, place: Place) -> Iterator[torch.Tensor]:
    """What lies in a place of the new folder."""
    _, name, expert = logical
    if expert is None:
        yield place.take(plan.states[name].flatten())
        return
    block, leaf = _block_and_leaf(name)
    matrices = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
    yield place.take(torch.cat([plan.states[f"{block}.{expert}.{matrix}"] for matrix in matrices]).flatten())
