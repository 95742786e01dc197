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
    kept_LE: those of them that were not dropped, counted alike; None where nothing is ever dropped.
    logit_squares_L: sum over the same tokens of the mean square of a layer's router logits, float64; None: not wanted.
    quantiles_LE: `quantile_sums` of the same sequences, float64; None: not wanted.
    input_ids: of the forward in flight [B, S], for routers that hash them; None where nobody has set them.
    first_sequence: number of the first sequence of the forward in flight, among all that a run reads.
    losses: sums over this micro-batch and all layers, with gradient, by name.
    score_sums: by layer, with gradient: this micro-batch's part of a loss over the whole optimizer step.
    watcher, clock: who wants to see routing decisions and to time the experts; None at most steps.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.kept_LE: torch.Tensor | None = None
        self.logit_squares_L: torch.Tensor | None = None
        self.quantiles_LE: torch.Tensor | None = None
        self.input_ids: torch.Tensor | None = None
        self.first_sequence = 0
        self.losses: dict[str, torch.Tensor] = {}
        self.score_sums: dict[int, torch.Tensor] = {}
        self.watcher: Watcher | None = None
        self.clock: ExpertClock | None = None
        self._replays: dict[int, Replay] = {}
        self._recomputing = False

    @contextmanager
    def micro_batch(self, first_sequence: int = 0) -> Iterator[None]:
        """Around forward and backward of one micro-batch: starts with no losses and nothing to replay."""
        self.first_sequence = first_sequence
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

    def record(self, layer: int, replay: Replay, counts_E: torch.Tensor, kept_E: torch.Tensor | None = None) -> None:
        """Note a routing decision, and the tokens per expert that this rank answers for. Not in recompute."""
        assert not self._recomputing
        self._replays[layer] = replay
        self.counts_LE[layer] += counts_E
        if self.kept_LE is not None:
            self.kept_LE[layer] += counts_E if kept_E is None else kept_E

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        if not self._recomputing:
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_quantiles(self, layer: int, quantiles_E: torch.Tensor) -> None:
        assert self.quantiles_LE is not None
        if not self._recomputing:
            self.quantiles_LE[layer] += quantiles_E

    def add_logits(self, layer: int, logits_TE: torch.Tensor) -> None:
        if self.logit_squares_L is not None and not self._recomputing:
            self.logit_squares_L[layer] += logits_TE.detach().double().square().mean(dim=1).sum()

    def add_score_sums(self, layer: int, sums_E: torch.Tensor) -> None:
        if not self._recomputing:
            self.score_sums[layer] = sums_E

    def take_counts(self) -> torch.Tensor:
        """The counts since the last call, on this rank; starts again at zero."""
        return _take(self.counts_LE)

    def take_kept(self) -> torch.Tensor | None:
        """`kept_LE` since the last call; starts again at zero."""
        return None if self.kept_LE is None else _take(self.kept_LE)

    def take_quantiles(self) -> torch.Tensor | None:
        return None if self.quantiles_LE is None else _take(self.quantiles_LE)

    def take_logit_squares(self) -> torch.Tensor | None:
        return None if self.logit_squares_L is None else _take(self.logit_squares_L)


def _take(sums: torch.Tensor) -> torch.Tensor:
    taken = sums.clone()
    sums.zero_()
    return taken
