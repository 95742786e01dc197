"""Parameters of which tensor parallelism leaves a rank only a part; the part is written on the parameter itself."""

import torch

from moe_train.parallel.tensor_slice import TensorSlice


def cut_(parameter: torch.Tensor, part: TensorSlice) -> None:
    """Leave of a parameter this part of it, in place: whoever holds the object holds the part."""
    parameter.data = part.take(parameter.data)
    parameter.tensor_part = part  # type: ignore[attr-defined]
    # DeepSpeed's norms count a parameter without this mark on the first rank of a tensor group alone
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def tensor_part(parameter: torch.Tensor) -> TensorSlice | None:
    """Which part of its logical tensor a parameter is; None: the whole, the same one on every rank of a tensor group.

    The view's shape is the logical one.
    """
    return getattr(parameter, "tensor_part", None)
