"""The tokenizer of a run, as Hugging Face's libraries read it."""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe_train.data.tokenizer import ByteTokenizer, load_tokenizer
from moe_train.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""What a folder may hold of a tokenizer."""
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Files of a folder by name, and the id that ends a document. eod_id None: no tokenizer is written."""

    files: dict[str, bytes]
    eod_id: int | None
    is_byte: bool
    what: str


def tokenizer_files(spec: str) -> TokenizerFiles:
    """What an export writes for `data.tokenizer`; `none` for nothing.

    Raises `ConfigError` for a tokenizer that cannot be read here.
    """
    if spec == "none":
        return TokenizerFiles(files={}, eod_id=None, is_byte=False, what="no tokenizer")
    if spec == "byte":
        text = byte_tokenizer().to_str(pretty=True)
        files = {"tokenizer.json": text.encode(), SETTINGS: _settings(END_OF_TEXT)}
        what = f"the byte tokenizer as tokenizer.json (id 256 is {END_OF_TEXT})"
        return TokenizerFiles(files=files, eod_id=ByteTokenizer.eod_id, is_byte=True, what=what)
    try:
        tokenizer = load_tokenizer(spec)
    except DataError as error:
        raise ConfigError(f"{error}; or give --tokenizer a path on this machine, or none") from None
    path = Path(spec)
    folder = path if path.is_dir() else path.parent
    found = [folder / name for name in COPIED if (folder / name).is_file()]
    if not path.is_dir():  # beside a file that was named lies whatever else its folder is for
        beside = (SETTINGS, "special_tokens_map.json")
        found = [path, *(item for item in found if item.name in beside)]
    files = {"tokenizer.json" if item == path else item.name: item.read_bytes() for item in found}
    if SETTINGS not in files:
        inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        files[SETTINGS] = _settings(inner.id_to_token(tokenizer.eod_id))
    return TokenizerFiles(files=files, eod_id=tokenizer.eod_id, is_byte=False, what=f"tokenizer {spec}")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """`ByteTokenizer` for the tokenizers library: ids 0 to 255 are bytes, 256 ends a document.

    The library spells each byte as a letter of its own. Pairs are never merged, so that each letter is a token.
    """
    letters = {_letter(byte): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # type: ignore[misc]
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[misc]
    tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_OF_TEXT) == ByteTokenizer.eod_id
    return tokenizer


def _letter(byte: int) -> str:
    """GPT-2's letter for a byte: itself where it can be seen, else one from 256 on, in order."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in seen:
        return chr(byte)
    return chr(256 + sum(other not in seen for other in range(byte)))


def _settings(end: str) -> bytes:
    # the class's name in transformers 4 and 5 alike
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    return (json.dumps(tree, indent=2) + "\n").encode()
