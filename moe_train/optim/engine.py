"""The optimizer of a run: DeepSpeed for the dense part, the expert store beside it, one norm and one clip for both."""

import contextlib
import importlib
import inspect
import io
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from moe_train.config import Recipe
from moe_train.config.deepspeed import deepspeed_config
from moe_train.errors import TrainingError
from moe_train.optim import dense_fragments
from moe_train.optim.expert_shard import ExpertStore
from moe_train.optim.factory import OptimizerFactory, decays
from moe_train.optim.fragments import Fragment, allocate_state, scalar_state
from moe_train.optim.norm import ExpertNorm, attach, dense_squared_norm
from moe_train.parallel import Groups


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """norm, factor: float64 scalars, left on the device. skipped: no weight changed, on any rank."""

    norm: torch.Tensor
    factor: torch.Tensor
    skipped: bool

    @property
    def grad_norm(self) -> float:
        """Global L2 norm before clipping, experts included; inf where the step was skipped. Waits for the device."""
        return float(self.norm)

    @property
    def clip_factor(self) -> float:
        """What every gradient was multiplied with. Waits for the device."""
        return float(self.factor)


class Engine:
    """Args:
    model: the dense part (experts are no parameters of it), on its device, in float32.
    store: the expert slices of this rank.
    make_optimizer: for the dense parameters; the store has its own.
    groups: dense gradients are averaged, and dense states sharded, over `data`.
    accumulation: micro-batches per step.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        store: ExpertStore,
        make_optimizer: OptimizerFactory,
        recipe: Recipe,
        groups: Groups,
        accumulation: int,
    ):
        self.model, self.store, self.groups, self.recipe = model, store, groups, recipe
        self.names = {id(p): name for name, p in model.named_parameters()}
        decay = decays(recipe.optimizer)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        by_decay = {flag: [p for name, p in trainable if decay(name, p.dim()) == flag] for flag in (True, False)}
        _prepare_deepspeed()
        # also where there is no tensor parallelism: DeepSpeed would go on with the one of an earlier engine
        assert groups.mpu is not None, "DeepSpeed needs process groups, even of one rank"
        with _without_compiler(), contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures
            self.deepspeed, wrapper, _, _ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer([{"params": ps, "decay": flag} for flag, ps in by_decay.items() if ps]),
                config=deepspeed_config(recipe, accumulation, sum(p.numel() for _, p in trainable)),
                mpu=groups.mpu,
            )
        # one of four classes that share no interface; `plain`: stage 0 in fp32, the torch optimizer itself
        self.wrapper: Any = wrapper
        self.plain = isinstance(wrapper, torch.optim.Optimizer) and not hasattr(wrapper, "optimizer")
        self.inner: torch.optim.Optimizer = self.wrapper if self.plain else self.wrapper.optimizer
        self.expert_norm = ExpertNorm(groups.tensor)
        if not self.plain:
            attach(self.wrapper, self.expert_norm)
        if recipe.precision.compute == "fp16":
            # DeepSpeed raises the loss scale before it unscales by it, so gradients made under the old scale would be
            # divided by the new one; its update waits until both halves have stepped
            self._update_scale = self.wrapper._update_scale
            self.wrapper._update_scale = lambda overflow=False: None
        check_coverage(self.names, trainable, self._groups())

    def __call__(self, **inputs):
        return self.deepspeed(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """One micro-batch. `loss` is scaled already: gradients are summed over micro-batches, averaged over `data`."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # only moves DeepSpeed's count of micro-batches

    def step(self, lr: float, losses: torch.Tensor | None = None) -> StepResult:
        """One optimizer step for dense and expert parameters, or none for both. Collective.

        The decision to skip is read once from the device: by DeepSpeed (its overflow check and its finite-norm check),
        or here at stage 0 in fp32, where it has no optimizer of its own. Nothing else waits for the device.

        Args:
            losses: the step's losses, the same on all ranks. One that is not finite skips the step.
        """
        for group in self.wrapper.param_groups:
            group["lr"] = lr
        self.store.set_lr(lr)
        loss_scale = float(getattr(self.wrapper, "loss_scale", 1.0)) if not self.plain else 1.0
        self.store.finish_gradients()
        self.expert_norm.squared = self.store.squared_norm()
        if losses is not None:  # zero times what is finite is zero; anything else makes the norm a nan
            self.expert_norm.squared = self.expert_norm.squared + (0.0 * losses).sum()
        norm = self._clip_plain() if self.plain else None
        skipped = norm is not None and not math.isfinite(norm)
        if skipped:
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
        else:
            calls = self.expert_norm.calls
            self.deepspeed.step()
            assert self.plain or self.expert_norm.calls > calls, "DeepSpeed no longer asks the norm that counts experts"
        if norm is None:
            skipped = bool(self.wrapper.overflow)
            norm = self.deepspeed.get_global_grad_norm() if not skipped else math.inf
            assert norm is not None, "DeepSpeed computed no gradient norm"
        if not isinstance(norm, torch.Tensor):  # filled on the device: a copy from the host would wait
            norm = torch.full((), norm, dtype=torch.float64, device=self.expert_norm.squared.device)
        norm = norm.detach().to(torch.float64)
        factor = self._clip_factor(norm)
        if skipped:
            self.store.drop_gradients()
        else:
            self.store.step(factor / loss_scale)
        if self.recipe.precision.compute == "fp16":
            self.update_loss_scale(skipped)
        return StepResult(norm=norm, factor=factor, skipped=skipped)

    def update_loss_scale(self, overflow: bool) -> None:
        """DeepSpeed's own rule, after both halves have stepped. Raises `TrainingError` where it can go no lower."""
        try:
            self._update_scale(overflow)
        except Exception as error:  # DeepSpeed raises the bare class
            if "minimum" not in str(error):
                raise
            raise TrainingError(
                "fp16 gradients overflow even at the smallest loss scale; no weight was changed. Lower optimizer.lr or "
                "set precision.compute to bf16"
            ) from None

    def _clip_factor(self, norm: torch.Tensor) -> torch.Tensor:
        """torch.nn.utils.clip_grad_norm_'s factor, which DeepSpeed's optimizers share."""
        limit = self.recipe.optimizer.grad_clip
        return (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)

    def _clip_plain(self) -> float:
        """Norm, and clip of the dense gradients in place, at stage 0 in fp32: DeepSpeed has no optimizer of its own."""
        parameters = self._flats()
        squared = dense_squared_norm(parameters, self.groups.tensor)
        norm = (squared + self.expert_norm.squared).sqrt()
        factor = self._clip_factor(norm)
        found = float(norm)
        if math.isfinite(found):
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return found

    @property
    def lr(self) -> float:
        return self.wrapper.param_groups[0]["lr"]

    # ---- what a checkpoint needs

    def _groups(self) -> list[list[torch.Tensor]]:
        """The model's parameters as the wrapper has grouped them."""
        if self.plain:
            return [group["params"] for group in self.inner.param_groups]
        names = ("bit16_groups", "fp16_groups", "bf16_groups")
        return next(getattr(self.wrapper, name) for name in names if hasattr(self.wrapper, name))

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that DeepSpeed's inner optimizer really updates."""
        if self.plain:
            return [p for group in self.inner.param_groups for p in group["params"]]
        for attribute in (
            "single_partition_of_fp32_groups",
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self.wrapper, attribute):
                return list(getattr(self.wrapper, attribute))
        raise AssertionError(f"{type(self.wrapper).__name__} keeps its fp32 weights elsewhere")

    def dense_fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of every trainable dense parameter."""
        wrapper, names, groups = self.wrapper, self.names, self.groups
        if self.plain:
            yield from dense_fragments.unsharded(self.inner, names, groups)
        elif hasattr(wrapper, "fp32_partitioned_groups_flat"):
            yield from dense_fragments.parameter_partitions(wrapper, names, groups)
        else:
            yield from dense_fragments.flat_partitions(wrapper, self._groups(), self._flats(), names, groups)

    def scalars(self) -> dict[str, float]:
        """Step counts of the dense optimizer, and the loss scale."""
        found = scalar_state(self.inner)
        scaler = getattr(self.wrapper, "loss_scaler", None)
        if self.recipe.precision.compute == "fp16" and scaler is not None:
            found |= {
                f"loss_scaler.{k}": float(getattr(scaler, k))
                for k in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            }
        return found

    def allocate_state(self, kinds: set[str], scalars: dict[str, float]) -> None:
        """Before loading: make the dense optimizer's state."""
        scaler = {k.partition(".")[2]: v for k, v in scalars.items() if k.startswith("loss_scaler.")}
        for name, value in scaler.items():
            setattr(self.wrapper.loss_scaler, name, type(getattr(self.wrapper.loss_scaler, name))(value))
        plain = {k: v for k, v in scalars.items() if not k.startswith("loss_scaler.")}
        allocate_state(self.inner, self._flats(), kinds, plain)

    def publish(self) -> None:
        """After loading: fp32 weights -> the weights that forward uses, dense and experts. Collective."""
        if hasattr(self.wrapper, "fp32_partitioned_groups_flat"):
            dense_fragments.publish_stage_3(self.wrapper)
        elif not self.plain:
            self.wrapper.update_lp_params()
        self.store.publish()

    def close(self) -> None:
        """Let go of the model, in a process that goes on to make another: DeepSpeed would keep it for good.

        Hooks on parameters, and the graph of flattening them, are references that the garbage collector does not see;
        two of DeepSpeed's globals hold ZeRO-3's modules.
        """
        self.deepspeed.destroy()
        if hasattr(self.wrapper, "bf16_groups_flat"):
            self.wrapper.bf16_groups_flat = self.wrapper.bf16_partitioned_groups = None
        own: set[Any] = set(self.model.modules())
        # a forward that recompute cuts short leaves modules there
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in own]
        # behind a decorator, a cache whose keys are coordinators and modules
        decorated: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
        inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()


def check_coverage(
    names: dict[int, str], trainable: list[tuple[str, torch.nn.Parameter]], groups: list[list[torch.Tensor]]
) -> None:
    """Every trainable dense parameter is in exactly one group of the optimizer that was really built.

    A block swapped too late leaves its router frozen while the loss goes on falling (DeepSpeed #8377).
    """
    grouped = Counter(id(p) for group in groups for p in group)
    wrong = {name: grouped[id(p)] for name, p in trainable if grouped[id(p)] != 1}
    assert not wrong, f"each must be in one optimizer group; found in: {wrong}"
    others = set(grouped) - {id(p) for _, p in trainable}
    assert not others, f"not trainable, yet in a group: {[names.get(i, 'a stranger') for i in others]}"


def _prepare_deepspeed() -> None:
    """Quiet, and without the shared-memory all_reduce that DeepSpeed compiles for a minute on CPUs.

    Training never calls it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls names that torch 2.13 has renamed, on every step
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    builder = get_accelerator().create_op_builder(  # type: ignore[union-attr]
        "ShareMemCommBuilder"
    )
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """DeepSpeed would import torch's, for one to four seconds, to compile Muon and for passes of an `engine.compile()`.

    Nothing here calls any of them.
    """
    with (
        mock.patch.object(compiler, "compile", return_value=compiler.dummy_decorator),
        mock.patch.object(deepspeed_engine, "is_deepcompile_supported", return_value=False),
    ):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")  # its optimizers do, at their first step
        yield
