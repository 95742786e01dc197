"""No token id outside the model's vocabulary gets to an embedding, where it would be a crash or somebody else's row."""

import json
import os
import secrets
from pathlib import Path

import numpy as np

from moe_train.data.indexed import IndexedReader
from moe_train.errors import DataError

SCANNED_AT_ONCE = 1 << 22
"""Tokens compared in one piece."""


def check_vocabulary(reader: IndexedReader, vocab_size: int) -> None:
    """Refuse a corpus with an id outside 0..vocab_size-1.

    The whole file is read once (about 1 s per GB from memory); its smallest and largest id are then kept in
    `<prefix>.range.json`, which is believed as long as the `.bin` keeps its size and time. Raises `DataError` naming
    the file, the first offending position, the id there and the vocabulary size.
    """
    if reader.dtype.kind not in "iu":
        raise DataError(f"{reader.bin_path}: holds {reader.dtype.name} numbers, expected integer token ids")
    low, high = _id_range(reader)
    if low < 0 or high >= vocab_size:
        raise outside_error(reader, vocab_size)


def outside_error(reader: IndexedReader, vocab_size: int) -> DataError:
    """The `DataError` for the first id of the file that is outside the vocabulary."""
    for start in range(0, reader.num_tokens, SCANNED_AT_ONCE):
        part = reader.tokens[start : start + SCANNED_AT_ONCE]
        outside = (part < 0) | (part >= vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            return DataError(
                f"{reader.bin_path}: token {start + at} (byte {(start + at) * reader.dtype.itemsize}) has id {part[at]}"
                f", but the vocabulary has {vocab_size} ids (0 to {vocab_size - 1}); raise the model's vocab_size or "
                "prepare the corpus with the model's tokenizer"
            )
    return DataError(f"{reader.bin_path}: changed while it was read; no other program may write to it during training")


def _id_range(reader: IndexedReader) -> tuple[int, int]:
    status = reader.bin_path.stat()
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    beside = Path(f"{reader.prefix}.range.json")
    try:
        known = json.loads(beside.read_text())
        if {key: known[key] for key in stamp} == stamp:
            return int(known["low"]), int(known["high"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, of an older file or damaged: it is only a note, the scan below is the truth
    low, high = 0, 0
    for start in range(0, reader.num_tokens, SCANNED_AT_ONCE):
        part = reader.tokens[start : start + SCANNED_AT_ONCE]
        low, high = min(low, int(part.min())), max(high, int(part.max()))
    _note(beside, {**stamp, "low": low, "high": high})
    return low, high


def _note(path: Path, content: dict[str, int]) -> None:
    temporary = Path(f"{path}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)
    except OSError:
        # a read-only or full data folder is legal for reading: the next start scans again
        temporary.unlink(missing_ok=True)
