"""Assignments that found no room at their expert: counts -> shares. Pure numpy; counts are summed over ranks.

L MoE layers, E logical experts.
"""

import numpy as np


def drop_shares(asked_LE: np.ndarray, kept_LE: np.ndarray) -> np.ndarray:
    """Of the tokens that asked for each expert the share that was dropped, float [L, E]; 0 where none asked."""
    return (asked_LE - kept_LE) / np.maximum(asked_LE, 1)


def drop_summary(asked_LE: np.ndarray, kept_LE: np.ndarray) -> dict[str, float]:
    """moe/drop_rate (of all assignments), moe/drop_rate_layer (worst layer), moe/drop_rate_expert (worst expert)."""
    layers = drop_shares(asked_LE.sum(axis=1), kept_LE.sum(axis=1))
    return {
        "moe/drop_rate": float(drop_shares(asked_LE.sum(), kept_LE.sum())),
        "moe/drop_rate_layer": float(layers.max(initial=0.0)),
        "moe/drop_rate_expert": float(drop_shares(asked_LE, kept_LE).max(initial=0.0)),
    }
