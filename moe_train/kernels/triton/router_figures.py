"""`reference/router_figures.py` in one launch: a program adds up one block of tokens.

BT x BE: a tile, whole rows of logits.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.reference.router_figures import ROWS
from moe_train.kernels.triton.host import cdiv, power_of_2
from moe_train.kernels.triton.router import KINDS, score_rows

TILE_ELEMENTS = 2048


def forward(logits_TE: torch.Tensor, ids_TK: torch.Tensor, score: str) -> torch.Tensor:
    """See the reference. Compiled for each K."""
    (tokens, experts), wide = logits_TE.shape, power_of_2(logits_TE.shape[1])
    out_P4 = torch.empty(cdiv(tokens, ROWS), 4, dtype=torch.float64, device=logits_TE.device)
    if tokens:
        _kernel[(len(out_P4),)](
            logits_TE,
            ids_TK,
            out_P4,
            tokens,
            experts,
            K=ids_TK.shape[1],
            KIND=KINDS[score],
            ROWS=ROWS,
            BT=max(1, min(ROWS, TILE_ELEMENTS // wide)),
            BE=wide,
        )
    return out_P4


@triton.jit
def _kernel(
    logits, ids, out, T, E,
    K: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BE)
    is_expert = (column < E)[None, :]
    top_sum, chosen_sum = tl.zeros([BT], tl.float64), tl.zeros([BT], tl.float64)
    square_sum, logsumexp_sum = tl.zeros([BT], tl.float64), tl.zeros([BT], tl.float64)
    for tile in range(0, ROWS, BT):
        token = tl.program_id(0).to(tl.int64) * ROWS + tile + tl.arange(0, BT)
        there = token < T
        source = token[:, None] * E + column[None, :]
        found = tl.load(logits + source, mask=there[:, None] & is_expert, other=0.0)
        softmax, logsumexp, score = score_rows(tl.where(is_expert, found, float("-inf")), KIND)
        share = softmax
        if KIND >= 2:
            share = score / tl.sum(score, axis=1)[:, None]
        chosen = tl.zeros([BT], tl.float32)
        for k in range(K):
            wanted = tl.load(ids + token * K + k, mask=there, other=E).to(tl.int32)
            wanted = tl.where(wanted < 0, -1 - wanted, wanted)
            chosen += tl.sum(tl.where((column[None, :] == wanted[:, None]) & is_expert, share, 0.0), axis=1)
        top_sum += tl.where(there, tl.max(share, axis=1), 0.0)
        chosen_sum += tl.where(there, chosen, 0.0)
        square_sum += tl.where(there, tl.sum(found * found, axis=1), 0.0)
        logsumexp_sum += tl.where(there, logsumexp, 0.0)
    target = out + tl.program_id(0) * 4
    tl.store(target, tl.sum(top_sum, axis=0))
    tl.store(target + 1, tl.sum(chosen_sum, axis=0))
    tl.store(target + 2, tl.sum(square_sum, axis=0))
    tl.store(target + 3, tl.sum(logsumexp_sum, axis=0))
