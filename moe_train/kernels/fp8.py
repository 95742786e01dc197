"""Matrices in FP8 (e4m3) with a float32 scale per row, and their grouped product.

An element stands for its e4m3 number times the scale of its row, which is the row's largest magnitude / 448, so that
the largest becomes the largest number there is. Scales depend on their own row alone: on no other row, expert or rank.
Whatever is not finite makes the scale of its row so, and with it every product of the row. A row of zeros has the
scale of `SMALLEST`, its products are zeros.

The experts' four products with activations can run so (their names are those of their results):

  h   x [R, H]    times gate_up [L, 2I, H] transposed    dA  dY [R, H]   times down [L, H, I]
  y   a [R, I]    times down [L, H, I] transposed        dX  dH [R, 2I]  times gate_up [L, 2I, H]

The tensor cores want both operands along the dimension that is summed over, so dA and dX need the weights transposed:
a copy of its own, with scales along the other dimension. Weight gradients stay in the type of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_train.kernels.choose import implementation
from moe_train.kernels.grouped_gemm import RowGroups, empty_rows, is_ours

GEMMS = ("h", "y", "dA", "dX")
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
SMALLEST = 1e-30
"""Rows whose largest magnitude is below this are scaled as if it were this."""
UNIT = 16
"""Rows of the operands are multiples of so many bytes."""
MAX_EXPERTS = 1023
"""Of one grouped product."""


class Fp8Rows(NamedTuple):
    """values [..., N, K] in e4m3, scales [..., N] in float32."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Fp8Gemms:
    """Which of `GEMMS` run in FP8; the others run in the type of the rows."""

    names: tuple[str, ...] = GEMMS

    def __post_init__(self):
        assert set(self.names) <= set(GEMMS), self.names

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def describe(self) -> str:
        """Which they are, for a reader."""
        others = [name for name in GEMMS if name not in self.names]
        return f"products {self}" + (f" ({' '.join(others)} in bf16, no slower at these sizes)" if others else "")

    def __str__(self) -> str:
        return " ".join(name for name in GEMMS if name in self.names)

    @classmethod
    def parse(cls, text: str) -> "Fp8Gemms":
        return cls(tuple(text.split()))


@torch.no_grad()
def quantise_weights(
    gate_up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    gemms: Fp8Gemms,
    into: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """Values and scales of each of `GEMMS` in turn, [L, N, K] and [L, N]; empty for those that do not run in FP8.

    Args:
        into: what this returned before for weights of the same shapes, written over.
    """
    sources = {"h": (gate_up_LIH, False), "y": (down_LHI, False), "dA": (down_LHI, True), "dX": (gate_up_LIH, True)}
    found: list[torch.Tensor] = []
    for name in GEMMS:
        if name not in gemms:
            found += [gate_up_LIH.new_empty(0, dtype=E4M3), gate_up_LIH.new_empty(0, dtype=torch.float32)]
            continue
        weight, across = sources[name]
        found += quantise_weight(weight, across, Fp8Rows(*into[len(found) : len(found) + 2]) if into else None)
    return found


def quantise_weight(weight_LNK: torch.Tensor, across: bool, into: Fp8Rows | None = None) -> Fp8Rows:
    """[L, N, K], or transposed [L, K, N] with the scales of that."""
    kernel = implementation("quantise", weight_LNK.device)
    experts, rows, columns = weight_LNK.shape
    shape = (experts, columns, rows) if across else (experts, rows, columns)
    into = empty_fp8_rows(shape, weight_LNK.device) if into is None else into
    assert into.values.shape == shape, f"{list(into.values.shape)} is not the room for {list(shape)}"
    (kernel.across if across else kernel.along)(weight_LNK.contiguous(), into)
    return into


def empty_fp8_rows(shape: tuple[int, ...], device: torch.device) -> Fp8Rows:
    values = torch.empty(shape, dtype=E4M3, device=device)
    return Fp8Rows(values, torch.empty(shape[:-1], dtype=torch.float32, device=device))


def grouped_product(rows: Fp8Rows, weight: Fp8Rows, groups: RowGroups) -> torch.Tensor:
    """rows [R, K] times weight [L, N, K] transposed -> [R, N] in bf16; rows of no expert are left unwritten.

    On Hopper by our own grouped GEMM (the layer of qwen3, forward and backward, took 6.29 ms, and 6.74 with torch's;
    H200, torch 2.11.0, 2026-11-23), on other GPUs by torch's row-wise scaled one; fast accumulation keeps partial sums
    in the tensor core. Elsewhere the same e4m3 numbers, exactly multiplied, summed in float32.
    """
    if rows.values.device.type != "cuda":
        wide = (rows.values.float() * rows.scales.unsqueeze(-1), weight.values.float() * weight.scales.unsqueeze(-1))
        found = F.grouped_mm(wide[0], wide[1].transpose(1, 2), offs=groups.offsets_L)
        return empty_rows(len(found), found.shape[1], found, torch.bfloat16).copy_(found)
    if is_ours(rows.values.device):
        from moe_train.kernels.triton import grouped_gemm

        scales = (rows.scales, weight.scales)
        return grouped_gemm.rows_by_weights(rows.values, weight.values, groups.table, False, scales)
    return torch.ops.aten._scaled_grouped_mm(
        rows.values,
        weight.values.transpose(1, 2),
        rows.scales,
        weight.scales,
        offs=groups.offsets_L,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
