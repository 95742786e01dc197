"""Expert load: token counts -> figures. Pure numpy; counts come in already summed over ranks.

Shape legend: L MoE layers, E logical experts, R expert-parallel ranks, S snapshots.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LoadFigures:
    """Balance of each MoE layer. A layer that routed no token has 0 in every array, so nothing is ever nan."""

    tokens_L: np.ndarray
    """int64, tokens x top_k routed in the layer."""
    max_vio_L: np.ndarray
    """(max - mean) / mean over experts: 0 balanced, E - 1 all on one expert (arXiv 2408.15664, eq. 4)."""
    max_over_mean_L: np.ndarray
    """max / mean: 1 balanced; always max_vio + 1 where tokens were routed."""
    cv_L: np.ndarray
    """Coefficient of variation: population standard deviation / mean."""
    entropy_L: np.ndarray
    """Shannon entropy of the shares / log E: 1 balanced, 0 all on one expert; 1 where E is 1."""
    dead_L: np.ndarray
    """int64, experts without a token."""


def layer_figures(counts_LE: np.ndarray) -> LoadFigures:
    """Figures of `counts_LE`, tokens routed per layer and logical expert (integers, not negative).

    Raises ValueError for another shape, no expert, or a negative count.
    """
    counts_LE = _checked(counts_LE)
    num_experts = counts_LE.shape[1]
    tokens_L = counts_LE.sum(axis=1)
    routed_L = tokens_L > 0
    # 1 instead of 0 keeps the divisions defined; the empty layers are set to 0 below
    shares_LE = counts_LE / np.where(routed_L, tokens_L, 1)[:, None]
    relative_LE = shares_LE * num_experts
    max_over_mean_L = relative_LE.max(axis=1)
    logs_LE = np.log(np.where(shares_LE > 0, shares_LE, 1.0))
    entropy_L = -(shares_LE * logs_LE).sum(axis=1) / np.log(num_experts) if num_experts > 1 else np.ones(len(tokens_L))
    return LoadFigures(
        tokens_L=tokens_L,
        max_vio_L=np.where(routed_L, max_over_mean_L - 1.0, 0.0),
        max_over_mean_L=np.where(routed_L, max_over_mean_L, 0.0),
        cv_L=np.where(routed_L, relative_LE.std(axis=1), 0.0),
        # rounding may leave it a few ulps outside [0, 1]
        entropy_L=np.where(routed_L, np.clip(entropy_L, 0.0, 1.0), 0.0),
        dead_L=np.where(routed_L, (counts_LE == 0).sum(axis=1), 0),
    )


def rank_imbalance(tokens_LR: np.ndarray) -> np.ndarray:
    """max / mean of the tokens of each expert-parallel rank, one float per layer: what the slowest rank costs.

    A rank without experts is one with 0 tokens. A layer that routed no token gives 0.
    """
    mean_L = tokens_LR.mean(axis=1)
    return np.where(mean_L > 0, tokens_LR.max(axis=1) / np.where(mean_L > 0, mean_L, 1.0), 0.0)


def summary(counts_LE: np.ndarray, tokens_LR: np.ndarray | None = None) -> dict[str, float]:
    """A few metrics of all layers together; layers that routed no token are left out of the means.

    moe/max_vio (worst layer), moe/max_vio_mean, moe/cv_mean, moe/entropy_mean, moe/dead_experts (sum over layers);
    with `tokens_LR`, per layer and rank of an EP group, also moe/rank_imbalance (worst layer). All 0 where nothing was
    routed at all.
    """
    figures = layer_figures(counts_LE)
    routed_L = figures.tokens_L > 0
    num_routed = max(int(routed_L.sum()), 1)
    metrics = {
        "moe/max_vio": float(figures.max_vio_L.max(initial=0.0)),
        "moe/max_vio_mean": float(figures.max_vio_L.sum() / num_routed),
        "moe/cv_mean": float(figures.cv_L.sum() / num_routed),
        "moe/entropy_mean": float(figures.entropy_L.sum() / num_routed),
        "moe/dead_experts": float(figures.dead_L.sum()),
    }
    if tokens_LR is not None:
        metrics["moe/rank_imbalance"] = float(rank_imbalance(tokens_LR).max(initial=0.0))
    return metrics


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Tokens routed between two log steps."""

    first_step: int
    """The first log step that is in it."""
    last_step: int
    """The last one."""
    num_adds: int
    """How many log steps were added up."""
    counts_LE: np.ndarray
    """int64."""

    def merged(self, later: "Snapshot") -> "Snapshot":
        """This one and the one after it as one."""
        return Snapshot(
            first_step=self.first_step,
            last_step=later.last_step,
            num_adds=self.num_adds + later.num_adds,
            counts_LE=self.counts_LE + later.counts_LE,
        )


class LoadHistory:
    """Counts over a whole run in bounded memory.

    Every snapshot holds the same number of log steps (the last one perhaps fewer), so that their MaxVio can be
    compared. When there would be more than `limit` of them, neighbours are merged and that number doubles.
    """

    def __init__(self, max_snapshots: int = 256, max_values: int = 2**20):
        """At most `max_snapshots` snapshots, fewer (but 16) where they would hold over `max_values` numbers."""
        self.max_snapshots = max_snapshots
        self.max_values = max_values
        self.adds_per_snapshot = 1
        self.snapshots: list[Snapshot] = []

    def add(self, step: int, counts_LE: np.ndarray) -> None:
        """Add the tokens routed since the previous log step, int [L, E]; steps must grow, shapes stay."""
        counts_LE = _checked(counts_LE).astype(np.int64)
        new = Snapshot(first_step=step, last_step=step, num_adds=1, counts_LE=counts_LE)
        if not self.snapshots:
            self.snapshots.append(new)
            return
        last = self.snapshots[-1]
        if step <= last.last_step:
            raise ValueError(f"step {step} comes after step {last.last_step}")
        if counts_LE.shape != last.counts_LE.shape:
            raise ValueError(f"counts of shape {counts_LE.shape} after {last.counts_LE.shape}")
        if last.num_adds < self.adds_per_snapshot:
            self.snapshots[-1] = last.merged(new)
        else:
            self.snapshots.append(new)
        if len(self.snapshots) > self.limit:
            self._halve()

    @property
    def limit(self) -> int:
        """Snapshots kept, given the size of one."""
        size = self.snapshots[0].counts_LE.size if self.snapshots else 1
        return min(self.max_snapshots, max(16, self.max_values // size))

    @property
    def steps_S(self) -> np.ndarray:
        """int64, the last step of each snapshot."""
        return np.array([snapshot.last_step for snapshot in self.snapshots], dtype=np.int64)

    @property
    def totals_LE(self) -> np.ndarray:
        """int64, tokens of the whole run; shape (0, 0) before the first `add`."""
        if not self.snapshots:
            return np.zeros((0, 0), dtype=np.int64)
        return np.sum([snapshot.counts_LE for snapshot in self.snapshots], axis=0)

    def max_vio_SL(self) -> np.ndarray:
        """MaxVio of each snapshot and layer."""
        if not self.snapshots:
            return np.zeros((0, 0))
        return np.stack([layer_figures(snapshot.counts_LE).max_vio_L for snapshot in self.snapshots])

    def state_dict(self) -> dict[str, Any]:
        """Plain ints and lists, for JSON."""
        return {
            "adds_per_snapshot": self.adds_per_snapshot,
            "snapshots": [
                {
                    "first_step": snapshot.first_step,
                    "last_step": snapshot.last_step,
                    "num_adds": snapshot.num_adds,
                    "counts": snapshot.counts_LE.tolist(),
                }
                for snapshot in self.snapshots
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by what `state_dict` gave."""
        self.adds_per_snapshot = int(state["adds_per_snapshot"])
        self.snapshots = [
            Snapshot(
                first_step=int(entry["first_step"]),
                last_step=int(entry["last_step"]),
                num_adds=int(entry["num_adds"]),
                counts_LE=_checked(np.asarray(entry["counts"], dtype=np.int64)),
            )
            for entry in state["snapshots"]
        ]

    def _halve(self) -> None:
        pairs = [self.snapshots[index : index + 2] for index in range(0, len(self.snapshots), 2)]
        self.snapshots = [pair[0].merged(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
        self.adds_per_snapshot *= 2


def _checked(counts_LE: np.ndarray) -> np.ndarray:
    counts_LE = np.asarray(counts_LE)
    if counts_LE.ndim != 2 or counts_LE.shape[1] == 0:
        raise ValueError(f"counts must have the shape [layers, experts], not {list(counts_LE.shape)}")
    if not np.issubdtype(counts_LE.dtype, np.integer):
        raise ValueError(f"counts must be integers, not {counts_LE.dtype}")
    if counts_LE.size and counts_LE.min() < 0:
        raise ValueError("counts must not be negative")
    return counts_LE
