"""What every room that writes files needs."""

import os
from pathlib import Path


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """All of it: a signal, or a request of more than 2 GiB, cuts a write short."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a renamed file is only there for good once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
