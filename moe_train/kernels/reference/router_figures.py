"""Logits and choice -> sums of what diagnostics show. See `kernels.router_figures`."""

import torch
import torch.nn.functional as F

from moe_train.kernels.reference.router import scores_of, shares_of

ROWS = 64
"""Tokens of a block."""


def forward(
    logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str, scores_TE: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over blocks of `ROWS` tokens [P, 4], float64."""
    if scores_TE is None:
        shares_TE = shares_of(scores_of(logits_TE, score), score)
    else:
        shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    wanted_TK = torch.where(ids_TK < 0, ~ids_TK, ids_TK)
    chosen_T = F.pad(shares_TE, (0, 1)).gather(1, wanted_TK).sum(dim=-1)
    columns = (shares_TE.amax(dim=-1), chosen_T, logits_TE.square().sum(dim=-1), logits_TE.logsumexp(dim=-1))
    figures_T4 = torch.stack(columns, dim=-1).to(torch.float64)
    return F.pad(figures_T4, (0, 0, 0, -len(figures_T4) % ROWS)).view(-1, ROWS, len(columns)).sum(dim=1)
