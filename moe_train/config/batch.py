"""Batch arithmetic: global batch = micro-batch x accumulation x data-parallel ranks."""

from moe_train.config.schema import BatchSection
from moe_train.errors import ConfigError


def accumulation_steps(batch: BatchSection, data_parallel: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises `ConfigError` naming the legal micro-batch sizes, and the nearest legal global batches.
    """
    if batch.global_size % (batch.micro_size * data_parallel) == 0:
        return batch.global_size // (batch.micro_size * data_parallel)
    unit = batch.micro_size * data_parallel
    below, above = batch.global_size // unit * unit, (batch.global_size // unit + 1) * unit
    near = " or ".join(str(size) for size in (below, above) if size)
    per_rank, rest = divmod(batch.global_size, data_parallel)
    legal = [] if rest else [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    micro = f", or batch.micro_size to one of {legal}" if legal else ""
    raise ConfigError(
        f"batch.global_size ({batch.global_size}) must be a multiple of batch.micro_size ({batch.micro_size}) x "
        f"data-parallel ranks ({data_parallel}) = {unit}: set batch.global_size to {near}{micro}"
    )
