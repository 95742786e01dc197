"""Text to tokens, the cache under several processes, and a disk that is full."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from moe_train.config.schema import CorpusSection, DataSection
from moe_train.data import prepare as prepare_module
from moe_train.data.indexed import IndexedReader
from moe_train.data.prepare import ensure_prepared, prepare, source_files
from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer
from moe_train.errors import DataError

BYTES = ByteTokenizer()


def documents(prefix) -> list[bytes]:
    """The documents as bytes, after checking that each ends with the end-of-document id and has no other."""
    reader = IndexedReader(prefix)
    out = []
    for index in range(reader.num_documents):
        ids = reader.document(index)
        assert ids[-1] == 256
        assert ids[:-1].max() < 256
        out.append(bytes(ids[:-1].astype(np.uint8)))
    return out


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_folder_becomes_one_document_per_file_in_the_order_of_names(tmp_path):
    files = {"b.txt": b"bee", "a/z.txt": b"\xff\x00z", "a/empty.txt": b"", "c.md": b"no", ".git/x.txt": b"no"}
    source = tree(tmp_path / "src", files)
    result = prepare(str(source), tmp_path / "out", BYTES, glob="**/*.txt")
    assert documents(tmp_path / "out") == [b"\xff\x00z", b"bee"]
    assert (result.num_documents, result.num_tokens, result.num_bytes) == (2, 8, 6)
    assert IndexedReader(tmp_path / "out").dtype == np.uint16


def test_jsonl_and_a_folder_with_jsonl(tmp_path):
    lines = [{"text": "one"}, {"text": ""}, {"text": "zwö\n"}]
    content = "\n\n".join(json.dumps(line) for line in lines).encode()
    source = tree(tmp_path / "src", {"a.jsonl": content, "b.txt": b"three"})
    prepare(str(source / "a.jsonl"), tmp_path / "one", BYTES)
    assert documents(tmp_path / "one") == [b"one", "zwö\n".encode()]
    prepare(str(source), tmp_path / "all", BYTES)
    assert documents(tmp_path / "all") == [b"one", "zwö\n".encode(), b"three"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", r"a\.jsonl:2: not a JSON object on one line"),
        (b"\xff", r"a\.jsonl:2: not a JSON object on one line"),
        (b"[" * 100_000, r"a\.jsonl:2: not a JSON object on one line"),
        (b"[1]", r"a\.jsonl:2: expected a JSON object, found list"),
        (b'{"body": "x"}', r"a\.jsonl:2: no field text; found 'body'"),
        (b'{"text": 3}', r"a\.jsonl:2: field text must be text, found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    source = tree(tmp_path / "src", {"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    with pytest.raises(DataError, match=message):
        prepare(str(source / "a.jsonl"), tmp_path / "out" / "c", BYTES)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"line one\nline 2\n\nlast", "wörd ".encode() * 7, b"\n" * 40, b"x" * 33])
@pytest.mark.parametrize("block", [5, 8, 16])
def test_a_file_longer_than_a_block_is_still_one_document(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", block)
    source = tree(tmp_path / "src", {"a.txt": content, "b.txt": b"other"})
    prepare(str(source), tmp_path / "out", BYTES)
    assert documents(tmp_path / "out") == [content, b"other"]
    assert IndexedReader(tmp_path / "out").num_sequences > 2
    for piece in prepare_module._blocks(source / "a.txt", "text"):
        assert isinstance(piece.text, bytes)
        piece.text.decode()  # no character is split


@pytest.mark.parametrize("block", [4, 1 << 20])
def test_a_hugging_face_tokenizer_ends_documents_with_its_own_token(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", block)
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    source = tree(tmp_path / "src", {"1.txt": b"a b \xff", "2.txt": b"  \n", "3.txt": b"b\nb\n    \n"})
    prepare(str(source), tmp_path / "out", load_tokenizer(str(tmp_path)))
    reader = IndexedReader(tmp_path / "out")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == [[1, 2, 0, 3], [2, 2, 3]]


def test_progress_counts_bytes_to_the_end(tmp_path):
    source = tree(tmp_path / "src", {"a": b"12345", "b": b"123"})
    seen = []
    prepare(str(source), tmp_path / "out", BYTES, progress=lambda *args: seen.append(args))
    assert seen == [(5, 8), (8, 8), (8, 8)]


@pytest.mark.parametrize(
    ("files", "glob", "message"),
    [
        ({}, "**/*", "no such file or folder"),
        ({"a.txt": b"x"}, "*.md", r"the corpus is empty: no file matches \*\.md"),
        ({"a.txt": b""}, "**/*", "the corpus is empty: 1 files .* hold 0 bytes"),
        ({"a.txt": b"x"}, "/etc/*", r"glob \(/etc/\*\) is not a pattern"),
        ({"a.txt": b"x"}, "../src/*", r"the corpus is empty: no file matches \.\./src/\*"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path, files, glob, message):
    source = tree(tmp_path / "src", files)
    with pytest.raises(DataError, match=message):
        prepare(str(source), tmp_path / "out" / "c", BYTES, glob=glob)
    assert not list(tmp_path.glob("out/*"))


def test_the_standard_library_is_found_without_packages_and_tests():
    files = source_files("python-stdlib", "ignored")
    names = [file.name for file in files]
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert names == sorted(names)
    forbidden = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    assert not [name for name in names if forbidden & set(Path(name).parts)]
    by_name = {file.name: file for file in files}
    assert by_name["ast.py"].path == Path(ast.__file__)
    assert by_name["ast.py"].path.parent == Path(sysconfig.get_paths()["stdlib"])
    assert 5e6 < sum(file.size for file in files) < 50e6


def sections(source: Path, cache: Path, **corpus) -> tuple[CorpusSection, DataSection]:
    section = CorpusSection(text=str(source), **corpus)
    return section, DataSection(corpora=(section,), sequence_length=4, cache_dir=str(cache))


def test_the_cache_is_used_and_follows_the_source(tmp_path, monkeypatch):
    source = tree(tmp_path / "src", {"a.txt": b"one"})
    first = ensure_prepared(*sections(source, tmp_path / "cache"), BYTES)
    assert documents(first) == [b"one"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "prepare", lambda *args, **kwargs: pytest.fail("prepared twice"))
        assert ensure_prepared(*sections(source, tmp_path / "cache"), BYTES) == first
    os.utime(source / "a.txt", ns=(0, 123))
    assert ensure_prepared(*sections(source, tmp_path / "cache"), BYTES) != first
    (source / "b.txt").write_bytes(b"two")
    assert documents(ensure_prepared(*sections(source, tmp_path / "cache"), BYTES)) == [b"one", b"two"]
    assert documents(ensure_prepared(*sections(source, tmp_path / "cache", glob="b*"), BYTES)) == [b"two"]


def test_a_prefix_is_taken_as_it_is(tmp_path):
    section = CorpusSection(prefix="some/where")
    data = DataSection(corpora=(section,), sequence_length=4, cache_dir=str(tmp_path / "never"))
    assert ensure_prepared(section, data, BYTES) == Path("some/where")
    assert not (tmp_path / "never").exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    source = tree(tmp_path / "src", {"a.txt": b"one"})
    prefix = ensure_prepared(*sections(source, tmp_path / "cache"), BYTES)
    Path(f"{prefix}.idx").unlink()
    Path(f"{prefix}.bin.77-abcd.tmp").write_bytes(b"half")
    assert ensure_prepared(*sections(source, tmp_path / "cache"), BYTES) == prefix
    assert documents(prefix) == [b"one"]
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx", ".lock"]


CONCURRENT = """
import sys, time
from moe_train.config.schema import CorpusSection, DataSection
from moe_train.data import prepare as module
from moe_train.data.indexed import IndexedReader
from moe_train.data.tokenizer import ByteTokenizer

real = module.prepare
def slow(*args, **kwargs):
    print("prepares", flush=True)
    time.sleep(0.5)  # long enough for the other process to arrive
    return real(*args, **kwargs)
module.prepare = slow
section = CorpusSection(text=sys.argv[1])
data = DataSection(corpora=(section,), sequence_length=4, cache_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
reader = IndexedReader(module.ensure_prepared(section, data, ByteTokenizer()))
print(bytes(reader.tokens[:-1].astype("u1")).decode(), flush=True)
"""


def test_processes_that_call_at_once_prepare_once(tmp_path):
    source = tree(tmp_path / "src", {"a.txt": b"shared"})
    command = [sys.executable, "-c", CONCURRENT, str(source), str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    lines = [worker.communicate(timeout=60)[0].splitlines() for worker in workers]
    assert sorted(lines) == [["prepares", "shared"], ["shared"], ["shared"]]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".bin", ".idx", ".lock"]


LIMITED = """
import resource, signal, sys
from moe_train.data.prepare import prepare
from moe_train.data.tokenizer import ByteTokenizer
from moe_train.errors import DataError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    prepare(sys.argv[1], sys.argv[2], ByteTokenizer())
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [700_000, 5_000_000])  # refused while flushing at the end, and while writing
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path, size):
    source = tree(tmp_path / "src", {"a.txt": b"x" * size})
    target = tmp_path / "out" / "c"
    run = subprocess.run([sys.executable, "-c", LIMITED, source, target], capture_output=True, text=True, check=True)
    assert f"{target}.bin: cannot be written: File too large (errno 27); " in run.stdout
    assert "bytes are free on that disk" in run.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a 1 MiB disk needs root")
    try:
        source = tree(tmp_path / "src", {"a.txt": b"x" * 5_000_000})
        with pytest.raises(
            DataError, match=r"c\.bin: cannot be written: No space left on device \(errno 28\); 0 bytes"
        ):
            prepare(str(source), disk / "c", BYTES)
        assert list(disk.iterdir()) == []
        section, data = sections(source, disk)
        with pytest.raises(DataError, match="No space left on device"):
            ensure_prepared(section, data, BYTES)
        assert [path.suffix for path in disk.iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_output_folder_that_cannot_be_made(tmp_path):
    source = tree(tmp_path / "src", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"c\.bin: cannot be written: .*bytes are free"):
        prepare(str(source), source / "a.txt" / "c", BYTES)
