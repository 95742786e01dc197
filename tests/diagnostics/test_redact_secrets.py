"""What is a secret and what only looks like one."""

from pathlib import Path

import pytest

from moe_train.diagnostics.redact import REDACTED, redact, redact_text


@pytest.mark.parametrize(
    "key",
    ["key", "api_key", "apiKey", "API-KEY", "WANDB_API_KEY", "HF_TOKEN", "hf.token", "accessToken", "secret", "passwd",
     "password", "db_password", "credential", "credentials", "auth", "basic_auth", "use_auth_token"],
)  # fmt: skip
def test_secret_keys(key):
    assert redact({"a": [{key: "hunter2"}]}) == {"a": [{key: REDACTED}]}
    assert redact({key: {"inner": ["hunter2"]}}) == {key: REDACTED}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_tokens", "12"), ("cls_token", "[CLS]"), ("eos_token", "</s>"), ("tokenizer", "byte"), ("author", "ann"),
        ("tokens_per_s", "5"), ("num_key_value_heads", 4), ("eos_token_id", 2), ("keyboard", "us"), ("monkey", "bob"),
        ("authority", "x"), ("api_key", None), ("token", ""), ("use_auth_token", False), ("secretary", "y"),
    ],
)  # fmt: skip
def test_harmless_keys(key, value):
    assert redact({key: value}) == {key: value}


def test_numbers_under_plain_words_are_secret_too():
    assert redact({"password": 12345, "key": 5}) == {"password": REDACTED, "key": 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pw@host/x", "https://host/x"),
        ("s3://AKIA@bucket and https://host/@handle", "s3://bucket and https://host/@handle"),
        ("https://host/x?token=abc&page=2", f"https://host/x?token={REDACTED}&page=2"),
        ("run --wandb-key abc --steps 5 --api-key=def", f"run --wandb-key {REDACTED} --steps 5 --api-key={REDACTED}"),
        ("top-key value is fine", "top-key value is fine"),
        ("mail me@host.org", "mail me@host.org"),
        ("/home/someone/data/x.bin", "~/data/x.bin"),
        ("a:/Users/someone/x", "a:~/x"),
        ("/data/home/x", "/data/home/x"),
    ],
)
def test_text(text, expected):
    assert redact_text(text) == expected


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/ann")
    assert redact_text("/srv/people/ann/runs") == "~/runs"
    assert redact_text("in '/srv/people/ann', /srv/people/anna/x") == "in '~', /srv/people/anna/x"
    assert redact({"path": Path("/srv/people/ann/a"), "/srv/people/ann/b": 1}) == {"path": "~/a", "~/b": 1}
    monkeypatch.setenv("HOME", "/")
    assert redact_text("/srv/a") == "/srv/a"


def test_argument_lists_and_other_types_survive():
    argv = ["train", "--wandb-key", "abc", "--steps", "5"]
    assert redact({"argv": argv, "t": (1, "a"), "f": 1.5}) == {
        "argv": ["train", "--wandb-key", REDACTED, "--steps", "5"],
        "t": (1, "a"),
        "f": 1.5,
    }
    assert argv[2] == "abc", "the original must stay"
