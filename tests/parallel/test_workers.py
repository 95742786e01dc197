"""Processes that stay alive across tests."""

import importlib
import pickle
import sys

import pytest

from moe_train.testing import run_distributed


def where_am_i(rank: int, *anything: object) -> int:
    return rank


def test_workers_find_a_module_whose_folder_is_on_the_path_since_they_started(tmp_path, monkeypatch):
    assert run_distributed(where_am_i, 2) == [0, 1]
    (tmp_path / "came_later.py").write_text("def twice(rank):\n    return 2 * rank\n")
    monkeypatch.syspath_prepend(tmp_path)
    later = importlib.import_module("came_later")
    try:
        assert run_distributed(later.twice, 2) == [0, 2]
    finally:
        del sys.modules["came_later"]


def test_what_cannot_be_sent_leaves_the_workers_as_they_were():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        run_distributed(where_am_i, 2, lambda: 1)
    assert run_distributed(where_am_i, 2) == [0, 1]


def test_what_cannot_be_found_there_is_an_error_and_not_the_end_of_a_rank():
    with pytest.raises(AssertionError, match="not there"):
        run_distributed(where_am_i, 2, Unfound())
    assert run_distributed(where_am_i, 2) == [0, 1]


class Unfound:
    def __reduce__(self):
        return missing, ()


def missing() -> None:
    raise ModuleNotFoundError("not there")
