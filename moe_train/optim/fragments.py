"""What a checkpoint sees of an optimizer: flat pieces of logical tensors, whoever sharded them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from moe_train.parallel.tensor_slice import TensorSlice


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements `start` to `stop` of one flattened logical tensor, as this rank holds them.

    name: Hugging Face parameter name. expert: logical expert, for a slice of a stacked expert parameter.
    shape: of the whole logical tensor (of one expert, if `expert` is set).
    part: where tensor parallelism has cut it, the piece of the tensor whose flattened elements are counted instead.
    views: 1-D views by kind: `master` (fp32 weights) and each optimizer state by its own name (`exp_avg`, ...).
    owner: this rank writes it (others hold the same elements).
    """

    name: str
    expert: int | None
    shape: tuple[int, ...]
    start: int
    stop: int
    views: dict[str, torch.Tensor] = field(repr=False)
    owner: bool = True
    part: TensorSlice | None = None


def state_views(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """`flat` itself and every state of it that has one number per element, by name."""
    views = {"master": flat.detach().view(-1)}
    for name, value in sorted(optimizer.state.get(flat, {}).items()):
        if isinstance(value, torch.Tensor) and value.numel() == flat.numel() and value.dim() == flat.dim():
            views[name] = value.view(-1)
    return views


def narrow_views(views: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: view[start:stop] for name, view in views.items()}


def scalar_state(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Step counts and the like: one number per optimizer, equal for all of its parameters."""
    scalars: dict[str, float] = {}
    for state in optimizer.state.values():
        scalars.update({k: float(v) for k, v in state.items() if not isinstance(v, torch.Tensor) or v.dim() == 0})
    for group in optimizer.param_groups:  # apex and DeepSpeed FusedAdam count steps here
        if isinstance(group.get("step"), int):
            scalars["group_step"] = float(group["step"])
    return scalars


def allocate_state(
    optimizer: torch.optim.Optimizer, flats: Iterable[torch.Tensor], kinds: set[str], scalars: dict[str, float]
) -> None:
    """Make the state that a first step would make for `flats`, so that a checkpoint can be copied into it.

    A dummy step would do the same, and change the weights.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    as_tensor = isinstance(optimizer, torch.optim.AdamW)  # the others count in plain integers
    if "group_step" in scalars:
        for group in optimizer.param_groups:
            group["step"] = int(scalars["group_step"])
    for flat in flats:
        state = optimizer.state[flat]
        for kind in kinds - {"master"}:
            state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        for name, value in scalars.items():
            if name != "group_step":
                device = flat.device if on_device else "cpu"
                state[name] = torch.tensor(value, dtype=torch.float32, device=device) if as_tensor else int(value)
