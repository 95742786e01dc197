"""What one rank runs for one layout: the real trainer's steps, on given tokens, written down by logical name."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_train.config import Recipe
from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.moe import Router
from moe_train.optim import Fragment, TensorSlice, optimizer_factory
from moe_train.parallel import Groups, Topology, build_groups, tensor_part
from moe_train.train.assemble import Assembly, assemble_around, build_sharded_model
from moe_train.train.check import ResolvedRun
from moe_train.train.loop import Trainer
from moe_train.train.state import Position
from moe_train.train.stop import StopRequest
from moe_train.verify.engine64 import Engine64
from moe_train.verify.float64 import Float64
from moe_train.verify.grid import Layout
from moe_train.verify.record import Piece, RankRecord, StepRecord
from moe_train.verify.shrink import at_layout

CPU = torch.device("cpu")
Plant = Callable[[], AbstractContextManager[Any]]
"""Importable function whose context changes the package while a layout runs: how a test plants an error."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shrunk recipe at one layout, and the tokens of its steps [steps, sequences, length + 1].

    chosen: experts of each token [steps, L, T, K], if the layout is to be told them.
    """

    recipe: Recipe
    layout: Layout
    tokens: np.ndarray = field(repr=False)
    chosen: np.ndarray | None = field(default=None, repr=False)
    plant: Plant | None = None


def run_layout(rank: int, job: Job) -> RankRecord:
    """Collective over the layout's world."""
    with (job.plant or nullcontext)(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated names in libraries, once per rank and layout
        trainer = make_trainer(job)
        pieces = list(_pieces(trainer.assembly, {"master": "initial"}))
        steps = []
        logits = LogitsKept(trainer)
        told = None if job.chosen is None else ChoicesTold(trainer, job.chosen)
        for number in range(len(job.tokens)):
            with ExitStack() as stack:
                if told:
                    told.begin(number)
                if job.layout.precision == "fp64":
                    stack.enter_context(Float64())
                if number == 0:
                    stack.enter_context(kept_gradients(_optimizers(trainer.assembly)))
                steps.append(_step(trainer))
                if number == 0:
                    pieces += _gradients(trainer.assembly, steps[0].clip_factor)
                    logits.close()
                elif number == 1 and job.layout.redundant:
                    trainer.replan()
        pieces += _pieces(trainer.assembly, {"master": "updated"})
        pieces += _forward_weights(trainer.assembly)
    return RankRecord(steps=steps, pieces=pieces, logits=logits.by_sequence)


class LogitsKept:
    """Writes down the logits of every forward of a step, by the number of its sequence."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.by_sequence = trainer, {}
        self.starts = first_sequences(trainer)
        # before the head, which has its weight then (ZeRO-3) and makes no logits where it makes the loss
        head: Any = trainer.built.model.get_output_embeddings()
        self.handle = head.register_forward_pre_hook(self._keep)

    def _keep(self, head: Any, args: Any) -> None:
        if not torch.is_grad_enabled():
            return  # a forward that only counts
        start, hidden_BSH = self.starts.pop(0), args[0].detach()
        for number, values in enumerate(F.linear(hidden_BSH, head.weight.detach()).double().numpy()):
            self.by_sequence[start + number] = values.copy()

    def close(self) -> None:
        self.handle.remove()


class ChoicesTold:
    """Routers that weigh the experts they are told, token by token, in place of choosing.

    Hash routing's way for ids takes each token's number to wherever its row is routed.
    """

    def __init__(self, trainer: Trainer, chosen: np.ndarray):
        self.trainer, self.chosen = trainer, torch.from_numpy(chosen)
        self.step, self.starts = 0, []
        for index, layer in enumerate(trainer.built.layers):
            layer.gate_router = _Told(layer.gate_router, self, index)
        trainer.built.model.register_forward_pre_hook(self._number_tokens, with_kwargs=True)

    def begin(self, step: int) -> None:
        self.step, self.starts = step, first_sequences(self.trainer)

    def _number_tokens(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        first = self.starts.pop(0)
        self.starts.append(first)  # forwards that only count come in the same order as those that follow
        start = first * ids.shape[1]
        self.trainer.built.context.input_ids = torch.arange(start, start + ids.numel()).view_as(ids)


class _Told:
    uses_input_ids = True
    uses_sequences = ragged = False

    def __init__(self, router: Router, told: ChoicesTold, layer: int):
        self.router, self.told, self.layer = router, told, layer
        self.spec, self.balanced, self.has_scores = router.spec, router.balanced, router.has_scores
        self.top_k, self.num_experts = router.top_k, router.num_experts

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        assert input_ids_T is not None
        ids_TK = self.told.chosen[self.told.step, self.layer][input_ids_T] if replay_TK is None else replay_TK
        return self.router.route(gate, x_TH, None, ids_TK)


def first_sequences(trainer: Trainer) -> list[int]:
    """Number of the first sequence of each of this rank's micro-batches, within the step."""
    data, size = trainer.groups.data, trainer.recipe.batch.micro_size
    return [(m * data.world_size + data.rank_in_group) * size for m in range(trainer.run.accumulation)]


class Samples:
    """Stands in for the training data: sample i is row i of what was given."""

    def __init__(self, tokens: np.ndarray):
        self.rows = tokens.reshape(-1, tokens.shape[-1])

    def batch(self, start: int, count: int) -> np.ndarray:
        return self.rows[start : start + count]


@dataclass(frozen=True)
class Data:
    """As much of `TrainData` as a step reads."""

    train: Samples
    validation: None = None


def make_trainer(job: Job) -> Trainer:
    """The trainer that `moe-train train` would run, its data replaced; in float64 also DeepSpeed."""
    recipe, layout = at_layout(job.recipe, job.layout), job.layout
    topology = Topology(
        world=layout.world, expert=layout.expert, tensor=layout.tensor, expert_tensor=layout.expert_tensor
    )
    run = ResolvedRun.at(recipe, topology)
    groups, data = groups_of(topology), Data(Samples(job.tokens))
    if layout.precision != "fp64":
        assembly = assemble_around(data, run, groups, CPU)  # type: ignore[arg-type]
    else:
        assembly = _assemble_64(data, run, groups)
    position = Position(step=0, sequences=0, data="", run_id="", history={}, counts=[])
    return Trainer(assembly, position, Path(), NullTracker(), NullProgress(), Throughput(), StopRequest())


@cache
def groups_of(topology: Topology) -> Groups:
    """Made once per process: hundreds of layouts would otherwise leave as many process groups behind."""
    return build_groups(topology)


def _assemble_64(data: Data, run: ResolvedRun, groups: Groups) -> Assembly:
    built, store = build_sharded_model(run, groups, CPU, torch.float64)
    built.model.double()
    replaying = built.context.recompute

    @contextmanager
    def recompute() -> Iterator[None]:
        # a mode is off inside backward, which torch treats as one of the calls that the mode has been told about
        with Float64(), replaying():
            yield

    built.context.recompute = recompute  # type: ignore[method-assign]
    engine = Engine64(built.model, store, optimizer_factory(run.recipe.optimizer, CPU), run.recipe, groups)
    return Assembly(run=run, groups=groups, device=CPU, built=built, engine=engine, data=data)  # type: ignore[arg-type]


def _step(trainer: Trainer) -> StepRecord:
    sums, result = trainer.train_step()
    biases = [bias.numpy() for bias in trainer.built.all_biases()]
    return StepRecord(
        loss=sums.loss,
        aux_loss=sums.aux_loss,
        z_loss=sums.z_loss,
        grad_norm=result.grad_norm,
        clip_factor=result.clip_factor,
        counts_LE=sums.counts_LE.numpy().copy(),
        rows_LE=sums.rows_LE.numpy().copy(),
        bias_LE=np.stack(biases) if biases else np.zeros((0, sums.counts_LE.shape[1])),
    )


# ---- gradients, as the optimizers get them


def _optimizers(assembly: Assembly) -> list[torch.optim.Optimizer]:
    found = [assembly.engine.inner, assembly.engine.store.optimizer]
    return [optimizer for optimizer in found if optimizer is not None]


@contextmanager
def kept_gradients(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Each optimizer's next step leaves the gradient it used among the states of its parameters, as `gradient`.

    That is where every ZeRO stage ends up, and `Fragment` gives it its logical name like any other state. Afterwards
    the optimizers are as they were.
    """
    # after the step: before it, an optimizer takes a state that is not empty for one that it has made
    handles = [optimizer.register_step_post_hook(_keep_gradient) for optimizer in optimizers]
    yield
    for handle in handles:
        handle.remove()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.pop("gradient", None)


def _keep_gradient(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.state[parameter]["gradient"] = parameter.grad.detach().clone()


def _gradients(assembly: Assembly, clip_factor: float) -> Iterator[Piece]:
    """Divided by the clip factor: what was not clipped by it stands out."""
    for piece in _pieces(assembly, {"gradient": "gradient"}):
        piece.values[...] = piece.values / clip_factor
        yield piece


# ---- weights


def _pieces(assembly: Assembly, kinds: dict[str, str]) -> Iterator[Piece]:
    """Copies of fragments' views; `kinds`: name of the view -> kind of the piece."""
    fragments: list[Fragment] = [*assembly.engine.dense_fragments(), *assembly.engine.store.fragments()]
    for fragment in fragments:
        for view, kind in kinds.items():
            if view in fragment.views:
                yield Piece(
                    kind=kind,
                    name=fragment.name,
                    expert=fragment.expert,
                    where=_where(fragment),
                    values=as_array(fragment.views[view]),
                    owner=fragment.owner,
                )


def as_array(values: torch.Tensor) -> np.ndarray:
    """A copy; numpy knows no bf16."""
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()


def _where(fragment: Fragment) -> int | np.ndarray:
    if fragment.part is None:
        return fragment.start
    return places_of(fragment.part, fragment.shape)[fragment.start : fragment.stop]


def places_of(part: TensorSlice, shape: tuple[int, ...]) -> np.ndarray:
    """Of a part's elements in the flattened logical tensor."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    return part.take(whole).reshape(-1).numpy()


@torch.no_grad()
def _forward_weights(assembly: Assembly) -> Iterator[Piece]:
    """What the next forward would use, on every rank: a copy that was not brought up to date stands out. Collective."""
    for name, parameter in assembly.built.model.named_parameters():
        whole, start = parameter.detach(), 0
        total: int = getattr(parameter, "ds_numel", whole.numel())
        if whole.numel() != total:  # ZeRO-3 holds a part, padded at the end
            part: torch.Tensor = parameter.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
            start = assembly.groups.data.rank_in_group * part.numel()
            whole = part[: max(total - start, 0)]
        values = as_array(whole.reshape(-1))
        cut = tensor_part(parameter)
        where: int | np.ndarray = start
        if cut is not None:  # its view's shape is the logical one
            where = places_of(cut, cut.view_shape)[start : start + values.size]
        yield Piece(kind="forward", name=name, expert=None, where=where, values=values)
    for tensor in assembly.engine.store.tensors:
        for unit, value in zip(tensor.slots, tensor.gather(), strict=True):
            where = 0 if tensor.part is None else places_of(tensor.part, tensor.logical_shape)
            values = as_array(value.reshape(-1))
            yield Piece(kind="forward", name=tensor.name, expert=unit, where=where, values=values)
