"""Products of rows sorted by expert, by torch's grouped GEMM: bf16 and fp32.

R rows, L experts, N columns, K what is summed over. Expert l has the rows up to `offsets[l]`.
"""

import torch
import torch.nn.functional as F


def rows_by_weights(rows_RK: torch.Tensor, weight: torch.Tensor, offsets_L: torch.Tensor, across: bool) -> torch.Tensor:
    """Each row times its expert's matrix -> [R, N].

    Args:
        weight: [L, N, K], or with `across` [L, K, N].
    """
    return F.grouped_mm(rows_RK, weight if across else weight.transpose(1, 2), offs=offsets_L)


def weight_gradient(left_RM: torch.Tensor, right_RN: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """left^T right over each expert's rows -> [L, M, N]; zero for an expert without rows."""
    return F.grouped_mm(left_RM.t(), right_RN, offs=offsets_L)
