"""The operator around QuACK's GEMMs, which a stand-in computes here, against the other of the same contract."""

import sys

import pytest
import quack_stand_in
import torch
from test_experts import draw

from moe_train.errors import ConfigError
from moe_train.kernels import GATED, RowMaps, local_experts, quack_tokens, row_maps
from moe_train.moe import resolve_backend
from moe_train.moe.experts import gated_name
from moe_train.testing import assert_close


@pytest.fixture(autouse=True)
def quack(monkeypatch):
    for name, module in quack_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("padding", [False, True])
def test_tokens(name, padding, device):
    found = []
    for operator in (quack_tokens, local_experts):
        leaves, dy, ids = draw(37, 3, 7, 16, 8, torch.float32, device, padding)
        x, weights, gate_up, down = leaves
        y = operator(x, weights, row_maps(ids.reshape(-1), 7), gate_up, down, name)
        y.backward(dy)
        found.append([y.detach(), *[leaf.grad for leaf in leaves]])
    for what, actual, wanted in zip(("y", "dx", "d weights", "d gate_up", "d down"), *found, strict=True):
        assert_close(actual, wanted, what)


@pytest.mark.parametrize("elsewhere", [0.5, 1.0])
def test_copies_of_other_ranks_have_no_rows(elsewhere, device):
    found = []
    for operator in (quack_tokens, local_experts):
        leaves, dy, ids = draw(37, 3, 4, 16, 8, torch.float32, device)
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).to(device) < elsewhere] = -1
        maps, rows = row_maps(ids.reshape(-1), 4), int((ids >= 0).sum())
        short = RowMaps(order_R=maps.order_R[:rows], place_R=maps.place_R, counts_D=maps.counts_D)
        x, weights, gate_up, down = leaves
        y = operator(x, weights, short, gate_up, down, "silu")
        y.backward(dy)
        found.append([y.detach(), *[leaf.grad for leaf in leaves]])
    for what, actual, wanted in zip(("y", "dx", "d weights", "d gate_up", "d down"), *found, strict=True):
        assert_close(actual, wanted, what)


def test_an_activation_it_lacks_and_a_cpu_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"moe.backend \(hopper\).* is relu2: set moe.backend to fused"):
        gated_name(_relu2())
    monkeypatch.setattr("moe_train.kernels.has_quack", lambda: True)
    with pytest.raises(ConfigError, match=r"needs a Hopper GPU.* is a CPU: set moe.backend to auto"):
        resolve_backend("hopper", torch.device("cpu"), torch.bfloat16, 64, 64)
    monkeypatch.setattr("moe_train.kernels.has_quack", lambda: False)
    with pytest.raises(ConfigError, match=r"needs QuACK: pip install 'moe_train\[hopper\]'"):
        resolve_backend("hopper", torch.device("cuda"), torch.bfloat16, 64, 64)


def _relu2():
    from transformers.activations import ACT2FN

    return ACT2FN["relu2"]
