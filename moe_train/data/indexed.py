"""Megatron's `.bin`/`.idx` pair: a flat file of token ids and an index of its sequences and documents.

`.idx`, little-endian:

    9 bytes   MMIDIDX\\0\\0
    uint64    version, 1
    uint8     dtype code of the ids in `.bin`
    uint64    S, number of sequences
    uint64    D + 1, number of documents + 1
    int32  S  length of each sequence in tokens
    int64  S  byte at which each sequence starts in `.bin`
    int64 D+1 first sequence of each document, and S
    int8   S  mode of each sequence (multimodal sets only; not used here)

A document may span several sequences. Sequences follow each other without gaps, so a document is a
range of tokens of the flat file, which is all that the rest of this room uses.
"""

import contextlib
import os
import secrets
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn

import numpy as np

from moe_train.data.files import read_error, write_error
from moe_train.disk import sync_folder
from moe_train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CHECKED_AT_ONCE = 1 << 20
"""Sequences whose pointers are compared in one piece."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of Megatron's two id types: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file of token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of sequence and document boundaries."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes a pair under temporary names and moves it into place, `.idx` last, when the `with` block ends well.

    On any failure (a full disk, Ctrl-C, an error of the caller) nothing is left behind. `dtype` is one of
    Megatron's eight. Raises `DataError` for ids that do not fit it, and for every error of the disk.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        # pid and random part: two writers of one prefix must not share a temporary
        tag = f"{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._temporary = {path: Path(f"{path}.{tag}") for path in (bin_path(prefix), idx_path(prefix))}
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._stream: BinaryIO | None = None

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @property
    def num_tokens(self) -> int:
        return sum(self._lengths)

    def __enter__(self) -> "IndexedWriter":
        path = bin_path(self.prefix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._temporary[path].open("xb", buffering=1 << 20)
        except OSError as error:
            raise write_error(path, error) from None
        return self

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append a sequence of the current document; `tokens` is [length] of integers."""
        assert self._stream is not None, "used outside its with block"
        try:
            self._stream.write(self._convert(tokens).tobytes())
        except OSError as error:
            raise write_error(bin_path(self.prefix), error) from None
        self._lengths.append(len(tokens))

    def end_document(self) -> None:
        """All sequences since the last call form one document."""
        self._documents.append(len(self._lengths))

    def add_document(self, tokens: np.ndarray) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._remove_temporaries()

    def _convert(self, tokens: np.ndarray) -> np.ndarray:
        # a cast wraps silently: 65536 would become 0 in uint16
        if len(tokens) and tokens.dtype != self.dtype and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < limits.min or high > limits.max:
                wrong = low if low < limits.min else high
                raise DataError(
                    f"{bin_path(self.prefix)}: token id {wrong} does not fit {self.dtype.name} "
                    f"({limits.min} to {limits.max}), the type chosen from the tokenizer's vocabulary"
                )
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def _commit(self) -> None:
        assert self._stream is not None, "used outside its with block"
        ids, index = self._temporary
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            with self._temporary[index].open("xb") as stream:
                self._write_index(stream)
                stream.flush()
                os.fsync(stream.fileno())
            # an old index must never stand beside new ids, so it goes first
            index.unlink(missing_ok=True)
            os.replace(self._temporary[ids], ids)
            try:
                os.replace(self._temporary[index], index)
            except BaseException:
                ids.unlink(missing_ok=True)
                raise
            sync_folder(index.parent)
        except OSError as error:
            raise write_error(bin_path(self.prefix), error) from None

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        stream.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._documents)))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(pointers.tobytes())
        stream.write(np.frombuffer(self._documents, dtype=np.int64).astype("<i8").tobytes())

    def _remove_temporaries(self) -> None:
        if self._stream is not None:
            # closing flushes what a full disk has already refused; the error was raised where it happened
            with contextlib.suppress(OSError):
                self._stream.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


class IndexedReader:
    """A pair mapped into memory, written by this package or by Megatron-LM, and checked when opened.

    `tokens` is the flat [num_tokens] map; document d is `tokens[document_offsets[d]:document_offsets[d + 1]]`.
    Raises `DataError` when a file is missing, damaged, or disagrees with the other.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self.idx_path, self.bin_path = idx_path(prefix), bin_path(prefix)
        try:
            for path in (self.idx_path, self.bin_path):
                if not path.is_file():
                    raise DataError(f"{path}: no such file; a corpus prefix is the path without .bin and .idx")
            self._open_index()
            num_bytes = self._check_pointers()
            self._check_documents()
            self._check_ids(num_bytes)
            self.num_tokens = num_bytes // self.dtype.itemsize
            if not self.num_tokens:
                self._refuse(f"{self.num_documents} documents without a single token", path=self.bin_path)
            self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        except OSError as error:
            raise read_error(Path(error.filename or self.idx_path), error) from None
        self.document_offsets = self._document_offsets()

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def document(self, index: int) -> np.ndarray:
        """The token ids of a document, [length], in the file's dtype."""
        return self.tokens[self.document_offsets[index] : self.document_offsets[index + 1]]

    def _refuse(self, what: str, path: Path | None = None) -> NoReturn:
        raise DataError(f"{path or self.idx_path}: {what}; delete both files and prepare or copy the corpus again")

    def _open_index(self) -> None:
        with self.idx_path.open("rb") as stream:
            head = stream.read(HEADER.size)
            found = os.fstat(stream.fileno()).st_size
        if not MAGIC.startswith(head[: len(MAGIC)]):
            self._refuse(f"not a Megatron index: expected {MAGIC!r} at byte 0, found {head[: len(MAGIC)]!r}")
        if len(head) < HEADER.size:
            self._refuse(f"truncated: expected {HEADER.size} bytes of header, found {len(head)}")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack(head)
        if version != VERSION:
            self._refuse(f"expected version {VERSION} at byte 9, found {version}")
        if code not in DTYPES:
            self._refuse(f"expected a dtype code from 1 to 8 at byte 17, found {code}")
        if num_boundaries < 2 or not num_sequences:
            self._refuse(
                f"the corpus is empty: {num_sequences} sequences (byte 18), "
                f"{max(num_boundaries - 1, 0)} documents (byte 26)"
            )
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if found not in (expected, expected + num_sequences):  # the second with one mode a sequence
            state = "truncated" if found < expected else "too long"
            self._refuse(
                f"{state}: expected {expected} bytes for {num_sequences} sequences and "
                f"{num_boundaries - 1} documents, found {found}"
            )
        self.dtype = np.dtype(DTYPES[code])
        data = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        at = HEADER.size
        self.sequence_lengths = np.frombuffer(data, "<i4", num_sequences, at)
        self.sequence_pointers = np.frombuffer(data, "<i8", num_sequences, at + 4 * num_sequences)
        self.document_indices = np.frombuffer(data, "<i8", num_boundaries, at + 12 * num_sequences)

    def _check_pointers(self) -> int:
        """The bytes that the sequences take, each starting where the one before ends."""
        position = 0
        for start in range(0, self.num_sequences, CHECKED_AT_ONCE):
            part = slice(start, start + CHECKED_AT_ONCE)
            sizes = self.sequence_lengths[part].astype(np.int64) * self.dtype.itemsize
            if sizes.min() < 0:
                wrong = start + int(np.argmax(sizes < 0))
                self._refuse(f"sequence {wrong} has length {self.sequence_lengths[wrong]}, expected 0 or more")
            expected = position + np.cumsum(sizes) - sizes
            differs = self.sequence_pointers[part] != expected
            if differs.any():
                wrong = int(np.argmax(differs))
                self._refuse(
                    f"sequence {start + wrong} is said to start at byte {self.sequence_pointers[start + wrong]} of the "
                    f".bin, expected {expected[wrong]} from the lengths before it"
                )
            position += int(sizes.sum())
        return position

    def _check_documents(self) -> None:
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if first != 0 or last != self.num_sequences:
            self._refuse(
                f"the documents cover sequences {first} to {last}, expected 0 to {self.num_sequences} (all sequences)"
            )
        falling = np.flatnonzero(self.document_indices[1:] < self.document_indices[:-1])
        if falling.size:
            at = int(falling[0])
            self._refuse(
                f"document {at} ends at sequence {self.document_indices[at + 1]}, "
                f"expected {self.document_indices[at]} (its first) or more"
            )

    def _check_ids(self, num_bytes: int) -> None:
        found = self.bin_path.stat().st_size
        if found != num_bytes:
            state = "truncated" if found < num_bytes else "longer than its index"
            self._refuse(f"{state}: {self.idx_path.name} describes {num_bytes} bytes, found {found}", self.bin_path)

    def _document_offsets(self) -> np.ndarray:
        offsets = np.full(self.num_documents + 1, self.num_tokens, dtype=np.int64)
        # trailing documents may be empty and then start at S, past the last pointer
        inside = self.document_indices < self.num_sequences
        offsets[inside] = self.sequence_pointers[self.document_indices[inside]] // self.dtype.itemsize
        return offsets
