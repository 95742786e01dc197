"""Logical tensors -> a Hugging Face folder in the family's own files, a few megabytes in memory at a time.

Planned first, from shapes alone, so that everything that can be refused is refused before a byte is written. Files are
written to `OUT.tmp`, several at once, and read back: their fingerprint is that of the bytes meant. Then one rename.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import GenerationConfig, PretrainedConfig

from moe_train.checkpoint.stored import DTYPES
from moe_train.checkpoint.threads import Crew, Meter
from moe_train.disk import sync_folder
from moe_train.errors import CheckpointError
from moe_train.hub.fingerprint import Fingerprint, fingerprint
from moe_train.hub.folder import INDEX
from moe_train.hub.layout import FolderLayout, Place, Tensor
from moe_train.model.profiles import profile_of

SHARD_BYTES = 4 * 10**9
WEIGHTS_PATTERN = "model{suffix}.safetensors"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROOM = 1 << 20
"""For the small files."""

Values = Callable[[Tensor, Place], Iterator[torch.Tensor]]
"""What lies in a place of a logical tensor, in pieces, in order."""


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
class FolderPlan:
    """files: names of the tensors in each, in order. small: contents of other files, by name."""

    out: Path
    config: PretrainedConfig
    tensors: dict[str, OutTensor]
    files: dict[str, list[str]]
    index: dict[str, Any] | None
    small: dict[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        headers = sum(len(_header(self, names)) for names in self.files.values())
        return headers + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def temporary(self) -> Path:
        return self.out.with_name(f"{self.out.name}.tmp")


def plan_folder(
    layout: FolderLayout,
    out: Path,
    source: Path,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    small: dict[str, bytes] | None = None,
) -> FolderPlan:
    """What a folder of this model will hold.

    Args:
        out: the new folder, which must not exist.
        source: where the weights come from; nothing is written there.

    Raises `CheckpointError` if the folder exists or there is no space for it.
    """
    config = layout.model.config
    tensors = _out_tensors(layout, dtype)
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
    config.dtype = dtype
    for name, value in profile_of(config.model_type).published.items():
        setattr(config, name, value)
    config.architectures = [type(layout.model).__name__]
    plan = FolderPlan(
        out=out,
        config=config,
        tensors=tensors,
        # wide elements first: safetensors are aligned
        files={
            name: sorted(held, key=lambda key: -tensors[key].dtype.itemsize)
            for name, held in split.filename_to_tensors.items()
        },
        index=index,
        small=small or {},
    )
    _check_destination(plan, source)
    return plan


def write_folder(plan: FolderPlan, values: Values, crew: Crew | None = None) -> Fingerprint:
    """Write what was planned. Returns the fingerprint of what lies on disk then.

    Raises `CheckpointError` if the disk is full or fails; nothing is left behind.
    """
    folder, crew = plan.temporary, crew or Crew()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        meter = Meter(crew, "writing", sum(t.nbytes for t in plan.tensors.values()))
        tasks = [partial(_write_weights, plan, name, values, meter) for name in plan.files]
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


def _check_destination(plan: FolderPlan, source: Path) -> None:
    if os.path.lexists(plan.out):
        raise CheckpointError(f"{plan.out} exists: an export never overwrites; give another name or remove it")
    if os.path.lexists(plan.temporary):
        raise CheckpointError(
            f"{plan.temporary} exists: another export is writing it, or one was killed; in that case remove it"
        )
    if source.resolve() in plan.out.resolve().parents:
        raise CheckpointError(f"{plan.out} lies inside of {source}, the source: give another place")
    needed = plan.nbytes + ROOM + sum(map(len, plan.small.values()))
    place = next(parent for parent in plan.out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"{plan.out}: {needed} bytes are needed and {free} are free: nothing was written; make room or give "
            "another place"
        )


def _header(plan: FolderPlan, names: list[str]) -> bytes:
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


def _write_weights(plan: FolderPlan, name: str, values: Values, meter: Meter) -> dict[str, str]:
    """One file. Returns the SHA-256 of each tensor in it, of the bytes meant."""
    digests = {}
    with (plan.temporary / name).open("xb") as file:
        file.write(_header(plan, plan.files[name]))
        for key in plan.files[name]:
            tensor, digest = plan.tensors[key], hashlib.sha256()
            for logical, place in tensor.places:
                for value in values(logical, place):
                    content = memoryview(value.to(tensor.dtype).contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
                    file.write(content)
                    digest.update(content)
                    meter.advance(len(content))
            digests[key] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return digests


def write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_small_files(plan: FolderPlan) -> None:
    folder = plan.temporary
    plan.config.save_pretrained(folder)
    GenerationConfig.from_model_config(plan.config).save_pretrained(folder)
    for name, content in plan.small.items():
        write_synced(folder / name, content)
    if plan.index is not None:
        write_synced(folder / INDEX, (json.dumps(plan.index, indent=2, sort_keys=True) + "\n").encode())
