"""Shared experts: what every token passes through, wherever they are kept.

T tokens, H hidden size.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from moe_train.parallel import ParallelGroup, copy_to, finish_reduce, start_reduce


class ParameterSource(Protocol):
    """Where a module's parameters come from; whoever stores them decides how they are sharded."""

    def fetch(self) -> AbstractContextManager[dict[str, Any]]:
        """Parameters by their name in the module, for the length of the context; gradients go back through them."""
        ...


class SharedBlock(nn.Module):
    """Shared experts and, if a second module is given, the sigmoid gate of their output, as one module.

    Args:
        parts: by the attribute names of the family's block, so that parameters keep their names.
    """

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, module in parts.items():
            self.add_module(name, module)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        experts, *gate = self.children()
        y_TH = experts(x_TH)
        return gate[0](x_TH).sigmoid() * y_TH if gate else y_TH


class BorrowedModule:
    """A module that runs on parameters of a `ParameterSource`. It is no child of the layer and owns nothing.

    Args:
        module: the family's own, on the meta device; a part of a parameter may take the whole one's place.
    """

    def __init__(self, module: nn.Module, source: ParameterSource):
        self.module, self.source = module, source

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        with self.source.fetch() as parameters:
            return functional_call(self.module, parameters, (x_TH,))


class SplitSharedExperts:
    """Shared experts whose width is shared out over the tensor group (mlp_tp), on tokens that all of it holds.

    `start` begins the sum over ranks, `finish` waits for it: whatever lies between runs beside it. The adjoint of the
    sum is the identity, that of handing the tokens to each part an all_reduce.
    """

    def __init__(self, experts: BorrowedModule, group: ParallelGroup):
        self.experts, self.group = experts, group

    def start(self, x_TH: torch.Tensor):
        return start_reduce(self.experts(copy_to(x_TH, self.group)), self.group)

    def finish(self, started) -> torch.Tensor:
        return finish_reduce(*started)
