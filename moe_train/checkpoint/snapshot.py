"""Training state as it is at this moment, in host memory, so that training can change its own meanwhile."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from moe_train.checkpoint.piece import Piece

ALIGNED = 64
"""Bytes: every type's elements begin at a multiple of their own size."""


class Snapshot:
    """One flat buffer, kept from one save to the next: memory that is fresh, or page-locked, costs more than a copy."""

    def __init__(self):
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def growth(self, pieces: Iterable[Piece]) -> int:
        """Bytes that `take` will allocate beyond what it holds."""
        return max(sum(_room(piece) for piece in pieces) - self._buffer.numel(), 0)

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces with copies of their data, valid until the next call. Waits until all is copied."""
        devices = {piece.data.device for piece in pieces if piece.data.is_cuda}
        if self.growth(pieces):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one first
            size = sum(_room(piece) for piece in pieces)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=bool(devices))
        copies, offset = [], 0
        for piece in pieces:
            place = self._buffer[offset : offset + piece.data.nbytes].view(piece.data.dtype)
            place.copy_(piece.data.detach(), non_blocking=True)
            copies.append(replace(piece, data=place))
            offset += _room(piece)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies


def _room(piece: Piece) -> int:
    return -(-piece.data.nbytes // ALIGNED) * ALIGNED


def available_memory() -> int:
    """Bytes of this host, or of the container that this process is in, which can still be taken without swapping."""
    return min(_of_host(Path("/proc/meminfo")), _of_container(Path("/sys/fs/cgroup")))


def _of_host(file: Path) -> int:
    if not file.exists():  # no Linux: not known
        return sys.maxsize
    return int(_numbers(file)["MemAvailable:"]) << 10


def _of_container(folder: Path) -> int:
    """Of a control group; what files keep in memory is given up when it is needed."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used + int(_numbers(folder / "memory.stat")["file"])
    except (OSError, ValueError):  # there is none, or it has no limit
        return sys.maxsize


def _numbers(file: Path) -> dict[str, str]:
    return dict(line.split()[:2] for line in file.read_text().splitlines())  # type: ignore[misc]
