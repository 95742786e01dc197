"""Every kernel test runs on the torch reference and on Triton, with outputs that start as NaN."""

import pytest
import torch

from moe_train.kernels import choose


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch) -> torch.device:
    """Where the test's tensors go; on a CPU, Triton runs under its interpreter."""
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if request.param == "triton":
        pytest.importorskip("triton", reason="the test extra installs it on Linux")
        assert choose.runs_triton(gpu), "Triton was imported before tests/conftest.py turned its interpreter on"
    else:
        monkeypatch.setattr(choose, "runs_triton", lambda device: False)
    return gpu


@pytest.fixture
def gaps(monkeypatch):
    """Rows of experts begin at lines of the cache, as on a GPU of our own grouped GEMM."""

    monkeypatch.setattr("moe_train.kernels.grouped_gemm.begin_at_lines", lambda dtype, device: True)


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN, or the largest integer: what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
