"""Byte and Hugging Face tokenizers: exact ids, and what is said when the end of document is not to be found."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer
from moe_train.errors import DataError


def save(folder, special=("</s>",), config=None, **options):
    folder.mkdir(exist_ok=True)
    words = {"<unk>": 0, "the": 1, "cat": 2, "sat": 3, "<": 4, "/": 5, "s": 6, ">": 7, "</": 8}
    inner = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    inner.add_special_tokens(list(special))
    if options.get("truncation"):
        inner.enable_truncation(options["truncation"])
        inner.enable_padding(length=8)
    inner.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé\0").tolist() == [97, 0xC3, 0xA9, 0]
    assert tokenizer.encode(b"\xff\xfe").tolist() == [255, 254]
    assert tokenizer.encode("\ud800").tolist() == [0xED, 0xA0, 0x80]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)


def test_a_hugging_face_tokenizer_by_folder_and_by_file(tmp_path):
    folder = save(tmp_path / "t")
    for spec in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.encode("the cat").tolist() == [1, 2]
        assert tokenizer.encode(b"sat \xff cat").tolist() == [3, 0, 2]
        assert tokenizer.encode("\ud800 cat").tolist() == [0, 2]
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (10, 9)


def test_text_cannot_forge_an_end_of_document(tmp_path):
    tokenizer = load_tokenizer(str(save(tmp_path / "t")))
    assert tokenizer.encode("cat</s>").tolist() == [2, 8, 6, 7]


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    tokenizer = load_tokenizer(str(save(tmp_path / "t", truncation=2)))
    assert tokenizer.encode("the cat sat").tolist() == [1, 2, 3]
    assert [ids.tolist() for ids in tokenizer.encode_many(["the", "the cat sat"])] == [[1], [1, 2, 3]]


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_end_of_document_comes_from_the_config_first(tmp_path, eos):
    folder = save(tmp_path / "t", special=("</s>", "<stop>"), config={"eos_token": eos})
    assert load_tokenizer(str(folder)).eod_id == 10


@pytest.mark.parametrize(
    ("special", "config", "message"),
    [
        (("<pad>",), None, "no end-of-document token: .* none of the usual names"),
        (("</s>", "<eos>"), None, r"several candidates \(</s>, <eos>\)"),
        (("</s>",), {"eos_token": "<gone>"}, r"tokenizer_config\.json: eos_token \(<gone>\) is not in the vocabulary"),
    ],
)
def test_a_missing_end_of_document_is_explained(tmp_path, special, config, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(save(tmp_path / "t", special=special, config=config)))


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="not a tokenizer of the tokenizers library"):
        load_tokenizer(str(tmp_path))


def test_identity_follows_the_content(tmp_path):
    one, same = save(tmp_path / "a"), save(tmp_path / "b")
    other = save(tmp_path / "c", special=("</s>", "<pad>"))
    first, second, third = (load_tokenizer(str(folder)).identity for folder in (one, same, other))
    assert first == second != third
    assert ByteTokenizer().identity != first
