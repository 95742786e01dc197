"""What the MoE layers of one model share while a micro-batch runs: losses, counts, the routing to replay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moe_train.moe.dispatch import DispatchPlan
from moe_train.moe.statistics import ExpertClock, Watcher


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One layer's routing decision of the micro-batch in flight: expert ids as the router chose them."""

    topk_ids: torch.Tensor
    plan: DispatchPlan


class MoEContext:
    """Handed to every layer of a model when it is built; owned by whoever runs the model.

    counts_LE: tokens per layer and logical expert on this rank since the last `take_counts`, int64. Grows in training
        forwards only: not in evaluation, not in recompute.
    input_ids: of the forward in flight [B, S], for routers that hash them; None where nobody has set them.
    losses: sums over this micro-batch and all layers, with gradient, by name.
    score_sums: by layer, with gradient: this micro-batch's part of a loss over the whole optimizer step.
    watcher, clock: who wants to see routing decisions and to time the experts; None at most steps.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.input_ids: torch.Tensor | None = None
        self.losses: dict[str, torch.Tensor] = {}
        self.score_sums: dict[int, torch.Tensor] = {}
        self.watcher: Watcher | None = None
        self.clock: ExpertClock | None = None
        self._replays: dict[int, Replay] = {}
        self._recomputing = False

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around forward and backward of one micro-batch: starts with no losses and nothing to replay."""
        self.losses, self.score_sums, self._replays = {}, {}, {}
        try:
            yield
        finally:
            self.losses, self.score_sums, self._replays = {}, {}, {}

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """Around the second forward of activation checkpointing: replay, count nothing, add no loss."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def replay(self, layer: int) -> Replay | None:
        return self._replays[layer] if self._recomputing else None

    def record(self, layer: int, replay: Replay, counts_E: torch.Tensor) -> None:
        """Note a routing decision, and the tokens per expert that this rank answers for. Not in recompute."""
        assert not self._recomputing
        self._replays[layer] = replay
        self.counts_LE[layer] += counts_E

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        if not self._recomputing:
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_score_sums(self, layer: int, sums_E: torch.Tensor) -> None:
        if not self._recomputing:
            self.score_sums[layer] = sums_E

    def take_counts(self) -> torch.Tensor:
        """The counts since the last call, on this rank; starts again at zero."""
        taken = self.counts_LE.clone()
        self.counts_LE.zero_()
        return taken
