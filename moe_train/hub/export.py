"""A checkpoint of any layout -> a Hugging Face folder. Every file of it is hashed before anything is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from moe_train.checkpoint.reshard import verify_source
from moe_train.checkpoint.source import Key, Source, candidates
from moe_train.checkpoint.stream import Buffers
from moe_train.checkpoint.threads import Crew
from moe_train.config.load import parse_recipe
from moe_train.data.tokenizer import load_tokenizer
from moe_train.errors import CheckpointError, ConfigError, MoeTrainError
from moe_train.hub.fingerprint import Fingerprint
from moe_train.hub.layout import FolderLayout, Place, Tensor
from moe_train.hub.tokenizer import TokenizerFiles, tokenizer_files
from moe_train.hub.write import SHARD_BYTES, TYPES, FolderPlan, plan_folder, write_folder
from moe_train.model import load_model_config


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """passed_over: why newer checkpoints are not the source. differs: where the folder's model, which chooses the top k
    of every token, is not what was trained."""

    source: Source
    passed_over: list[str]
    differs: list[str]
    folder: FolderPlan
    tokenizer: TokenizerFiles


def plan_export(
    source: Path,
    out: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
    crew: Crew | None = None,
) -> ExportPlan:
    """Everything that can be refused without writing.

    Args:
        source: a checkpoint, or a folder of them: the newest that is whole.
        out: the new folder, which must not exist.
        dtype: fp32 or bf16; None: what the run computes in (fp32 for fp16).
        tokenizer: in place of the recipe's `data.tokenizer`; `none`: write none.

    Raises:
        CheckpointError: the source is damaged or of a model that no stock model equals, the folder exists, no space.
        ConfigError: a tokenizer or configuration that cannot be read.
    """
    found, passed_over = newest_whole(source, crew or Crew())
    manifest = found.manifest
    hashed = manifest.recipe.get("moe", {}).get("hash_layers", 0)
    if hashed:
        raise CheckpointError(
            f"{found.directory}: its first {hashed} MoE layers route by token id (moe.hash_layers), which no "
            f"{manifest.model_type} of transformers does: an export would compute other numbers"
        )
    files = tokenizer_files(tokenizer or manifest.recipe["data"]["tokenizer"])
    config = export_config(manifest.recipe, manifest.state.get("model_config"), files)
    chosen = TYPES[dtype or ("bf16" if manifest.recipe["precision"]["compute"] == "bf16" else "fp32")]
    layout = FolderLayout(config)
    _check_tensors(found, layout)
    folder = plan_folder(layout, out, found.directory, chosen, shard_bytes, files.files)
    differs = trained_otherwise(manifest.recipe.get("moe", {}))
    return ExportPlan(source=found, passed_over=passed_over, differs=differs, folder=folder, tokenizer=files)


def trained_otherwise(moe: dict[str, Any]) -> list[str]:
    """What a recipe's section `moe` says of the choice of experts in training that transformers' models do not do."""
    found = []
    if moe.get("force_load") is not None:
        found.append("moe.force_load: tokens went where they were told, so the router has learnt nothing")
    if moe.get("router", "top_k") != "top_k":
        found.append(f"moe.router ({moe['router']}): experts were not the top k of each token")
    if moe.get("capacity_factor") is not None:
        found.append(f"moe.capacity_factor ({moe['capacity_factor']:g}): experts dropped tokens beyond it")
    return found


def export(plan: ExportPlan, crew: Crew | None = None) -> Fingerprint:
    """Write what was planned. Returns and raises as `write_folder` does."""
    return write_folder(plan.folder, partial(_values, plan.source, Buffers()), crew)


def newest_whole(path: Path, crew: Crew) -> tuple[Source, list[str]]:
    """The checkpoint that a path means, every file hashed, and why newer ones were passed over."""
    passed_over: list[str] = []
    folders = candidates(path)
    for folder in folders:
        try:
            source = Source(folder)
            verify_source(source, Crew(crew.jobs, crew.report))  # a crew that has failed once does no more work
        except CheckpointError as error:
            if len(folders) == 1:
                raise
            passed_over.append(str(error))
            continue
        return source, passed_over
    raise CheckpointError(f"none of the {len(folders)} checkpoints in {path} is whole: {passed_over[0]}")


def export_config(recipe: dict[str, Any], saved: dict[str, Any] | None, tokenizer: TokenizerFiles) -> PretrainedConfig:
    """The family's configuration as the run resolved it, without what is only meant for training.

    Args:
        saved: as the checkpoint holds it; None, in an older one: resolved anew from the recipe.
    """
    if saved is not None:
        fields = dict(saved)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        try:
            parsed = parse_recipe(recipe)
            config = load_model_config(parsed, load_tokenizer(parsed.data.tokenizer).vocab_size)
        except MoeTrainError as error:
            raise ConfigError(
                f"the checkpoint holds no configuration of its model, and its recipe's cannot be read here: {error}"
            ) from None
    config.use_cache = True
    if tokenizer.is_byte:  # a family's default ids are bytes here
        config.bos_token_id = None
    if tokenizer.eod_id is not None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if tokenizer.eod_id not in ends:
            config.eos_token_id = tokenizer.eod_id
    return config


def _check_tensors(source: Source, layout: FolderLayout) -> None:
    """The checkpoint holds this model's weights, all and no others. Raises `CheckpointError` with what differs."""
    stored: dict[Tensor, tuple[int, ...]] = {
        (key.kind, key.name, key.expert): tensor.shape
        for key, tensor in source.tensors.items()
        if key.kind in ("master", "buffer")
    }
    problems = [f"{Key(*tensor)} is not in the checkpoint" for tensor in layout.tensors if tensor not in stored]
    problems += [f"{Key(*tensor)} is not in the model" for tensor in stored if tensor not in layout.tensors]
    problems += [
        f"{Key(*tensor)}: {list(stored[tensor])} in the checkpoint, {list(logical.shape)} in the model"
        for tensor, logical in layout.tensors.items()
        if stored.get(tensor, logical.shape) != logical.shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{source.directory} does not hold the {layout.model.config.model_type} that its recipe describes:\n  "
            + "\n  ".join(problems[:10]) + more
        )  # fmt: skip


def _values(source: Source, buffers: Buffers, logical: Tensor, place: Place) -> Iterator[torch.Tensor]:
    """What lies in a place, from the checkpoint: piece by piece, or all of one expert where its order is another."""
    key = Key(*logical)
    tensor = source.tensors[key]
    dtype = getattr(torch, tensor.dtype)
    runs = source.runs(tensor.shape, None)
    if not isinstance(place.elements, range):
        out = np.empty(tensor.numel * tensor.itemsize, dtype=np.uint8)
        source.read(key, runs, 0, tensor.numel, out, buffers.scratch)
        yield place.take(torch.from_numpy(out).view(dtype))
        return
    step = len(buffers.out) // tensor.itemsize
    for start in range(place.elements.start, place.elements.stop, step):
        stop = min(start + step, place.elements.stop)
        out = buffers.out[: (stop - start) * tensor.itemsize]
        source.read(key, runs, start, stop, out, buffers.scratch)
        yield torch.from_numpy(out).view(dtype)
