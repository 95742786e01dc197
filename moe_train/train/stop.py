"""Being told to stop: SIGTERM, SIGINT or SIGUSR1 to any rank, or the launcher's death."""

import ctypes
import os
import signal
import sys
from types import FrameType

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL: stopped on request after saving; the same command goes on from there."""


class StopRequest:
    """Set by a signal, read by the loop, agreed on by all ranks once per step. A second signal ends the process at once."""

    def __init__(self):
        self.requested = False
        self.reason = ""

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        _die_with_parent()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested, self.reason = True, signal.Signals(number).name


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies, so that no rank is left behind holding its port and GPU."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
