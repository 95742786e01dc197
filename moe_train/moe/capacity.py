"""Capacity: an expert takes so many tokens of a sequence, and the rest of its assignments are dropped.

T tokens, K experts per token.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from moe_train.moe.route import Routing
from moe_train.moe.router import Router
from moe_train.moe.sequences import Sequences, first_in_line

Drop = Literal["probability", "position"]
"""Who finds room first: the largest weight, or the earliest token."""


class CapacityRouter:
    """Another router, whose choice is dropped beyond ceil(factor * tokens * K / E) rows per expert and sequence.

    Switch Transformer (arXiv 2101.03961, equation 3) and Megatron take that over the tokens of one device's
    micro-batch, so that a result depends on how a batch is cut; over a sequence it does not. As there, a dropped
    assignment adds nothing to the output, its weight gets no gradient and the token's other weights are not scaled up;
    balancing losses and biases see what was asked for, not what found room. Ties are decided by position.

    By probability a later token of a sequence can take an earlier one's place, which is not causal; by position not.
    """

    uses_sequences = True
    ragged = False  # what an expert chooses has room

    def __init__(self, router: Router, factor: float, drop: Drop):
        # weights of dropped assignments become zero where the routing is made
        router.spec = replace(router.spec, partial=True)
        self.router, self.factor, self.drop = router, factor, drop
        self.spec, self.uses_input_ids = router.spec, router.uses_input_ids
        self.balanced, self.has_scores = router.balanced, router.has_scores

    @property
    def top_k(self) -> int:
        return self.router.top_k

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def route(
        self,
        gate: nn.Module,
        x_TH: torch.Tensor,
        input_ids_T: torch.Tensor | None = None,
        replay_TK: torch.Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> Routing:
        """Drops nothing without `sequences`, which an evaluation leaves out."""
        if replay_TK is None and sequences is not None:
            # as recompute will: both forwards must save the same tensors for backward
            replay_TK = self.choose(gate, x_TH, input_ids_T, sequences)
        return self.router.route(gate, x_TH, input_ids_T, replay_TK, sequences)

    @torch.no_grad()
    def choose(
        self, gate: nn.Module, x_TH: torch.Tensor, input_ids_T: torch.Tensor | None, sequences: Sequences
    ) -> torch.Tensor:
        """Ids [T, K], negative where there is no room."""
        routing = self.router.route(gate, x_TH, input_ids_T, None, sequences)
        ids_TK = routing.topk_ids_TK
        priority_TK = routing.topk_weights_TK if self.drop == "probability" else None
        room_S = sequences.rows_per_expert(self.factor, self.top_k, self.num_experts)
        kept_TK = first_in_line(ids_TK, priority_TK, sequences, room_S, self.num_experts)
        return torch.where(kept_TK, ids_TK, ~ids_TK)
