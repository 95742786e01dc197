"""What diagnostics want of a routing decision, in one pass over the logits.

T tokens, E experts, K experts per token; P blocks of `ROWS` tokens.
"""

import torch

from moe_train.kernels.choose import dense_implementation
from moe_train.kernels.operator import Operator
from moe_train.kernels.reference import router_figures as reference
from moe_train.kernels.reference.router_figures import ROWS

FIGURES = ("top_share", "chosen_share", "logit_square", "logsumexp")
"""Of a token: its largest score, and the chosen ones together, as shares of all its scores; the sum of its squared
logits; their logsumexp."""


def router_figures(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str, scores_TE: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of `FIGURES` over blocks of tokens [P, 4], float64. No gradient.

    Args:
        ids_TK: int64. ~e: wanted expert e and found no room; it counts as chosen. ~E: no expert.
        score: of a `RouterRule`; how logits become scores where `scores_TE` does not say them.
    """
    scores_TE = None if scores_TE is None else scores_TE.detach().contiguous()
    return _router_figures(logits_TE.detach().contiguous(), ids_TK.contiguous(), score, scores_TE)


def forward(logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str, scores_TE: torch.Tensor | None) -> torch.Tensor:
    # routers that give scores may give another K at every step, and each would be compiled
    if scores_TE is not None:
        return reference.forward(logits_TE, ids_TK, score, scores_TE)
    return dense_implementation("router_figures", logits_TE).forward(logits_TE, ids_TK, score)


def fake_forward(logits_TE, ids_TK, score, scores_TE):
    return logits_TE.new_empty(-(-len(logits_TE) // ROWS), len(FIGURES), dtype=torch.float64)


_router_figures = Operator("router_figures", forward, fake_forward)
