"""A few numbers on their way from the device to the host."""

import numpy as np
import torch


class Readback:
    """A copy that starts now and is read later; reading waits for what was queued before it, and for nothing after.

    Args:
        values: on any device; they may change afterwards.
    """

    def __init__(self, values: torch.Tensor):
        self._event = None
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> np.ndarray:
        """The values as they were."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
