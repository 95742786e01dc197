"""The optimizer of a float64 layout: torch's for the dense part, in DeepSpeed's place; the real store beside it."""

from collections.abc import Iterator

import torch

from moe_train.config import Recipe
from moe_train.optim import ExpertStore, Fragment, StepResult, decays
from moe_train.optim.dense_fragments import unsharded
from moe_train.optim.factory import OptimizerFactory
from moe_train.optim.norm import dense_squared_norm
from moe_train.parallel import Groups


class Engine64:
    """What a trainer uses of `optim.Engine`. DeepSpeed takes no float64 parameters.

    Dense gradients are averaged over the data group, as DeepSpeed's are; the experts' way is the package's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        store: ExpertStore,
        make_optimizer: OptimizerFactory,
        recipe: Recipe,
        groups: Groups,
    ):
        self.model, self.store, self.recipe, self.groups = model, store, recipe, groups
        self.names = {id(p): name for name, p in model.named_parameters()}
        decay = decays(recipe.optimizer)
        named = list(model.named_parameters())
        by_decay = {flag: [p for name, p in named if decay(name, p.dim()) == flag] for flag in (True, False)}
        self.inner = make_optimizer([{"params": ps, "decay": flag} for flag, ps in by_decay.items() if ps])

    def __call__(self, **inputs):
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, losses: torch.Tensor | None = None) -> StepResult:
        """Collective. `losses` have no say: a certificate's are finite."""
        data = self.groups.data
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.store.set_lr(lr)
        self.store.finish_gradients()
        for parameter in self.model.parameters():
            assert parameter.grad is not None, self.names[id(parameter)]
            data.all_reduce_(parameter.grad.div_(data.world_size))
        squared = self.store.squared_norm() + dense_squared_norm(self.model.parameters(), self.groups.tensor)
        norm, limit = squared.sqrt(), self.recipe.optimizer.grad_clip
        factor = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        for parameter in self.model.parameters():
            parameter.grad.mul_(factor)  # type: ignore[union-attr]
        self.inner.step()
        self.inner.zero_grad()
        self.store.step(factor)
        return StepResult(norm=norm, factor=factor, skipped=False)

    def dense_fragments(self) -> Iterator[Fragment]:
        yield from unsharded(self.inner, self.names, self.groups)

    def close(self) -> None:
        """Nothing holds it but its trainer."""
