"""Text files, JSONL and source trees -> a `.bin`/`.idx` pair."""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.config.schema import CorpusSection, DataSection
from moe_train.data.files import exclusive_lock, read_error
from moe_train.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from moe_train.data.tokenizer import Tokenizer
from moe_train.errors import DataError

STDLIB = "python-stdlib"
STDLIB_GLOB = "**/*.py"
NOT_STDLIB = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
}
"""Folders under the standard library that hold other people's packages, tests or programs."""
BLOCK_BYTES = 8 << 20
"""Text encoded in one piece; a larger file becomes one document of several sequences."""
FORMAT = 1
"""Part of every cache name: raise it when the same source would be prepared differently."""

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file to read: its path, its name relative to the source, its size in bytes and its time in ns."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` wrote; `num_bytes` is the text read."""

    prefix: Path
    num_documents: int
    num_tokens: int
    num_bytes: int


class Block(NamedTuple):
    """A piece of a document, and how many bytes of its file were read for it."""

    text: str | bytes
    ends_document: bool
    num_bytes: int


def prepare(
    source: str,
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    glob: str = "**/*",
    jsonl_field: str = "text",
    progress: Progress | None = None,
) -> Prepared:
    """Write `<output_prefix>.bin` and `.idx` from a text file, a .jsonl file, a folder, or `python-stdlib`.

    One document per file, or per line of a .jsonl file; each ends with the tokenizer's end-of-document id. Empty ones
    are skipped. Raises `DataError` for a source that is missing, empty or damaged, and for a full disk.
    """
    own = {bin_path(output_prefix).resolve(), idx_path(output_prefix).resolve()}
    files = [file for file in source_files(source, glob) if file.path.resolve() not in own]
    total, done = sum(file.size for file in files), 0
    with IndexedWriter(output_prefix, token_dtype(tokenizer.vocab_size)) as writer:
        encoder = _Encoder(writer, tokenizer)
        for file in files:
            for block in _blocks(file.path, jsonl_field):
                encoder.add(block)
                done += block.num_bytes
                if progress is not None:
                    progress(min(done, total), total)
        encoder.flush()
        if progress is not None:
            progress(total, total)
        if not writer.num_documents:
            raise DataError(
                f"{source}: the corpus is empty: {len(files)} files (glob {glob}) hold {total} bytes and no text"
            )
        return Prepared(
            prefix=Path(output_prefix), num_documents=writer.num_documents, num_tokens=writer.num_tokens, num_bytes=done
        )


def ensure_prepared(
    corpus: CorpusSection, data: DataSection, tokenizer: Tokenizer, progress: Progress | None = None
) -> Path:
    """The prefix of the corpus, prepared into `data.cache_dir` if it is not there yet.

    The name holds a hash of the files' names, sizes and times and of all settings, so a changed source is a new name.
    Any number of processes may call at once: one prepares, the others wait for it and find it done.
    """
    if corpus.prefix is not None:
        return Path(corpus.prefix)
    source = corpus.text or ""
    files = source_files(source, corpus.glob)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(source).name) or "corpus"
    prefix = Path(data.cache_dir) / f"{stem}-{_cache_key(corpus, files, tokenizer)}"
    if _is_there(prefix):
        return prefix
    with exclusive_lock(Path(f"{prefix}.lock")):
        if not _is_there(prefix):
            # left by a process that was killed; whoever wrote them held this lock, so nobody is writing now
            for stale in prefix.parent.glob(f"{prefix.name}.*.tmp"):
                stale.unlink(missing_ok=True)
            prepare(source, prefix, tokenizer, glob=corpus.glob, jsonl_field=corpus.jsonl_field, progress=progress)
    return prefix


def source_files(source: str, glob: str) -> list[SourceFile]:
    """The files of a source, sorted by relative path; hidden files and `__pycache__` are left out.

    Raises `DataError` when there is no such source or no file matches.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if source == STDLIB else Path(source)
    if root.is_file():
        names = [""]
    elif not root.is_dir():
        raise DataError(f"{source}: no such file or folder; set data.corpora text to one, or to {STDLIB}")
    else:
        names = _stdlib_names(root) if source == STDLIB else _matching_names(root, glob)
    files = []
    for name in sorted(names):
        path = root / name if name else root
        try:
            status = path.stat()
        except OSError as error:
            raise read_error(path, error) from None
        files.append(SourceFile(path=path, name=name, size=status.st_size, mtime_ns=status.st_mtime_ns))
    if not files:
        raise DataError(f"{source}: the corpus is empty: no file matches {STDLIB_GLOB if source == STDLIB else glob}")
    return files


def _stdlib_names(root: Path) -> list[str]:
    """The standard library's own modules, as relative paths; walks by hand so as not to enter site-packages."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in NOT_STDLIB]
        modules = [Path(folder, name) for name in files if name.endswith(".py")]
        # distributions link some modules into /etc, not always to something
        names += [path.relative_to(root).as_posix() for path in modules if path.is_file()]
    return names


def _matching_names(root: Path, glob: str) -> list[str]:
    try:
        names = [path.relative_to(root) for path in root.glob(glob) if path.is_file()]
    except (ValueError, NotImplementedError) as error:  # an empty, absolute or outward pattern
        raise DataError(f"{root}: glob ({glob}) is not a pattern inside the folder: {error}") from None
    except OSError as error:
        raise read_error(root, error) from None
    return [
        name.as_posix()
        for name in names
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    ]


def _cache_key(corpus: CorpusSection, files: list[SourceFile], tokenizer: Tokenizer) -> str:
    glob = STDLIB_GLOB if corpus.text == STDLIB else corpus.glob
    listing = [(file.name, file.size, file.mtime_ns) for file in files]
    parts = [FORMAT, str(files[0].path.resolve()), glob, corpus.jsonl_field, tokenizer.identity, listing]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_there(prefix: Path) -> bool:
    return idx_path(prefix).is_file() and bin_path(prefix).is_file()


class _Encoder:
    """Collects blocks, encodes about `BLOCK_BYTES` of them at a time, and writes documents."""

    def __init__(self, writer: IndexedWriter, tokenizer: Tokenizer):
        self._writer = writer
        self._tokenizer = tokenizer
        self._pending: list[Block] = []
        self._pending_bytes = 0
        self._in_document = False  # the current document already has tokens

    def add(self, block: Block) -> None:
        self._pending.append(block)
        self._pending_bytes += block.num_bytes
        if self._pending_bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        ids = self._tokenizer.encode_many([block.text for block in self._pending])
        for block, tokens in zip(self._pending, ids, strict=True):
            if not len(tokens) and not self._in_document:
                continue  # a text that the tokenizer's normalizer empties is no document
            if block.ends_document:
                tokens = np.append(tokens, np.asarray(self._tokenizer.eod_id, dtype=tokens.dtype))
            self._writer.add_sequence(tokens)
            self._in_document = not block.ends_document
            if block.ends_document:
                self._writer.end_document()
        self._pending, self._pending_bytes = [], 0


def _blocks(path: Path, jsonl_field: str) -> Iterator[Block]:
    try:
        yield from _jsonl_blocks(path, jsonl_field) if path.suffix == ".jsonl" else _text_blocks(path)
    except OSError as error:
        raise read_error(path, error) from None


def _text_blocks(path: Path) -> Iterator[Block]:
    with path.open("rb") as stream:
        current = stream.read(BLOCK_BYTES)
        while current:
            following = stream.read(BLOCK_BYTES)
            cut = _cut(current) if following else len(current)
            yield Block(current[:cut], not following, cut)
            current = current[cut:] + following


def _cut(data: bytes) -> int:
    """Where to cut: after the last line end, else before the last character, so that none is split."""
    newline = data.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    cut = len(data) - 1
    while cut > 1 and cut > len(data) - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _jsonl_blocks(path: Path, field: str) -> Iterator[Block]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = _jsonl_text(line, field, f"{path}:{number}") if line.strip() else ""
            if text:
                yield Block(text, True, len(line))


def _jsonl_text(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object on one line: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if field not in row:
        raise DataError(f"{where}: no field {field}; found {', '.join(map(repr, row)) or 'none'}; set jsonl_field")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field} must be text, found {type(row[field]).__name__}")
    return row[field]
