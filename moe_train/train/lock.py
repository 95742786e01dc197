"""One job at a time in a run's folder: two would remove each other's unfinished checkpoints and mix their metrics."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from moe_train.errors import ConfigError

LOCK = "run.lock"


class RunLock:
    """Of a run's folder, a context manager; the kernel drops it when the process dies, however it dies.

    Where the file system has no locks, what the file says decides: who has it, or nothing once that one has ended. The
    file stays: removing it would let a third job lock a new file of the same name meanwhile.

    Raises `ConfigError` naming the job that has it, OSError if the file cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.path = run_dir, run_dir / LOCK
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take()
            self._write({**_me(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self._write({})
        os.close(self._descriptor)

    def _take(self) -> None:
        holder = self._holder()
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self._in_use(holder)}; wait for it or stop it, or give another --run-dir") from None
        except OSError:  # a file system without locks
            if _may_live(holder):
                raise ConfigError(
                    f"{self._in_use(holder)}; wait for it or stop it; if it has ended, remove {self.path}"
                ) from None

    def _in_use(self, holder: dict[str, Any]) -> str:
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another job"
        return f"--run-dir {self.run_dir} is in use by {who}"

    def _holder(self) -> dict[str, Any]:
        """Empty: nobody, or somebody whose last write was cut short."""
        try:
            found = json.loads(os.pread(self._descriptor, 1 << 16, 0))
        except ValueError:
            return {}
        whole = isinstance(found, dict) and found.keys() >= {"host", "pid", "ticks", "since"}
        return found if whole else {}

    def _write(self, content: dict[str, Any]) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(content).encode() + b"\n", 0)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "ticks": _started(os.getpid())}


def _may_live(holder: dict[str, Any]) -> bool:
    """Of another host nothing is known. A process's number is given again, its starting time is not."""
    if not holder or holder["host"] != socket.gethostname():
        return bool(holder)
    return _started(holder["pid"]) == holder["ticks"]


def _started(pid: int) -> int | None:
    """Clock ticks from the host's start to the process's; None: there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
