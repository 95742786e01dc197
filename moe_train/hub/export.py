"""A checkpoint of any layout -> a Hugging Face folder in the family's own files, a few megabytes in memory at a time.

1. The checkpoint is read: its manifest, then the hash of every file. 2. What each new file holds is worked out from
shapes alone. 3. Nothing is written before the numbers say that it fits. 4. Files are written to `OUT.tmp`, several at
once, and read back: their fingerprint is that of the bytes meant. 5. One rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from moe_train.checkpoint.reshard import verify_source
from moe_train.checkpoint.source import DTYPES, Key, Source, candidates
from moe_train.checkpoint.stream import Buffers
from moe_train.checkpoint.threads import Crew, Meter
from moe_train.config.load import parse_recipe
from moe_train.data.tokenizer import load_tokenizer
from moe_train.disk import sync_folder
from moe_train.errors import CheckpointError, ConfigError, MoeTrainError
from moe_train.hub.fingerprint import Fingerprint, fingerprint
from moe_train.hub.folder import INDEX
from moe_train.hub.layout import FolderLayout, Place, Tensor
from moe_train.hub.tokenizer import TokenizerFiles, tokenizer_files
from moe_train.model import load_model_config
from moe_train.model.profiles import profile_of

SHARD_BYTES = 4 * 10**9
WEIGHTS_PATTERN = "model{suffix}.safetensors"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROOM = 1 << 20
"""For the small files."""


@dataclass(frozen=True, kw_only=True)
class OutTensor:
    """One tensor of the folder. places: with the logical tensor each is of, by row."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[tuple[Tensor, Place], ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """files: names of the tensors in each, in order."""

    source: Source
    passed_over: list[str]
    out: Path
    config: PretrainedConfig
    dtype: torch.dtype
    tensors: dict[str, OutTensor]
    files: dict[str, list[str]]
    index: dict[str, Any] | None
    tokenizer: TokenizerFiles

    @property
    def nbytes(self) -> int:
        headers = sum(len(_header(self, names)) for names in self.files.values())
        return headers + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def temporary(self) -> Path:
        return self.out.with_name(f"{self.out.name}.tmp")


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
    tensors = _out_tensors(layout, chosen)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS_PATTERN,
        max_shard_size=shard_bytes,
    )
    index = None
    if split.is_sharded:
        parameters = sum(p.numel() for p in layout.model.parameters())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
    config.dtype = chosen
    for name, value in profile_of(config.model_type).published.items():
        setattr(config, name, value)
    config.architectures = [type(layout.model).__name__]
    plan = ExportPlan(
        source=found,
        passed_over=passed_over,
        out=out,
        config=config,
        dtype=chosen,
        tensors=tensors,
        # wide elements first: safetensors are aligned
        files={
            name: sorted(held, key=lambda key: -tensors[key].dtype.itemsize)
            for name, held in split.filename_to_tensors.items()
        },
        index=index,
        tokenizer=files,
    )
    _check_destination(plan)
    return plan


def export(plan: ExportPlan, crew: Crew | None = None) -> Fingerprint:
    """Write what was planned. Returns the fingerprint of what lies on disk then.

    Raises `CheckpointError` if the disk is full or fails; nothing is left behind.
    """
    folder, crew = plan.temporary, crew or Crew()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        meter, buffers = Meter(crew, "writing", sum(t.nbytes for t in plan.tensors.values())), Buffers()
        tasks = [partial(_write_weights, plan, name, buffers, meter) for name in plan.files]
        meant: dict[str, str] = {}
        with torch.no_grad():
            crew.run([lambda task=task: meant.update(task()) for task in tasks])
        _write_small_files(plan)
        sync_folder(folder)
        found = fingerprint(folder, crew)
        wrong = sorted(name for name, _ in meant.items() ^ found.digests.items())
        if wrong:
            raise CheckpointError(f"{folder}: what lies on disk of {wrong[0]} differs from what was written")
        if os.path.lexists(plan.out):  # a rename would replace an empty folder
            raise CheckpointError(f"{plan.out} has come to exist meanwhile; nothing was exported")
        folder.rename(plan.out)
        sync_folder(plan.out.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(plan.out.absolute().parent).free
        raise CheckpointError(
            f"{error.filename or folder}: {error.strerror}; {plan.nbytes} bytes needed, {free} free"
        ) from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return found


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


def _out_tensors(layout: FolderLayout, dtype: torch.dtype) -> dict[str, OutTensor]:
    """Every tensor of the folder, in the order of the model."""
    parts: dict[str, list[tuple[Tensor, Place]]] = {name: [] for name in layout.shapes}
    for tensor, logical in layout.tensors.items():
        for place in logical.places:
            parts[place.name].append((tensor, place))
    found = {}
    for name, places in parts.items():
        places.sort(key=lambda item: item[1].row or 0)
        found[name] = OutTensor(
            dtype=layout.dtype_of(places[0][0][1], dtype), shape=layout.shapes[name], places=tuple(places)
        )
    return found


def _check_destination(plan: ExportPlan) -> None:
    if os.path.lexists(plan.out):
        raise CheckpointError(f"{plan.out} exists: an export never overwrites; give another name or remove it")
    if os.path.lexists(plan.temporary):
        raise CheckpointError(
            f"{plan.temporary} exists: another export is writing it, or one was killed; in that case remove it"
        )
    inside = plan.source.directory.resolve()
    if inside in plan.out.resolve().parents:
        raise CheckpointError(f"{plan.out} lies inside of {plan.source.directory}, the source: give another place")
    needed = plan.nbytes + ROOM + sum(map(len, plan.tokenizer.files.values()))
    place = next(parent for parent in plan.out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{plan.out}: {needed} bytes are needed and {free} are free: nothing was written; make room or give "
            "another place"
        )


def _header(plan: ExportPlan, names: list[str]) -> bytes:
    """The bytes of a safetensors file before its data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        tensor = plan.tensors[name]
        code, _ = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        end = begin + tensor.nbytes
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_weights(plan: ExportPlan, name: str, buffers: Buffers, meter: Meter) -> dict[str, str]:
    """One file. Returns the SHA-256 of each tensor in it, of the bytes meant."""
    digests = {}
    with (plan.temporary / name).open("xb") as file:
        file.write(_header(plan, plan.files[name]))
        for key in plan.files[name]:
            tensor, digest = plan.tensors[key], hashlib.sha256()
            for logical, place in tensor.places:
                for value in _values(plan.source, Key(*logical), place, buffers):
                    content = memoryview(value.to(tensor.dtype).contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
                    file.write(content)
                    digest.update(content)
                    meter.advance(len(content))
            digests[key] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def _values(source: Source, key: Key, place: Place, buffers: Buffers) -> Iterator[torch.Tensor]:
    """What lies in a place, from the checkpoint: piece by piece, or all of one expert where its order is another."""
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


def write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_small_files(plan: ExportPlan) -> None:
    folder = plan.temporary
    plan.config.save_pretrained(folder)
    GenerationConfig.from_model_config(plan.config).save_pretrained(folder)
    for name, content in plan.tokenizer.files.items():
        write_synced(folder / name, content)
    if plan.index is not None:
        write_synced(folder / INDEX, (json.dumps(plan.index, indent=2, sort_keys=True) + "\n").encode())
