"""Rules on expert loads: when one has held long enough, and what is then to be done. Pure numpy.

Counts come in already summed over ranks, so every rank finds the same at the same step and may act together.
L MoE layers, E logical experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train.config.schema import GuardSection
from moe_train.diagnostics.load import layer_figures


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A rule that has just held for `rule.steps` steps in a row. layer: where it is worst, or first. found: of the
    last step there: experts without a token, normalised entropy, MaxVio, or the logits' root mean square; reference:
    the latter at the step that it is compared with."""

    rule: GuardSection
    layer: int
    found: float
    reference: float = 0.0

    def __str__(self) -> str:
        rule = self.rule
        what = {
            "dead_experts": f"{self.found:.0f} experts without a token",
            "entropy_below": f"entropy {self.found:.3f} below {rule.value}",
            "max_vio_above": f"MaxVio {self.found:.2f} above {rule.value}",
            "router_logit_growth": f"router logits of size {self.found:.3g} (RMS), more than {rule.value} x the "
            f"{self.reference:.3g} of step {rule.reference_step},",
        }[rule.when]
        return f"MoE layer {self.layer}: {what} for {rule.steps} steps"


class LoadGuards:
    """Counts for how many steps in a row each rule has held, and starts again once it has been reported.

    Args:
        watched: layers whose choice can be balanced; the others are not looked at.
    """

    def __init__(self, rules: Sequence[GuardSection], num_layers: int, num_experts: int, watched: Sequence[int]):
        self.rules, self.watched = tuple(rules), list(watched)
        self.references: dict[str, list[float]] = {}  # by number of the rule, of each layer
        self.streaks = [
            np.zeros((num_layers, num_experts if rule.when == "dead_experts" else 1), np.int64) for rule in self.rules
        ]

    def look(self, counts_LE: np.ndarray, step: int = 0, logit_rms_L: np.ndarray | None = None) -> list[Alarm]:
        """One optimizer step's tokens per layer and expert, int [L, E] -> the rules that have held long enough now.

        Args:
            step: its number. logit_rms_L: root mean square of each layer's router logits, for rules on them.
        """
        figures = layer_figures(counts_LE)
        alarms = []
        for number, (rule, streak) in enumerate(zip(self.rules, self.streaks, strict=True)):
            reference_L = np.zeros(len(streak))
            if rule.when == "router_logit_growth":
                assert logit_rms_L is not None
                assert rule.reference_step is not None
                if step < rule.reference_step:
                    continue
                reference_L = np.asarray(self.references.setdefault(str(number), logit_rms_L.tolist()))
                badness_L = logit_rms_L / np.maximum(reference_L, 1e-30)
                holds = (logit_rms_L > rule.value * reference_L)[:, None]
            elif rule.when == "dead_experts":
                holds, badness_L = counts_LE == 0, figures.dead_L
            elif rule.when == "entropy_below":
                holds, badness_L = (figures.entropy_L < rule.value)[:, None], -figures.entropy_L
            else:
                holds, badness_L = (figures.max_vio_L > rule.value)[:, None], figures.max_vio_L
            streak[...] = np.where(holds, streak + 1, 0)
            ripe = [layer for layer in self.watched if streak[layer].max() >= rule.steps]
            if ripe:
                layer = max(ripe, key=lambda layer: badness_L[layer])
                found = int((streak[layer] >= rule.steps).sum()) if rule.when == "dead_experts" else badness_L[layer]
                if rule.when == "router_logit_growth":
                    found = found * reference_L[layer]
                alarms.append(
                    Alarm(rule=rule, layer=layer, found=abs(float(found)), reference=float(reference_L[layer]))
                )
                streak[...] = 0
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rules": [rule.model_dump(mode="json") for rule in self.rules],
            "streaks": [streak.tolist() for streak in self.streaks],
            "references": dict(self.references),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; other rules than then start at zero."""
        if state.get("rules") == [rule.model_dump(mode="json") for rule in self.rules]:
            self.streaks = [np.asarray(streak, np.int64) for streak in state["streaks"]]
            self.references = dict(state.get("references", {}))
