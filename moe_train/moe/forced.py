"""Forced loads for benchmarks: which experts a token has is decided by its place, not by the router.

T tokens, E experts, K experts per token.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from moe_train.errors import RoutingError
from moe_train.moe.route import RouterSpec
from moe_train.moe.router import ScoreRouter, TensorOf
from moe_train.moe.sequences import Sequences

GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927
"""Multiples of irrational numbers fill [0, 1) evenly."""


class ForcedRouter(ScoreRouter):
    """The family's weights of experts that its scores did not choose. An evaluation routes as the family does.

    shares: of the rows that each expert gets (see `expert_shares`); None: all alike, within one row per sequence.
    """

    uses_sequences = True
    balanced = False

    def __init__(self, spec: RouterSpec, bias: TensorOf | None = None, shares: Sequence[float] | None = None):
        super().__init__(spec, bias)
        self.shares = None if shares is None else tuple(shares)

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        if replay_TK is None and sequences is not None:
            replay_TK = self.choose(sequences)
        return super().route(gate, x_TH, input_ids_T, replay_TK)

    @torch.no_grad()
    def choose(self, sequences: Sequences) -> torch.Tensor:
        """Ids [T, K]; K different experts, but for rounding."""
        number_T, place_T = sequences.number_T, sequences.place_T
        turn_K = torch.arange(self.top_k, device=place_T.device)
        if self.shares is None:
            return (place_T.unsqueeze(1) * self.top_k + turn_K + number_T.unsqueeze(1)) % self.num_experts
        # systematic sampling: K points one apart, over experts laid end to end at K times their shares
        ends_E = torch.tensor([*accumulate(self.shares)], dtype=torch.float64, device=place_T.device) * self.top_k
        start_T = (place_T * GOLDEN + number_T * PLASTIC) % 1.0
        points_TK = start_T.unsqueeze(1) + turn_K
        return torch.searchsorted(ends_E, points_TK, right=True).clamp(max=self.num_experts - 1)


def expert_shares(weights: Sequence[float], top_k: int) -> tuple[float, ...]:
    """Shares of the rows, sum 1, in proportion to the weights; none above 1 / K, as a token has an expert once, and
    what is cut off goes to the others.

    Raises `RoutingError` if fewer than K weights are above 0.
    """
    if sum(weight > 0 for weight in weights) < top_k:
        raise RoutingError(
            f"a forced load has {sum(weight > 0 for weight in weights)} experts above 0, and top-k is {top_k}: give at "
            "least as many"
        )
    full: set[int] = set()
    while True:
        rest = sum(weight for expert, weight in enumerate(weights) if expert not in full)
        free = 1 - len(full) / top_k
        shares = [1 / top_k if e in full else weight / rest * free if rest else 0.0 for e, weight in enumerate(weights)]
        over = {expert for expert, share in enumerate(shares) if expert not in full and share > 1 / top_k}
        if not over:
            return tuple(shares)
        full |= over
