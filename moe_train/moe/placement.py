"""Logical experts -> ranks of the EP group. Pure functions, equal on every rank."""

from dataclasses import dataclass


def assign_experts(num_experts: int, world_size: int, rank: int) -> tuple[int, int]:
    """Contiguous slice of a rank: the first `num_experts % world_size` ranks hold one expert more.

    Returns:
        (first expert, number of experts); the number may be 0.

    Raises:
        ValueError: an argument that is no integer or out of range, by name.
    """
    for name, value, low in (("num_experts", num_experts, 0), ("world_size", world_size, 1), ("rank", rank, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} ({value!r}) must be an integer of at least {low}")
    if rank >= world_size:
        raise ValueError(f"rank ({rank}) must be below world_size ({world_size})")
    share, rest = divmod(num_experts, world_size)
    return rank * share + min(rank, rest), share + (rank < rest)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which experts each rank of an EP group holds: contiguous, uneven where they do not divide."""

    num_experts: int
    world_size: int

    @property
    def slices(self) -> list[tuple[int, int]]:
        """(first expert, number of experts) of each rank."""
        return [assign_experts(self.num_experts, self.world_size, rank) for rank in range(self.world_size)]

    @property
    def experts_per_rank(self) -> list[int]:
        return [count for _, count in self.slices]
