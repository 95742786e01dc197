"""What dispatch would move if all slots got the same number of rows: a yardstick for real counts, no split sizes."""

from dataclasses import dataclass

from moe_train.moe.placement import SlotPlan


@dataclass(frozen=True, kw_only=True)
class IdealSplit:
    """Rows of one rank of an expert group, if all ranks have the same tokens' worth of even choices.

    to_rank: rows that it sends to each rank. from_rank: rows that it receives from each rank.
    to_slot: rows that it sends to each slot of the group, in rank order. from_rank_to_slot: rows that each rank sends
    to each of its slots; None on a rank that keeps the shared experts.
    """

    to_rank: list[int]
    from_rank: list[int]
    to_slot: list[int]
    from_rank_to_slot: list[list[int]] | None


def ideal_split(plan: SlotPlan, rank: int, num_tokens: int, top_k: int) -> IdealSplit:
    """An even split of T tokens with K choices each. What is left over goes to the first slots, and shared ranks."""
    for name, value, low in (("num_tokens", num_tokens, 0), ("top_k", top_k, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} ({value!r}) must be an integer of at least {low}")
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"rank ({rank}) must lie between 0 and {plan.world_size - 1}")
    slots = plan.slots_per_rank
    to_slot = _evenly(num_tokens * top_k, sum(slots))
    first = [sum(slots[:index]) for index in range(plan.world_size)]
    to_rank = [sum(to_slot[start : start + count]) for start, count in zip(first, slots, strict=True)]
    if plan.shared_ranks:
        to_rank[: plan.shared_ranks] = _evenly(num_tokens, plan.shared_ranks)
    mine = to_slot[first[rank] : first[rank] + slots[rank]]
    return IdealSplit(
        to_rank=to_rank,
        from_rank=[to_rank[rank]] * plan.world_size,
        to_slot=to_slot,
        from_rank_to_slot=None if rank < plan.shared_ranks else [list(mine) for _ in range(plan.world_size)],
    )


def _evenly(rows: int, parts: int) -> list[int]:
    share, rest = divmod(rows, parts)
    return [share + (index < rest) for index in range(parts)]
