"""What metrics.jsonl says of every layer and expert, every so many steps: the `load` events.

L MoE layers, E logical experts.
"""

from typing import Any

import numpy as np


class LayerRecorder:
    """Adds up counts until the next record is due.

    Args:
        interval: optimizer steps between records; a record is made at the first log step at or after each multiple.
            0: never.
    """

    def __init__(self, interval: int, num_layers: int, num_experts: int):
        self.interval = interval
        self.recorded_step = 0
        self.counts_LE = np.zeros((num_layers, num_experts), np.int64)

    def add(self, counts_LE: np.ndarray) -> None:
        """Tokens routed since the previous call, over all ranks."""
        self.counts_LE += counts_LE

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether the log step `step` is one with a record; the run's last one always is."""
        if not self.interval:
            return False
        return last or step // self.interval > self.recorded_step // self.interval

    def take(self, step: int) -> dict[str, Any]:
        """The counts since the last record, as fields of an event; starts again at zero."""
        fields = {"step": step, "first_step": self.recorded_step + 1, "counts": self.counts_LE.tolist()}
        self.recorded_step = step
        self.counts_LE = np.zeros_like(self.counts_LE)
        return fields

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"step": self.recorded_step, "counts": self.counts_LE.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; an empty one changes nothing."""
        if state:
            self.recorded_step = int(state["step"])
            self.counts_LE = np.asarray(state["counts"], np.int64)
