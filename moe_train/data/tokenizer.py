"""Text -> token ids: bytes themselves, or any Hugging Face tokenizer.json."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from moe_train.data.files import read_error
from moe_train.errors import DataError

USUAL_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
"""Looked for among the special tokens when no file beside tokenizer.json names the end of a document."""


class Tokenizer(Protocol):
    """What the rest of the room needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def eod_id(self) -> int:
        """The id that ends every document."""
        ...

    @property
    def identity(self) -> str:
        """The same for two tokenizers exactly when they give the same ids; for cache names and checkpoints."""
        ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, [num_tokens] of uint16 or int32, without the end of document."""
        ...

    def encode_many(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the library can."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are bytes (UTF-8 for text), 256 ends a document."""

    vocab_size = 257
    eod_id = 256
    identity = "byte-257"

    def encode(self, text: str | bytes) -> np.ndarray:
        # JSON may hold half of a surrogate pair; it is kept as its three bytes
        data = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def encode_many(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]


class HuggingFaceTokenizer:
    """A tokenizer.json; text is data, so special tokens written out in it are encoded as the letters they are."""

    def __init__(self, inner: tokenizers.Tokenizer, eod_id: int, identity: str):
        # a file may carry the truncation and padding of the last training script: both would change the corpus
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.eod_id = eod_id
        self.identity = identity
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self._dtype = np.uint16 if self.vocab_size < 65500 else np.int32

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        encodings = self._inner.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in encodings]


def load_tokenizer(spec: str) -> Tokenizer:
    """`byte`, or a tokenizer.json or the folder that holds one.

    Raises `DataError` when there is no such file, when it is no tokenizer, or when it has no end-of-document token.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; set data.tokenizer to byte, a tokenizer.json, or a folder with one"
        )
    content = _read(path)
    try:
        inner = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception and nothing narrower
        raise DataError(f"{path}: not a tokenizer of the tokenizers library: {error}") from None
    eod_id = _end_of_document(inner, path)
    digest = hashlib.sha256(content + str(eod_id).encode()).hexdigest()
    return HuggingFaceTokenizer(inner, eod_id, f"hf-{digest[:16]}")


def _clean(text: str | bytes) -> str:
    data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
    return data.decode("utf-8", errors="replace")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise read_error(path, error) from None


def _end_of_document(inner: tokenizers.Tokenizer, path: Path) -> int:
    """The id of `eos_token` in the files beside tokenizer.json, else of the one usual name among its special tokens."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        beside = path.with_name(name)
        token = _eos_token(beside) if beside.is_file() else None
        if token is None:
            continue
        token_id = inner.token_to_id(token)
        if token_id is None:
            raise DataError(f"{beside}: eos_token ({token}) is not in the vocabulary of {path.name}")
        return token_id
    special = {token.content: token_id for token_id, token in inner.get_added_tokens_decoder().items() if token.special}
    usual = [name for name in USUAL_END_TOKENS if name in special]
    if len(usual) != 1:
        found = f"several candidates ({', '.join(usual)})" if usual else "none of the usual names"
        raise DataError(
            f"{path}: no end-of-document token: no eos_token in tokenizer_config.json or special_tokens_map.json "
            f'beside it and {found} among its special tokens; write {{"eos_token": "..."}} to tokenizer_config.json'
        )
    return special[usual[0]]


def _eos_token(path: Path) -> str | None:
    try:
        settings: Any = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    token = settings.get("eos_token") if isinstance(settings, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
