"""Processes that stay alive across tests."""

import importlib
import sys

from moe_train.testing import run_distributed


def where_am_i(rank: int) -> int:
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
