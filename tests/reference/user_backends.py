"""Backends as somebody outside of this package would write them, and collectives that are counted."""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from moe_train.moe.fused import FusedMoEBase
from moe_train.parallel import groups

COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather_object", "barrier", "broadcast", "new_group")
ALIASES = ("_ALL_GATHER", "_REDUCE_SCATTER")


class DenseMoE(FusedMoEBase):
    """Every token through every expert."""

    def forward(self, hidden_states, topk_indices, topk_weights, skip_shared_experts=False):
        x_TH, ids_TK, weights_TK = self.flatten(hidden_states, topk_indices, topk_weights)
        y_TH = torch.zeros_like(x_TH)
        for expert in range(self.num_experts):
            weight_T1 = (weights_TK * (ids_TK == expert)).sum(dim=1, keepdim=True)
            y_TH = y_TH + weight_T1 * self.experts.call_expert(expert, x_TH)
        if self.shared_experts is not None and not skip_shared_experts:
            y_TH = y_TH + self.run_shared_experts(x_TH)
        return y_TH.to(hidden_states.dtype).view(hidden_states.shape)


class ChosenOnlyMoE(FusedMoEBase):
    """Experts without a token are not called, so they are in no graph."""

    def forward(self, hidden_states, topk_indices, topk_weights, skip_shared_experts=False):
        x_TH, ids_TK, weights_TK = self.flatten(hidden_states, topk_indices, topk_weights)
        y_TH = torch.zeros_like(x_TH)
        for expert in ids_TK.unique().tolist():
            token, place = torch.where(ids_TK == expert)
            rows = weights_TK[token, place, None] * self.experts.call_expert(expert, x_TH[token])
            y_TH = y_TH.index_add(0, token, rows.to(y_TH.dtype))
        if self.shared_experts is not None and not skip_shared_experts:
            y_TH = y_TH + self.run_shared_experts(x_TH)
        return y_TH.view(hidden_states.shape)


@contextmanager
def counted_collectives():
    """A list that gets the name of every collective called in the context."""
    called: list[str] = []

    def counting(name, function):
        def count(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return count

    places = [(dist, name) for name in COLLECTIVES] + [(groups, name) for name in ALIASES]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in kept:
        setattr(place, name, counting(name, function))
    try:
        yield called
    finally:
        for place, name, function in kept:
            setattr(place, name, function)
