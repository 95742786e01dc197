"""Sums of one optimizer step over all ranks -> figures of its routing. Pure numpy.

L MoE layers, E logical experts, W ranks of the world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_train.diagnostics.load import layer_figures


def router_figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over a step's tokens, by layer [L]; nan where no token had logits (a layer that routes by a table, say).

    confidence: largest share of the scores. topk_mass: share of the chosen ones together, before they are normalised.
    logit_rms: root mean square of the router's logits. logsumexp: of the logits; what the z-loss squares.

    Args:
        sums: over tokens, [L] each: tokens, top_share, chosen_share, logit_square, logsumexp.
    """
    tokens_L = np.where(sums["tokens"] > 0, sums["tokens"], np.nan)
    return {
        "confidence": sums["top_share"] / tokens_L,
        "topk_mass": sums["chosen_share"] / tokens_L,
        "logit_rms": np.sqrt(sums["logit_square"] / tokens_L),
        "logsumexp": sums["logsumexp"] / tokens_L,
    }


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
    """P(j | i): of the tokens that chose expert i, the share that chose j too [L, E, E]; 1 on the diagonal, a row of 0
    where nobody chose i. Over all pairs of a token's top-k (OLMoE, arXiv 2409.02060, section 5.2).

    Args:
        pairs_LEE: tokens that chose both i and j; on the diagonal those that chose i.
    """
    chosen_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    return np.where(chosen_LE[..., None] > 0, pairs_LEE / np.where(chosen_LE > 0, chosen_LE, 1)[..., None], 0.0)


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """How a step's rows and time lay on the ranks, by layer and rank of the world [L, W], or by layer [L].

    received_LW: rows of routed experts and, on ranks kept for it, of the shared one. peak_L: most rows that one
    rank had in one micro-batch, over what it would have had at perfect balance. sent_LW, saved_LW: bytes that left
    the rank, and how many fewer its own tokens would take, there and back, if each went once to each rank. lost_LW:
    milliseconds that a rank waits for the slowest of its EP group; lost_L: their mean over the group's ranks, of
    the worst group: time of the slowest rank's experts x (1 - mean / max rows). drop_rate_L: choices that reached
    no expert. Zeros where times are unknown.
    """

    received_LW: np.ndarray
    peak_L: np.ndarray
    sent_LW: np.ndarray
    saved_LW: np.ndarray
    lost_LW: np.ndarray
    lost_L: np.ndarray
    drop_rate_L: np.ndarray


def rank_figures(
    rows: Mapping[str, np.ndarray],
    chosen_L: np.ndarray,
    groups: Sequence[Sequence[int]],
    *,
    shared_ranks: int = 0,
    copies: int = 1,
    micro_batches: int = 1,
    row_bytes: tuple[int, int] = (1, 1),
) -> RankFigures:
    """Figures of a step.

    Args:
        rows: [L, W] each: received, peak, sent, returned and saved rows; timed_rows and ms, the rows and the
            milliseconds of the step that was timed.
        chosen_L: tokens x top-k of the step, by layer.
        groups: the ranks of each EP group.
        shared_ranks: how many ranks at the start of each group hold the shared expert alone.
        copies: how many ranks compute each row together (expert tensor parallelism).
        micro_batches: forwards per step and rank.
        row_bytes: bytes that leave a rank in a step for a row of its own that it sends, and for one of others that it
            returns.
    """
    lost_LW, costs, peaks = np.zeros_like(rows["ms"]), [], []
    received = np.zeros(len(chosen_L))
    for ranks in groups:
        routed = list(ranks[shared_ranks:])
        received += rows["received"][:, routed].sum(axis=1)
        balanced_L = rows["received"][:, routed].mean(axis=1) / micro_batches
        peaks.append(_ratio(rows["peak"][:, routed].max(axis=1), balanced_L))
        timed_LR = rows["timed_rows"][:, routed]
        slowest_L1 = rows["ms"][:, routed].max(axis=1, keepdims=True)
        idle_LR = slowest_L1 * (1 - _ratio(timed_LR, timed_LR.max(axis=1, keepdims=True), empty=1.0))
        lost_LW[:, routed] = idle_LR
        costs.append(idle_LR.mean(axis=1))
    return RankFigures(
        received_LW=rows["received"],
        peak_L=np.max(peaks, axis=0),
        sent_LW=rows["sent"] * row_bytes[0] + rows["returned"] * row_bytes[1],
        saved_LW=rows["saved"] * sum(row_bytes),
        lost_LW=lost_LW,
        lost_L=np.max(costs, axis=0),
        drop_rate_L=np.where(chosen_L > 0, 1 - _ratio(received / copies, chosen_L), 0.0),
    )


def _ratio(top: np.ndarray, bottom: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), empty)


def step_summary(counts_LE: np.ndarray, router: Mapping[str, np.ndarray], ranks: RankFigures) -> dict[str, float]:
    """A few metrics of all layers together, of one optimizer step.

    moe/max_vio_batch (worst layer) and moe/max_vio_batch_mean: MaxVio of this batch (arXiv 2408.15664, section 4.1).
    Means over layers of the router's figures, moe/drop_rate, moe/peak_rows (worst layer). On more than one rank
    perf/wire_mb and perf/wire_spared_mb (MB per rank, and what one row for each copy would take more) and
    perf/skew_ms (lost by all layers together).
    """
    batch = layer_figures(counts_LE)
    routed_L = batch.tokens_L > 0
    metrics = {
        "moe/max_vio_batch": float(batch.max_vio_L.max(initial=0.0)),
        "moe/max_vio_batch_mean": float(batch.max_vio_L.sum() / max(routed_L.sum(), 1)),
        "moe/drop_rate": float(ranks.drop_rate_L.mean()),
        "moe/peak_rows": float(ranks.peak_L.max()),
    }
    for name, values_L in router.items():
        if np.isfinite(values_L).any():
            metrics[f"moe/{name}"] = float(np.nanmean(values_L))
    world = ranks.sent_LW.shape[1]
    if world > 1:
        metrics["perf/wire_mb"] = float(ranks.sent_LW.sum() / world / 1e6)
        metrics["perf/wire_spared_mb"] = float(ranks.saved_LW.sum() / world / 1e6)
        metrics["perf/skew_ms"] = float(ranks.lost_L.sum())
    return metrics
