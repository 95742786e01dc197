"""Which tokens a rank works on inside the MoE layer, where tensor parallelism replicates them outside of it.

T tokens of this rank, M tokens it works on. The ranks of a tensor group hold the same T tokens, those of an
expert-tensor group must work on the same M. Tokens are shared out (M is a part of T), brought together (M is a union)
or stay as they are. A share may be uneven or empty: no pad row exists that a router could see.
"""

from dataclasses import dataclass

import torch

from moe_train.parallel import (
    Groups,
    copy_to,
    even_counts,
    exchange_sizes,
    gather_rows,
    reduce_partial,
    slice_rows,
)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """rows: how many of the tokens each rank of the slicing (or gathering) group has. rank: this one's place."""

    rows: list[int]
    rank: int

    @property
    def mine(self) -> slice:
        start = sum(self.rows[: self.rank])
        return slice(start, start + self.rows[self.rank])


class TokenDomain:
    """The transforms between the T and the M tokens, each with its adjoint."""

    def __init__(self, groups: Groups):
        self.slicing, self.gathering, self.expert_tensor = groups.token_slice, groups.token_gather, groups.expert_tensor
        # each token is held by `tensor` ranks and worked on by `expert_tensor` ranks: one of them counts it
        self.counts = groups.tensor.rank_in_group % groups.expert_tensor.world_size == 0

    @property
    def slices(self) -> bool:
        return self.slicing.world_size > 1

    @property
    def gathers(self) -> bool:
        return self.gathering.world_size > 1

    def shares(self, num_tokens: int) -> Shares | None:
        """How `num_tokens` tokens of this rank are shared out or brought together; None where T = M."""
        if self.slices:
            return Shares(rows=even_counts(num_tokens, self.slicing), rank=self.slicing.rank_in_group)
        if self.gathers:
            return Shares(rows=exchange_sizes(num_tokens, self.gathering), rank=self.gathering.rank_in_group)
        return None

    def enter(self, x: torch.Tensor, shares: Shares | None) -> torch.Tensor:
        """[T, ...] -> [M, ...]. Adjoint of the share: all_gather; of the union: slice (its gradient is replicated)."""
        if shares is None:
            return x
        if self.slices:
            return slice_rows(x, self.slicing, shares.rows)
        return gather_rows(x, self.gathering, shares.rows)

    def leave(self, y: torch.Tensor, shares: Shares | None) -> torch.Tensor:
        """[M, ...] -> [T, ...]. Adjoint of the share: slice; of the union: all_gather."""
        if shares is None:
            return y
        if self.slices:
            return gather_rows(y, self.slicing, shares.rows)
        return slice_rows(y, self.gathering, shares.rows)

    def to_experts(self, x: torch.Tensor) -> torch.Tensor:
        """Where each rank of an expert-tensor group goes on with a part of every expert. Adjoint: all_reduce."""
        return copy_to(x, self.expert_tensor)

    def from_experts(self, y: torch.Tensor) -> torch.Tensor:
        """The parts' sum. Adjoint: identity."""
        return reduce_partial(y, self.expert_tensor)

    def own_rows(self, x_M: torch.Tensor, shares: Shares | None) -> torch.Tensor:
        """Of the M tokens those that are this rank's own to count: all of a share, its part of a union."""
        return x_M if shares is None or self.slices else x_M[shares.mine]

    def own_gradient(self, x_M: torch.Tensor, shares: Shares | None) -> torch.Tensor:
        """The identity whose gradient is zero for the tokens that other data-parallel ranks answer for."""
        if shares is None or not self.gathers:
            return x_M
        mine = torch.zeros(x_M.shape[0], dtype=torch.bool, device=x_M.device)
        mine[shares.mine] = True
        return torch.where(mine.view(-1, *[1] * (x_M.dim() - 1)), x_M, x_M.detach())
