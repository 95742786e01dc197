"""The same metrics as TensorBoard's event files, in RUN_DIR/tensorboard, where `tracking.tensorboard` asks for them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.diagnostics.redact import redact_text


class TensorBoard:
    """Writes until something fails; then it warns once and stays silent, and the run goes on.

    Args:
        warn: gets that one line.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self._warn = warn
        self._writer: Any = None
        self._do(lambda: self._start(run_dir))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Scalars at `step`; what is no number, or not finite, is left out."""

        def write() -> None:
            for key, value in metrics.items():
                if math.isfinite(number := float(value)):
                    self._writer.add_scalar(key, number, step)

        self._with_writer(write)

    def image(self, step: int, key: str, pixels_HWC: np.ndarray) -> None:
        """uint8 [height, width, 3]."""
        self._with_writer(lambda: self._writer.add_image(key, pixels_HWC, step, dataformats="HWC"))

    def histogram(self, step: int, key: str, values: np.ndarray) -> None:
        """Of numbers of any shape."""
        self._with_writer(lambda: self._writer.add_histogram(key, values.reshape(-1), step))

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._with_writer(lambda: self._writer.close())
        self._writer = None

    def _start(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError("the package is missing: pip install 'moe_train[tensorboard]'") from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def _with_writer(self, action: Callable[[], None]) -> None:
        if self._writer is not None:
            self._do(action)

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a copy of the metrics is no reason to stop training
            self._writer = None
            reason = redact_text(str(error).strip().split("\n")[0])[:200]
            self._warn(f"tensorboard is off ({type(error).__name__}: {reason}); metrics.jsonl goes on")
