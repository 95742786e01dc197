"""Take secrets and home folders out of anything that is about to be written down."""

import re
from pathlib import Path
from typing import Any

REDACTED = "[redacted]"

# whatever stands under one of these is secret, numbers included
ALWAYS_SECRET = {
    "secret", "secrets", "passwd", "password", "passwords", "passphrase", "pwd", "credential", "credentials", "apikey",
}  # fmt: skip
# these words also name harmless numbers (num_key_value_heads, eos_token_id), so only text and containers are taken
SECRET_IF_TEXT = {"key", "token", "auth", "signature"}
# special tokens of a tokenizer: cls_token: "[CLS]"
SPECIAL_TOKENS = {"bos", "eos", "cls", "sep", "pad", "unk", "mask", "additional", "image", "audio", "video", "special"}

_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#]*@")
_URL_QUERY = re.compile(r"([?&])([^=&#\s]+)=([^&#\s]+)")
_FLAG = re.compile(r"(?<![\w-])(--?)([A-Za-z][\w-]*)(=|\s+)(?!-)(\S+)")
_HOME = re.compile(r"(?<![\w.~-])/(?:home|Users)/[^/\s:'\"]+")


def redact(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with secrets replaced by `[redacted]`; other objects as they are.

    Secret: what stands under a key one of whose words says so (`api_key`, `HF_TOKEN`, `authToken`; not `num_tokens`,
    `cls_token`, `tokenizer`, `author`), user-info and secret query values in URLs, `--some-key VALUE` in text, and the
    argument after a list item `--some-key`. Home folders become `~`.
    """
    if isinstance(value, dict):
        return {
            redact_text(key) if isinstance(key, str) else key: REDACTED if _is_secret(str(key), item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = _arguments(value)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Path):
        return redact_text(str(value))
    return value


def redact_text(text: str) -> str:
    """The same for one string."""
    text = _URL_USER.sub(r"\1", text)
    text = _URL_QUERY.sub(lambda m: f"{m[1]}{m[2]}={REDACTED}" if _is_secret(m[2], m[3]) else m[0], text)
    text = _FLAG.sub(lambda m: f"{m[1]}{m[2]}{m[3]}{REDACTED}" if _is_secret(m[2], m[4]) else m[0], text)
    home = str(Path.home())
    if home not in ("/", ""):
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-])", "~", text)
    return _HOME.sub("~", text)


def _arguments(items: list | tuple) -> list:
    """Items of a list, each redacted; one that follows a lone flag with a secret name is taken as its value."""
    out, after_flag = [], False
    for item in items:
        out.append(REDACTED if after_flag else redact(item))
        after_flag = isinstance(item, str) and item.startswith("-") and "=" not in item and _is_secret(item, "text")
    return out


def _is_secret(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool) or (isinstance(value, str | list | tuple | dict) and not value):
        return False
    words = [word.lower() for word in _WORDS.findall(key)]
    if ALWAYS_SECRET & set(words):
        return True
    if isinstance(value, int | float):
        return False
    named = set(words) & SECRET_IF_TEXT
    return bool(named) and not (named == {"token"} and SPECIAL_TOKENS & set(words))
