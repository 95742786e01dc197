"""Learning rate as a pure function of the step."""

import math

from moe_train.config.schema import ScheduleSection


def lr_factor(section: ScheduleSection, step: int, total: int) -> float:
    """Share of the peak learning rate for optimizer step `step` (0-based) of `total`.

    Warmup is linear and reaches the peak at its last step. cosine, linear: from the peak to `min_lr_ratio` at the last
    step. wsd (MiniCPM, arXiv 2404.06395): constant, then linear over the last `decay_steps`.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    low = section.min_lr_ratio
    if section.kind == "constant":
        return 1.0
    first = section.warmup_steps
    if section.kind == "wsd":
        first = max(first, total - (section.decay_steps or max(total // 10, 1)))
    done = min(max((step + 1 - first) / max(total - first, 1), 0.0), 1.0)
    if section.kind == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - (1 - low) * done
