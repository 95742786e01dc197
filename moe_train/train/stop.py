"""Being told to stop: SIGTERM, SIGINT or SIGUSR1 to any rank, or the launcher's death."""

import ctypes
import os
import signal
import sys
from types import FrameType

STOPPED_EXIT_CODE = 75
"""EX_TEMPFAIL: stopped on request after saving; the same command goes on from there."""


class StopRequest:
    """Set by a signal, read by the loop, agreed on by all ranks once per step.

    A second Ctrl-C ends the process at once. Any other repetition is ignored: a terminal or a scheduler signals every
    process, then DeepSpeed's launcher passes its own on, and then its death sends one more, all while a rank is saving.
    """

    def __init__(self):
        self.requested = False
        self.reason = ""
        self._interrupts = 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        _die_with_parent()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + number)
        if not self.requested:
            self.requested, self.reason = True, signal.Signals(number).name


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies, so that no rank is left behind holding its port and GPU."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
