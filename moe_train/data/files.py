"""What every writer of this room needs: errors that tell about the disk, and a lock between processes of one host."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_train.errors import DataError


def write_error(path: Path, error: OSError) -> DataError:
    """The `DataError` for a failed write: path, the system's words, and the bytes free on that disk at this moment."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = f"{shutil.disk_usage(folder).free} bytes are free on that disk"
    except OSError:  # a disk that has gone away cannot be measured; the first error is the one to tell
        free = "its disk cannot be measured"
    return DataError(
        f"{path}: cannot be written: {error.strerror or error} (errno {error.errno}); {free}; "
        "make room or choose another folder"
    )


def read_error(path: Path, error: OSError) -> DataError:
    """The `DataError` for a failed read."""
    return DataError(f"{path}: cannot be read: {error.strerror or error} (errno {error.errno})")


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold `path` locked against other processes; waits for the holder. The kernel drops it when a process dies.

    The lock file stays: removing it would let a third process lock a new file of the same name meanwhile.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise DataError(
                f"{path}: cannot be locked: {error.strerror} (errno {error.errno}); set data.cache_dir to a local disk"
            ) from None
        yield
    finally:
        os.close(descriptor)
