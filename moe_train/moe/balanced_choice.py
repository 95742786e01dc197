"""Routers whose choice is balanced by itself, over one sequence at a time. Neither is causal: see each.

T tokens, H hidden size, S sequences of P tokens, E experts, K experts per token.
"""

from dataclasses import replace

import torch

from moe_train.errors import RoutingError
from moe_train.moe.route import RouterSpec, choose_experts, score_experts
from moe_train.moe.router import ScoreRouter, TensorOf
from moe_train.moe.sequences import Sequences, first_in_line

SINKHORN_ROUNDS = 32
"""A fixed number: where to stop must not depend on rounding."""


class _SequenceRouter(ScoreRouter):
    """Training chooses by `choose`, without gradient; an evaluation as the family does, like an exported model."""

    uses_sequences = True

    def __init__(self, spec: RouterSpec, bias: TensorOf | None = None):
        super().__init__(spec, bias)
        if spec.num_groups > 1 or spec.score == "softmax_after_topk":
            raise RoutingError(
                f"n_group ({spec.num_groups}) and score ({spec.score}): moe.router can be expert_choice or sinkhorn "
                "only where a token may have any expert and each has a score of its own; set model.config.n_group and "
                "topk_group to 1 or moe.router to top_k"
            )

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        logits = gate(x_TH)
        if replay_TK is None and sequences is not None:
            replay_TK = self.choose(logits.detach(), sequences)
        return self._score(gate, logits, x_TH.shape[0], replay_TK)

    def choose(self, logits_TE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Ids [T, K]."""
        raise NotImplementedError


class ExpertChoiceRouter(_SequenceRouter):
    """Each expert takes the ceil(tokens * K / E) tokens of a sequence that score it highest (arXiv 2202.09368).

    The paper lets it choose among all tokens of a batch; over a sequence the choice does not depend on how a batch is
    cut. Loads are equal in every sequence; a token has 0 to E experts, K on average, weighed by the family's rule: with
    `norm_topk_prob` they are divided by the sum over the experts that took the token, without it they are the scores,
    as in the paper. Equal scores go to the earlier token.

    Whether a token finds an expert depends on later tokens of its sequence, so that a language model trained this way
    learns from what it cannot see when it generates.
    """

    ragged = True

    def __init__(self, spec: RouterSpec, bias: TensorOf | None = None):
        super().__init__(replace(spec, partial=True), bias)

    @torch.no_grad()
    def choose(self, logits_TE, sequences):
        scores_TE = score_experts(logits_TE, self.spec.score)
        size = self.num_experts
        every_TE = torch.arange(size, device=scores_TE.device).expand_as(scores_TE)
        room_S = sequences.rows_per_expert(1.0, self.top_k, size)
        taken_TE = first_in_line(every_TE, scores_TE, sequences, room_S, size)
        widest = int(taken_TE.sum(dim=1).max()) if len(taken_TE) else 0
        ids_TK = torch.where(taken_TE, every_TE, size).sort(dim=1).values[:, : max(widest, 1)]
        return torch.where(ids_TK == size, ~size, ids_TK)


class SinkhornRouter(_SequenceRouter):
    """The K best experts of a token after every expert's logits were shifted so that a soft assignment is balanced.

    Entropic optimal transport as in S-BASE (Clark et al., arXiv 2202.01169) and Megatron's sinkhorn router: the matrix
    exp(logits) of a sequence is scaled to equal sums per token and per expert, here in logarithms and in a fixed number
    of rounds. Weights are the family's, of the logits as they are. Hard choices of a balanced soft assignment are
    nearly balanced, not exactly. The shifts look at all tokens of the sequence, later ones included.
    """

    @torch.no_grad()
    def choose(self, logits_TE, sequences):
        plain = replace(self.spec, has_bias=False)
        shifts_SE = balancing_shifts(logits_TE, sequences)
        return choose_experts(logits_TE + shifts_SE[sequences.index_T], plain, None)


def balancing_shifts(logits_TE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """What to add to the logits of each expert [S, E], so that the softmax over experts, summed over the tokens of a
    sequence, is the same for every expert, as nearly as the rounds get. Their mean is 0."""
    logits_SPE = sequences.padded(logits_TE, float("-inf"))
    real_SP1 = logits_SPE.isfinite().any(dim=-1, keepdim=True)
    shifts_S1E = logits_SPE.new_zeros(logits_SPE.shape[0], 1, logits_SPE.shape[2])
    if not logits_SPE.shape[1]:
        return shifts_S1E.squeeze(1)
    for _ in range(SINKHORN_ROUNDS):
        per_token_SP1 = (logits_SPE + shifts_S1E).logsumexp(dim=-1, keepdim=True).masked_fill(~real_SP1, 0.0)
        shifts_S1E = -(logits_SPE - per_token_SP1).logsumexp(dim=1, keepdim=True)
        # a sequence without tokens asks for nothing
        shifts_S1E = torch.where(shifts_S1E.isfinite(), shifts_S1E, 0.0)
        shifts_S1E = shifts_S1E - shifts_S1E.mean(dim=-1, keepdim=True)
    return shifts_S1E.squeeze(1)
