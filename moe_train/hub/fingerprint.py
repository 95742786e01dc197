"""One hash over all that a Hugging Face folder holds: equal for equal weights, however they are spread over files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from moe_train.checkpoint.threads import Crew, Meter
from moe_train.config.schema import ModelSection
from moe_train.hub.folder import Entry, entries_of
from moe_train.hub.layout import FolderLayout
from moe_train.hub.reader import check_folder
from moe_train.model.family import OWNED_CONFIG_FIELDS, known_fields, read_config_file, section_config
from moe_train.model.profiles import profile_of

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Of all tensors of a folder.

    sha256: over a line for each tensor in the order of names: name, type, shape, SHA-256 of its bytes.
    digests: the last of these by name.
    """

    tensors: int
    nbytes: int
    files: int
    dtypes: tuple[str, ...]
    sha256: str
    digests: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        files = f"{self.files} files" if self.files > 1 else "1 file"
        return (
            f"{self.tensors} tensors, {self.nbytes} bytes of {' and '.join(self.dtypes)} in {files}; "
            f"sha256 over all {self.sha256}"
        )


def fingerprint(folder: Path, crew: Crew | None = None) -> Fingerprint:
    """Reads everything, a few megabytes at a time. Raises as `entries_of` does."""
    crew, entries = crew or Crew(), entries_of(folder)
    files: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.path, []).append(name)
    meter = Meter(crew, f"hashing {folder.name}", sum(entry.nbytes for entry in entries.values()))
    digests: dict[str, str] = {}

    def hash_file(names: list[str]) -> None:
        for name in names:
            digest = hashlib.sha256()
            for chunk in _chunks(entries[name]):
                digest.update(chunk)
                meter.advance(len(chunk))
            digests[name] = digest.hexdigest()

    crew.run([partial(hash_file, names) for names in files.values()])
    whole = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        whole.update(f"{name} {entry.dtype} {list(entry.shape)} {digests[name]}\n".encode())
    return Fingerprint(
        tensors=len(entries),
        nbytes=sum(entry.nbytes for entry in entries.values()),
        files=len(files),
        dtypes=tuple(sorted({entry.dtype for entry in entries.values()})),
        sha256=whole.hexdigest(),
        digests=digests,
    )


def _chunks(entry: Entry) -> Iterator[memoryview]:
    buffer = np.empty(min(CHUNK_BYTES, entry.nbytes), dtype=np.uint8)
    for start in range(0, entry.nbytes, CHUNK_BYTES):
        out = buffer[: entry.nbytes - start]
        entry.read(start, out)
        yield memoryview(out)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A folder that a run can start from. ignored: fields of its config.json that transformers does not know."""

    layout: FolderLayout
    fingerprint: Fingerprint
    ignored: tuple[str, ...]


def inspect_folder(folder: Path, crew: Crew | None = None) -> Inspection:
    """Whether a run could start from a folder as `model.weights`: its config.json, its headers and all its bytes.

    Raises `ConfigError` for the configuration, `CheckpointError` for the weights.
    """
    layout = FolderLayout(section_config(ModelSection(weights=str(folder))))
    check_folder(folder, layout)
    family = layout.model.config.model_type
    known = known_fields(family) | {*OWNED_CONFIG_FIELDS, *profile_of(family).published}
    ignored = read_config_file(folder, str(folder)).keys() - known
    return Inspection(layout=layout, fingerprint=fingerprint(folder, crew), ignored=tuple(sorted(ignored)))
