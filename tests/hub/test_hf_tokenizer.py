"""What is exported gives the ids that a run was trained on."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer
from moe_train.errors import ConfigError
from moe_train.hub.tokenizer import byte_tokenizer, tokenizer_files

TEXTS = [
    "",
    " two  spaces \n\n\ttab ",
    "naïve café Ünïcödé 中文 עברית 🙂\u200d🙂 e\u0301",
    "".join(map(chr, range(0x300))),
    "\ud7ff\ue000\uffff\U00010000\U0010ffff\0\x7f\x80",
    "<|end of text|> [UNK] </s> ##",
]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_the_byte_tokenizer_for_the_library_gives_the_same_ids(text):
    library, ours = byte_tokenizer(), ByteTokenizer()
    ids = library.encode(text, add_special_tokens=False).ids
    expected = ours.encode(text.replace("<|endoftext|>", "")).tolist()
    assert [i for i in ids if i != ours.eod_id] == expected
    assert library.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_written_byte_tokenizer_reads_back(text, tmp_path):
    for name, content in tokenizer_files("byte").files.items():
        (tmp_path / name).write_bytes(content)
    expected = ByteTokenizer().encode(text).tolist()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == expected
    assert theirs(text)["input_ids"] == expected  # nothing is added before or after
    assert theirs.decode(expected) == text
    assert (len(theirs), theirs.eos_token_id) == (257, 256)
    again = load_tokenizer(str(tmp_path))  # as a recipe's data.tokenizer
    assert again.encode(text).tolist() == expected
    assert (again.vocab_size, again.eod_id) == (257, 256)
    assert again.encode("<|endoftext|>").tolist() == list(b"<|endoftext|>")


def test_every_byte_has_its_id():
    found = byte_tokenizer().get_vocab(with_added_tokens=False)
    assert sorted(found.values()) == list(range(256))
    letters = {byte: letter for letter, byte in found.items()}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    decoded = [byte_tokenizer().decode([byte]) for byte in range(128)]
    assert decoded == [chr(byte) for byte in range(128)]


def write_words(folder, beside=None):
    folder.mkdir(exist_ok=True)
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "notes.txt").write_text("not of the tokenizer")
    if beside:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_folder_is_copied_as_it_is(tmp_path):
    folder = write_words(tmp_path / "t", beside={"eos_token": "</s>", "mine": 1})
    found = tokenizer_files(str(folder))
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all((folder / name).read_bytes() == content for name, content in found.files.items())
    assert (found.eod_id, found.is_byte) == (3, False)


def test_a_file_gets_the_settings_it_lacks(tmp_path):
    folder = write_words(tmp_path / "t")
    (folder / "tokenizer.json").rename(folder / "words.json")
    found = tokenizer_files(str(folder / "words.json"))
    assert set(found.files) == {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "out").mkdir()
    for name, content in found.files.items():
        (tmp_path / "out" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the cat")["input_ids"] == [1, 2]
    assert theirs.eos_token_id == 3


def test_none_and_one_that_is_gone(tmp_path):
    assert tokenizer_files("none").files == {}
    with pytest.raises(ConfigError, match="give --tokenizer a path on this machine, or none"):
        tokenizer_files(str(tmp_path / "gone"))
