"""The layer with experts in FP8: where it is refused, when weights are quantised, and the same bits on two ranks."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from test_layer import Case, make_layer, make_tokens

from moe_train import kernels
from moe_train.errors import ConfigError
from moe_train.kernels import Fp8Gemms
from moe_train.moe import ExpertWeights, fp8_gemms, paying_gemms
from moe_train.moe import fp8 as module
from moe_train.moe.fp8 import Fp8Experts
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    """As if there were an H200."""
    monkeypatch.setattr(kernels, "runs_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


def test_refused_with_the_key_the_number_and_the_alternative(hopper, monkeypatch):
    assert fp8_gemms("fp8", CUDA, 2048, 768, 128) == paying_gemms(2048, 768)
    for hidden, inner, said in ((2056, 768, r"hidden \(2056\)"), (2048, 776, r"size on a rank \(776\)")):
        with pytest.raises(
            ConfigError, match=rf"precision.experts \(fp8\) needs .*{said} to be a multiple of 16.*bf16"
        ):
            fp8_gemms("fp8", CUDA, hidden, inner, 8)
    with pytest.raises(ConfigError, match=r"at most 1023 experts on a rank, not 1024: raise parallel.expert or set"):
        fp8_gemms("fp8", CUDA, 2048, 768, 1024)
    with pytest.raises(ConfigError, match=r"none of the experts' products faster at hidden \(64\).*\(32\): set"):
        fp8_gemms("fp8", CUDA, 64, 32, 8)
    with pytest.raises(ConfigError, match=r"and this is a CPU: set precision.experts to bf16"):
        fp8_gemms("fp8", CPU, 2048, 768, 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"and this is a NVIDIA H200: set precision.experts to bf16"):
        fp8_gemms("fp8", CUDA, 2048, 768, 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "runs_triton", lambda device: False)
    with pytest.raises(ConfigError, match=r"needs the package triton: install it or set precision.experts to bf16"):
        fp8_gemms("fp8", CUDA, 2048, 768, 8)
    for asked in (None, "bf16"):
        assert fp8_gemms(asked, CPU, 7, 7, 5000) is None


SIZES = (256, 512, 768, 1024, 2048)
GAINS = {  # of K and each N, from bench_fp8_products on an H200
    256: (0.65, 1.02, 0.81, 1.03, 1.08),
    512: (0.74, 1.21, 1.00, 1.17, 1.32),
    768: (0.71, 1.27, 1.05, 1.34, 1.38),
    1024: (0.73, 1.35, 1.08, 1.45, 1.50),
    2048: (0.84, 1.58, 1.12, 1.54, 1.63),
}


def test_products_run_in_fp8_where_they_were_measured_to_gain():
    for k, gains in GAINS.items():
        for n, gain in zip(SIZES, gains, strict=True):
            assert module._pays(k, n) == (gain > 1.15), (k, n)
    assert str(paying_gemms(2048, 768)) == "h y dX", "768 columns of dA are computed as 1024"


def test_a_product_that_does_not_gain_stays_in_bf16():
    assert set(paying_gemms(4096, 2048).names) == set(kernels.fp8.GEMMS)
    few = paying_gemms(2048, 64)
    assert "y" not in few, "64 numbers are too few to sum over"
    assert "in bf16" in few.describe()
    assert not paying_gemms(64, 32).names


def test_on_a_cpu_under_the_interpreter_every_product_is_in_fp8(monkeypatch):
    monkeypatch.setattr(kernels, "runs_triton", lambda device: True)
    assert fp8_gemms("fp8", CPU, 16, 16, 8) == Fp8Gemms()


def test_weights_are_quantised_once_for_a_version():
    experts = Fp8Experts(Fp8Gemms(), F.silu)
    gate_up, down = torch.randn(2, 32, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    first = [part.clone() for part in experts.quantised(ExpertWeights(gate_up, down, version=1))]
    with torch.no_grad():
        gate_up.mul_(2)
    with patch.object(module.kernels, "quantise_weights", side_effect=AssertionError("once")):
        kept = experts.quantised(ExpertWeights(gate_up, down, version=1))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(kept, first, strict=True))
    places = [part.data_ptr() for part in kept]
    renewed = experts.quantised(ExpertWeights(gate_up, down, version=2))
    assert torch.equal(renewed[1], 2 * first[1])
    assert [part.data_ptr() for part in renewed] == places
    assert experts.quantised(ExpertWeights(gate_up, down)) == [], "weights that do not stay are not kept"


CASE = Case("fp8", 6, (16, 0), favourites=(), backend="fused", dtype=torch.bfloat16)


def pass_of(rank: int, world: int, fp8: bool):
    """Output and gradients of this rank."""
    groups = build_groups(Topology(world=world, expert=world))
    with patch("test_layer.HIDDEN", 32), patch("test_layer.INTERMEDIATE", 16):
        case = replace(CASE, tokens=(9, 7)) if world == 2 else replace(CASE, tokens=(16,))
        layer, gate_up, down = make_layer(case, rank, groups, fp8=Fp8Gemms() if fp8 else None)
        pairs = make_tokens(replace(CASE, tokens=(9, 7)))
    mine = pairs[rank : rank + 1] if world == 2 else pairs
    x, dy = (torch.cat(parts).to(case.dtype) for parts in zip(*mine, strict=True))
    x.requires_grad_()

    with layer.context.micro_batch():
        y = layer(x)
        (y * dy).sum().backward()
    return y.detach(), x.grad, gate_up.grad, down.grad


@pytest.mark.parametrize("fp8", [False, True])
def test_two_ranks_give_the_bits_of_one(fp8):
    """Rows come to an expert in the order of the tokens at every EP, and a scale looks at its own row alone, so that
    gradients of weights are the same; each rank's sum over a token's experts is rounded by itself."""
    pytest.importorskip("triton", reason="the test extra installs it on Linux")
    alone = pass_of(0, 1, fp8)
    ranks = run_distributed(pass_of, 2, 2, fp8)
    for value, *parts in zip(alone[2:], *(rank[2:] for rank in ranks), strict=True):
        assert torch.equal(value, torch.cat(parts))
    for value, *parts in zip(alone[:2], *(rank[:2] for rank in ranks), strict=True):
        assert float((torch.cat(parts).double() - value.double()).norm() / value.double().norm()) < 4e-3


def test_fp8_is_not_bf16():
    pytest.importorskip("triton", reason="the test extra installs it on Linux")
    exact, rounded = pass_of(0, 1, False)[0].double(), pass_of(0, 1, True)[0].double()
    assert 0.005 < float((rounded - exact).norm() / exact.norm()) < 0.1


def test_a_backend_without_fp8_is_not_given_any():
    with pytest.raises(AssertionError, match="the backend loop computes nothing in FP8"):
        make_layer(replace(CASE, backend="loop"), 0, build_groups(Topology(world=1, expert=1)), fp8=Fp8Gemms())


def test_recompute_and_micro_batches_find_the_weights_quantised():
    pytest.importorskip("triton", reason="the test extra installs it on Linux")
    with patch("test_layer.HIDDEN", 32), patch("test_layer.INTERMEDIATE", 16):
        case = replace(CASE, tokens=(16,))
        groups = build_groups(Topology(world=1, expert=1))
        layer, gate_up, down = make_layer(case, 0, groups, fp8=Fp8Gemms())
        ((x, _),) = make_tokens(case)
    source = layer.expert_source
    versions = SimpleNamespace(now=0)
    layer.expert_source = SimpleNamespace(  # type: ignore[assignment]
        fetch=lambda: _entered(ExpertWeights(gate_up, down, version=versions.now))
    )
    assert source is not layer.expert_source
    counted = patch.object(module.kernels, "quantise_weights", wraps=kernels.quantise_weights)
    with counted as quantise:
        for version in (0, 1):
            versions.now = version
            for _ in range(2):
                with layer.context.micro_batch():
                    layer(x.bfloat16()).sum().backward()
                    with layer.context.recompute():
                        layer(x.bfloat16())
        assert quantise.call_count == 2


class _entered:
    def __init__(self, weights: ExpertWeights):
        self.weights = weights

    def __enter__(self) -> ExpertWeights:
        return self.weights

    def __exit__(self, *error: object) -> None:
        pass
