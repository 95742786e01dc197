"""The `.bin`/`.idx` pair against Megatron's own reader and writer, and against every kind of damage."""

import os
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from moe_train.data.indexed import IndexedReader, IndexedWriter, token_dtype
from moe_train.errors import DataError

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
DOCUMENTS = [[[5, 1, 2], [7]], [[100, 101, 102, 103]], [[0, 1], [], [2, 3, 4]], [[9]]]
"""Documents of sequences of ids."""
FLAT = [token for document in DOCUMENTS for sequence in document for token in sequence]


def write_ours(prefix: Path, documents=DOCUMENTS, dtype="uint16") -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(np.array(sequence, dtype=np.int64))
            writer.end_document()
    return prefix


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(tmp_path, dtype):
    theirs = IndexedDataset(str(write_ours(tmp_path / "c", dtype=dtype)))
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    assert [np.asarray(theirs[i]).tolist() for i in range(len(theirs))] == sequences
    assert theirs.index.dtype == np.dtype(dtype)
    assert theirs.document_indices.tolist() == [0, 2, 3, 6, 7]


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_megatrons(tmp_path, dtype, multimodal):
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=getattr(np, dtype), multimodal=multimodal)
    for document in DOCUMENTS:
        for sequence in document:
            builder.add_item(torch.tensor(sequence), mode=1)
        builder.end_document()
    builder.finalize(str(tmp_path / "c.idx"))
    reader = IndexedReader(tmp_path / "c")
    assert reader.dtype == np.dtype(dtype)
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == [list(chain(*d)) for d in DOCUMENTS]
    assert reader.tokens.tolist() == FLAT
    assert reader.sequence_lengths.tolist() == [3, 1, 4, 2, 0, 3, 1]


def test_both_writers_write_the_same_bytes(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(list(chain(*document))), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_ours(tmp_path / "ours")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_dtype_follows_the_vocabulary():
    assert token_dtype(257) == np.uint16
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_an_id_that_does_not_fit_is_refused_not_wrapped(tmp_path):
    with pytest.raises(DataError, match=r"c\.bin: token id 65536 does not fit uint16"):
        write_ours(tmp_path / "c", [[[65536]]])
    with pytest.raises(DataError, match="token id -1 "):
        write_ours(tmp_path / "c", [[[-1]]])
    assert list(tmp_path.iterdir()) == []


def write_and_raise(prefix: Path, error: type[BaseException]) -> None:
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        writer.add_document(np.arange(50))
        assert [path.suffix for path in prefix.parent.iterdir()].count(".tmp") == 1
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        write_and_raise(tmp_path / "c", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_pair_readable(tmp_path):
    write_ours(tmp_path / "c")
    with pytest.raises(RuntimeError):
        write_and_raise(tmp_path / "c", RuntimeError)
    assert IndexedReader(tmp_path / "c").tokens.tolist() == FLAT


def test_index_is_moved_last(tmp_path, monkeypatch):
    """Killed between the two moves, no index stands beside ids that are not its own."""
    write_ours(tmp_path / "c", [[[1]]])
    seen = []

    def replace(source, target, really=os.replace):
        seen.append((Path(target).suffix, (tmp_path / "c.idx").exists()))
        really(source, target)

    monkeypatch.setattr("moe_train.data.indexed.os.replace", replace)
    write_ours(tmp_path / "c")
    assert seen == [(".bin", False), (".idx", False)]
    assert IndexedReader(tmp_path / "c").tokens.tolist() == FLAT


def damage(prefix: Path, ending: str, offset: int, content: bytes) -> None:
    with Path(f"{prefix}{ending}").open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


S, D = 7, 4  # sequences and documents of DOCUMENTS
POINTERS, BOUNDARIES = 34 + 4 * S, 34 + 12 * S


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"XXIDIDX\0\0", r"not a Megatron index: expected b'MMIDIDX.*found b'XXIDIDX"),
        (9, struct.pack("<Q", 2), "expected version 1 at byte 9, found 2"),
        (17, b"\x00", "dtype code from 1 to 8 at byte 17, found 0"),
        (17, b"\x09", "dtype code from 1 to 8 at byte 17, found 9"),
        (17, b"\x01", r"sequence 1 is said to start at byte 6 of the \.bin, expected 3"),
        (18, struct.pack("<Q", 2**63), r"truncated: expected \d+ bytes for 9223372036854775808 sequences"),
        (18, struct.pack("<Q", 0), r"the corpus is empty: 0 sequences \(byte 18\), 4 documents"),
        (26, struct.pack("<Q", 1), r"the corpus is empty: 7 sequences \(byte 18\), 0 documents"),
        (26, struct.pack("<Q", 0), "0 documents"),
        (26, struct.pack("<Q", 6), "truncated: expected 166 bytes for 7 sequences and 5 documents, found 158"),
        (34, struct.pack("<i", -3), "sequence 0 has length -3, expected 0 or more"),
        (34, struct.pack("<i", 4), r"sequence 1 is said to start at byte 6 of the \.bin, expected 8"),
        (POINTERS - 4, struct.pack("<i", 3), r"c\.bin: truncated: c\.idx describes 32 bytes, found 28"),
        (POINTERS, struct.pack("<q", 8), r"sequence 0 is said to start at byte 8 of the \.bin, expected 0"),
        (POINTERS + 8 * 6, struct.pack("<q", -2), "sequence 6 is said to start at byte -2"),
        (BOUNDARIES, struct.pack("<q", 1), "the documents cover sequences 1 to 7, expected 0 to 7"),
        (BOUNDARIES + 8 * D, struct.pack("<q", 99), "the documents cover sequences 0 to 99, expected 0 to 7"),
        (BOUNDARIES + 8, struct.pack("<q", 5), r"document 1 ends at sequence 3, expected 5 \(its first\) or more"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, offset, content, message):
    damage(write_ours(tmp_path / "c"), ".idx", offset, content)
    with pytest.raises(DataError, match=message) as caught:
        IndexedReader(tmp_path / "c")
    assert str(tmp_path / "c.") in str(caught.value)
    assert "prepare or copy the corpus again" in str(caught.value)


def test_every_truncation_of_either_file_is_refused(tmp_path):
    prefix = write_ours(tmp_path / "c")
    for ending in (".idx", ".bin"):
        path = Path(f"{prefix}{ending}")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=f"c.{ending[1:]}: truncated: .* found {size}"):
                IndexedReader(prefix)
        path.write_bytes(whole)
    assert IndexedReader(prefix).tokens.tolist() == FLAT


def test_longer_files_are_refused(tmp_path):
    damage(write_ours(tmp_path / "a"), ".bin", 28, b"\0\0")
    with pytest.raises(DataError, match=r"a\.bin: longer than its index: a\.idx describes 28 bytes, found 30"):
        IndexedReader(tmp_path / "a")
    damage(write_ours(tmp_path / "b"), ".idx", 158, b"\0")
    with pytest.raises(DataError, match=r"b\.idx: too long: expected 158 bytes .* found 159"):
        IndexedReader(tmp_path / "b")


def test_empty_corpora_are_refused(tmp_path):
    with pytest.raises(DataError, match="the corpus is empty: 0 sequences"):
        IndexedReader(write_ours(tmp_path / "a", []))
    with pytest.raises(DataError, match="2 documents without a single token"):
        IndexedReader(write_ours(tmp_path / "b", [[[]], [[]]]))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, ending):
    Path(f"{write_ours(tmp_path / 'c')}{ending}").unlink()
    with pytest.raises(DataError, match=rf"c\{ending}: no such file"):
        IndexedReader(tmp_path / "c")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 157), st.binary(min_size=1, max_size=8)), max_size=3),
    size=st.none() | st.integers(0, 200),
)
def test_any_damage_is_a_data_error_or_still_consistent(tmp_path, changes, size):
    """Never a numpy traceback: whatever the bytes, either `DataError` or documents that partition the file."""
    prefix = write_ours(tmp_path / "c")
    for offset, content in changes:
        damage(prefix, ".idx", offset, content)
    if size is not None:
        with (tmp_path / "c.idx").open("r+b") as stream:
            stream.truncate(size)
    try:
        reader = IndexedReader(prefix)
    except DataError:
        return
    parts = [reader.document(i) for i in range(reader.num_documents)]
    np.testing.assert_array_equal(np.concatenate(parts), np.fromfile(tmp_path / "c.bin", dtype=reader.dtype))
