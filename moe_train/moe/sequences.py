"""Which sequence each token of a forward is of: what a choice over whole sequences needs to know.

A choice that compares tokens with each other depends on which tokens are seen together. Taken over one sequence at a
time, it is the same however a batch is cut into micro-batches, ranks and tensor-parallel shares.

T tokens in S whole sequences of at most P tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch

from moe_train.moe.dispatch import count_ids


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """count: S. index_T: the sequence of each token, ascending, padding left out. ragged: they may be of any length.
    first: number of the first sequence among all that a run reads."""

    count: int
    index_T: torch.Tensor
    ragged: bool
    first: int = 0

    @classmethod
    def of(
        cls, num_tokens: int, count: int, index_T: torch.Tensor | None, device: torch.device, first: int = 0
    ) -> "Sequences":
        """`index_T` None: consecutive tokens, the same number in each sequence."""
        if index_T is not None:
            return cls(count=count, index_T=index_T, ragged=True, first=first)
        length = max(num_tokens // max(count, 1), 1)
        index_T = torch.arange(num_tokens, device=device) // length
        return cls(count=count, index_T=index_T, ragged=False, first=first)

    @property
    def lengths_S(self) -> torch.Tensor:
        return count_ids(self.index_T, self.count)

    @property
    def number_T(self) -> torch.Tensor:
        """Which of all sequences of a run each token is of."""
        return self.index_T + self.first

    @property
    def place_T(self) -> torch.Tensor:
        """Of each token within its sequence."""
        lengths_S = self.lengths_S
        start_S = lengths_S.cumsum(0) - lengths_S
        return torch.arange(len(self.index_T), device=self.index_T.device) - start_S[self.index_T]

    def rows_per_expert(self, factor: float, top_k: int, num_experts: int) -> torch.Tensor:
        """ceil(factor * tokens * K / E) of each sequence, int64 [S]: what an expert has at perfect balance, times
        `factor`. A billionth less is rounded, so that 1.1 * 50 is 55 and not 56."""
        return (self.lengths_S.double() * (factor * top_k / num_experts) - 1e-9).ceil().long()

    def padded(self, x_TE: torch.Tensor, fill: float) -> torch.Tensor:
        """[S, P, E], `fill` where a sequence is shorter than the longest. Waits for the device if they are ragged."""
        if not self.ragged:
            return x_TE.view(self.count, -1, x_TE.shape[1])
        longest = int(self.lengths_S.max()) if self.count else 0
        found = x_TE.new_full((self.count * longest, x_TE.shape[1]), fill)
        return found.index_copy_(0, self.index_T * longest + self.place_T, x_TE).view(self.count, longest, -1)


@torch.no_grad()
def first_in_line(
    ids_TK: torch.Tensor, priority_TK: torch.Tensor | None, sequences: Sequences, room_S: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Which assignments find room, bool [T, K]: of each expert and sequence the first `room_S` ones.

    Args:
        priority_TK: largest first, equal ones in the order of their tokens; None: all in that order.
    """
    line_R = (sequences.index_T.unsqueeze(1) * num_experts + ids_TK).reshape(-1)
    order_R = torch.arange(line_R.numel(), device=line_R.device)
    if priority_TK is not None:
        order_R = priority_TK.reshape(-1).argsort(descending=True, stable=True)
    order_R = order_R[line_R[order_R].argsort(stable=True)]
    lengths = count_ids(line_R, sequences.count * num_experts)
    sorted_R = line_R[order_R]
    place_R = torch.arange(line_R.numel(), device=line_R.device) - (lengths.cumsum(0) - lengths)[sorted_R]
    found_R = torch.empty_like(line_R, dtype=torch.bool)
    found_R[order_R] = place_R < room_S[sorted_R // num_experts]
    return found_R.view_as(ids_TK)
