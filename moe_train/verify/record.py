"""What is compared: plain arrays under logical Hugging Face names, from the oracle and from every rank of a layout.

Imports nothing from the rest of the package, so that the oracle can use it.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks and micro-batches.

    loss: nats per token. aux_loss, z_loss: without their weights (mean over layers and sequences or tokens); 0 if off.
    grad_norm: before clipping. counts_LE: tokens per MoE layer and expert. rows_LE: those that were not dropped.
    bias_LE: correction biases after the step (no rows if the family has none).
    """

    loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    clip_factor: float
    counts_LE: np.ndarray
    rows_LE: np.ndarray
    bias_LE: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of one flattened logical tensor, as one rank holds them.

    where: their places: consecutive ones from a number on, or, of a tensor-parallel part, an array of indices.
    kind: `initial`, `gradient` (step 1, clip undone), `updated` (master weights after the last step) or `forward` (the
    weights that the next forward would use). expert: logical expert, for a slice of a stacked expert parameter.
    owner: this rank answers for these elements; other ranks may hold copies.
    """

    kind: str
    name: str
    expert: int | None
    where: int | np.ndarray
    values: np.ndarray
    owner: bool = True

    @property
    def places(self) -> slice | np.ndarray:
        """To index the flattened tensor with."""
        return slice(self.where, self.where + self.values.size) if isinstance(self.where, int) else self.where

    def fits(self, size: int) -> bool:
        """All places lie within a tensor of `size` elements, and there is one for each value."""
        if isinstance(self.where, int):
            return self.where >= 0 and self.where + self.values.size <= size
        inside = not self.where.size or (self.where.min() >= 0 and self.where.max() < size)
        return self.where.size == self.values.size and bool(inside)

    @property
    def label(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank saw of a layout."""

    steps: list[StepRecord]
    pieces: list[Piece] = field(repr=False)
    logits: list[dict[int, np.ndarray]] = field(default_factory=list, repr=False)
    """By step and sequence [S, V], as far as this rank has seen them."""
    choices: list[tuple[int, int]] = field(default_factory=list)
    """Of a layout that is told the reference's choice, by step: assignments of tokens to experts that its own routers
    would not have made, and all that it was told."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The oracle's answer. Tensors are whole and float64, by Hugging Face parameter name.

    margin: smallest distance, over all tokens, layers and steps, between a chosen expert's (or group's) score and the
    best one left out. is_expert: names of the stacked [E, ...] parameters.
    """

    steps: list[StepRecord]
    initial: dict[str, np.ndarray] = field(repr=False)
    gradient: dict[str, np.ndarray] = field(repr=False)
    updated: dict[str, np.ndarray] = field(repr=False)
    logits: np.ndarray = field(repr=False)
    """[steps, B, S, V]."""
    chosen: np.ndarray = field(repr=False)
    """Experts of each token [steps, L, B * S, K]; ~e where expert e had no room."""
    is_expert: frozenset[str]
    margin: float
    bias_of_scores: bool = False
    """Biases follow scores, not whole numbers of tokens."""
