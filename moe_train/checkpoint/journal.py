"""What an unfinished reshard has finished: a file beside its data that says which files are whole.

First line: what is being made of what. Then one line per finished file, written after the file is on the disk.
"""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from moe_train.checkpoint.manifest import FILE_NAME, FileEntry
from moe_train.errors import CheckpointError

JOURNAL = "reshard.jsonl"


class Journal:
    """Of a folder, which is locked while this is open.

    Args:
        identity: what is being made of what; a folder of something else is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path, self.finished = folder / JOURNAL, {}
        self._lock = threading.Lock()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CheckpointError(f"{folder} is being written by another reshard: wait for it") from None
        self._resume(folder, identity)

    def _resume(self, folder: Path, identity: dict[str, Any]) -> None:
        known, end = None, 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # it was being written when the process died
            try:
                entry = json.loads(line)
                if known is None:
                    known = entry["reshard"]
                elif FILE_NAME.fullmatch(entry["file"]):
                    self.finished[entry["file"]] = FileEntry(bytes=entry["bytes"], sha256=entry["sha256"])
            except (ValueError, TypeError, KeyError):
                break
            end += len(line)
        if known is not None and known != identity:
            self._file.close()
            raise CheckpointError(
                f"{folder} is an unfinished reshard of something else ({_differing(known, identity)}): finish that "
                "one, remove the folder or give another destination"
            )
        self._file.seek(end)
        self._file.truncate()
        if known is None:
            self._append({"reshard": identity})

    def add(self, name: str, entry: FileEntry) -> None:
        """A file is whole and on the disk."""
        with self._lock:
            self.finished[name] = entry
            self._append({"file": name, "bytes": entry.bytes, "sha256": entry.sha256})

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


def _differing(known: Any, identity: dict[str, Any]) -> str:
    if not isinstance(known, dict):
        return "its journal is of another program"
    return ", ".join(
        f"{key}: {known.get(key)}, now {value}" for key, value in identity.items() if known.get(key) != value
    )
