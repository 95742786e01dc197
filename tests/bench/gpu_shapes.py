"""Sizes and timing that the kernel benchmarks share."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """T tokens, H hidden, I expert intermediate, E experts, K experts per token."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int

    @property
    def flops(self) -> int:
        """Of the six grouped GEMMs of forward and backward."""
        return 6 * self.T * self.K * 3 * self.H * self.I

    def __str__(self) -> str:
        return f"T {self.T}, H {self.H}, I {self.I}, E {self.E}, k {self.K}"


SHAPES = {
    "qwen3": Shape(16384, 2048, 768, 128, 8),
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "dsv3": Shape(16384, 7168, 2048, 32, 8),  # the local experts of 256 at EP 8
}
OTHERS = {
    "few": Shape(16384, 2048, 2816, 4, 2),
    "many": Shape(8192, 2048, 512, 512, 10),
    "wide_k": Shape(8192, 1024, 512, 64, 24),
    "odd": Shape(32768, 1000, 360, 30, 6),
}
"""Few and many experts, many per token, and sizes that no block of 64 divides."""
TOY = {"toy": Shape(96, 64, 32, 8, 2), "toy, 60 experts": Shape(40, 32, 16, 60, 4)}


def pick(toy: bool) -> tuple[dict[str, Shape], torch.device]:
    """Shapes and device; raises `SystemExit` without a GPU unless toy sizes are asked for."""
    if toy:
        return TOY, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        raise SystemExit("these sizes need a CUDA GPU; --toy runs small ones anywhere")
    return SHAPES, torch.device("cuda")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(call: Callable[[], object], device: torch.device, loops: int = 5, seconds: float = 0.3) -> float:
    """Median over loops of the mean time of a call; each loop takes at least `seconds`."""
    call()
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    count = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)) + 1) if seconds else 1
    found = []
    for _ in range(loops):
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait(device)
        found.append((time.perf_counter() - start) / count * 1e3)
    return statistics.median(found)


def device_ms(call: Callable[[], object], device: torch.device, loops: int = 5, seconds: float = 0.3) -> float:
    """`median_ms` of a CUDA graph of the call: what the GPU takes, launches from Python left out."""
    if device.type != "cuda":
        return median_ms(call, device, loops, seconds)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return median_ms(graph.replay, device, loops, seconds)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and write, of copying `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device, seconds=0.05) * 1e-3)


def versions(device: torch.device) -> str:
    """One line: device, torch, Triton and who else is there."""
    import importlib.metadata as metadata

    found = [torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", f"torch {torch.__version__}"]
    for package in ("triton", "transformers", "deepspeed", "torchtitan", "sonic-moe"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
