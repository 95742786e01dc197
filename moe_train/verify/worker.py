"""What one rank runs for one layout: the real trainer's steps, on given tokens, written down by logical name."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_train.config import Recipe
from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.moe import ParallelMoELayer
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
from moe_train.verify.truth import Case

Plant = Callable[[], AbstractContextManager[Any]]
"""Importable function whose context changes the package while a layout runs: how a test plants an error."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shrunk recipe at one layout, and the tokens of its steps [steps, sequences, length + 1].

    chosen: experts of each token [steps, L, T, K], if the layout is to be told them. device: `cpu`, or `cuda`: the
    rank's current one.
    """

    recipe: Recipe
    layout: Layout
    tokens: np.ndarray = field(repr=False)
    chosen: np.ndarray | None = field(default=None, repr=False)
    plant: Plant | None = None
    device: str = "cpu"

    @classmethod
    def of(cls, case: Case, layout: Layout, device: str, plant: Plant | None = None) -> "Job":
        """In bf16, whose rounding would change it, the choice of experts is the truth's."""
        chosen = case.truths[layout.micro_size].chosen if layout.precision == "bf16" else None
        return cls(recipe=case.recipe, layout=layout, tokens=case.tokens, chosen=chosen, plant=plant, device=device)


def run_layout(rank: int, job: Job) -> RankRecord:
    """Collective over the layout's world."""
    # only an index keeps ranks apart: "cuda" alone is the current device, "cpu:0" is another name to torch than "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 layouts are held to float32's rounding
    with (job.plant or nullcontext)(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated names in libraries, once per rank and layout
        trainer = make_trainer(job, device)
        pieces = list(_pieces(trainer.assembly, {"master": "initial"}))
        steps = []
        logits = LogitsKept(trainer)
        told = None if job.chosen is None else ChoicesTold(trainer, job.chosen)
        for number in range(len(job.tokens)):
            with ExitStack() as stack:
                if job.layout.precision == "fp64":
                    stack.enter_context(Float64())
                if number == 0:
                    stack.enter_context(kept_gradients(_optimizers(trainer.assembly)))
                steps.append(_step(trainer))
                if number == 0:
                    pieces += _gradients(trainer.assembly, steps[0].clip_factor)
                elif number == 1 and job.layout.redundant:
                    trainer.replan()
        pieces += _pieces(trainer.assembly, {"master": "updated"})
        pieces += _forward_weights(trainer.assembly)
    choices = told.by_step() if told else []
    trainer.assembly.engine.close()  # a worker that kept every model would spend its time collecting garbage
    return RankRecord(steps=steps, pieces=pieces, logits=logits.by_step, choices=choices)


class LogitsKept:
    """Writes down the logits of every forward, by its step and the number of its sequence there."""

    def __init__(self, trainer: Trainer):
        self.built, self.size = trainer.built, trainer.recipe.batch.global_size
        self.by_step: list[dict[int, np.ndarray]] = [{} for _ in range(trainer.recipe.train.steps)]
        # before the head, which has its weight then (ZeRO-3) and makes no logits where it makes the loss
        head: Any = trainer.built.model.get_output_embeddings()
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: Any, args: Any) -> None:
        if not torch.is_grad_enabled():
            return  # a forward that only counts
        step, start = divmod(self.built.context.first_sequence, self.size)
        logits_BSV = F.linear(args[0].detach(), head.weight.detach())
        for number, values in enumerate(logits_BSV.cpu().double().numpy(), start):
            self.by_step[step][number] = values.copy()


class ChoicesTold:
    """Layers that send each token to the experts they are told; what their routers would have chosen is written down.

    The routers themselves stay as they are, as in recompute: they score and weigh what was chosen.
    """

    def __init__(self, trainer: Trainer, chosen: np.ndarray):
        self.trainer = trainer
        self.chosen = torch.from_numpy(chosen).to(trainer.assembly.device)
        self.strayed = torch.zeros(len(chosen), 2, dtype=torch.int64, device=self.chosen.device)
        for layer in trainer.built.layers:
            layer.route = partial(self._route, layer, layer.route)  # type: ignore[method-assign]

    def by_step(self) -> list[tuple[int, int]]:
        return [(strayed, told) for strayed, told in self.strayed.tolist()]

    def _route(self, layer: ParallelMoELayer, route: Callable, x_TH, x_MH, ids_T, shares, *rest):
        """`ParallelMoELayer.route`."""
        length, context = self.trainer.recipe.data.sequence_length, layer.context
        step, first = divmod(context.first_sequence, self.trainer.recipe.batch.global_size)
        told = self.chosen[step, layer.index, first * length :][: len(x_TH)]
        after = layer.options.route_after_dp_transform
        if after:
            told = layer.domain.enter(told, shares)

        def agreed_choice(gate, x, ids, sequences):
            num_sequences, sequence_T, _ = rest
            alike = num_sequences if sequence_T is None else None
            with torch.no_grad():
                own = layer._routing(gate, x, ids, None, sequences, alike, after).topk_ids_TK
            told_ME, own_ME = (_experts_of(each, layer.plan.num_experts) for each in (told, own))
            self.strayed[step] += torch.stack([(told_ME & ~own_ME).sum(), told_ME.sum()])
            return told

        layer._agreed_choice = agreed_choice  # type: ignore[method-assign]
        return route(x_TH, x_MH, ids_T, shares, *rest)


def _experts_of(ids_MK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Whether each token goes to each expert [M, E]; negative ids go nowhere."""
    found = torch.zeros(len(ids_MK), num_experts + 1, dtype=torch.bool, device=ids_MK.device)
    return found.scatter_(1, torch.where(ids_MK < 0, num_experts, ids_MK), True)[:, :num_experts]


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


def make_trainer(job: Job, device: torch.device) -> Trainer:
    """The trainer that `moe-train train` would run, its data replaced; in float64 also DeepSpeed."""
    recipe, layout = at_layout(job.recipe, job.layout), job.layout
    topology = Topology(
        world=layout.world, expert=layout.expert, tensor=layout.tensor, expert_tensor=layout.expert_tensor
    )
    run = ResolvedRun.at(recipe, topology)
    groups, data = groups_of(topology), Data(Samples(job.tokens))
    if layout.precision != "fp64":
        # the truth draws on the CPU
        assembly = assemble_around(data, run, groups, device, torch.device("cpu"))  # type: ignore[arg-type]
    else:
        assembly = _assemble_64(data, run, groups, device)
    position = Position(step=0, sequences=0, data="", run_id="", history={}, counts=[])
    return Trainer(assembly, position, Path(), NullTracker(), NullProgress(), Throughput(), StopRequest())


@cache
def groups_of(topology: Topology) -> Groups:
    """Made once per process: hundreds of layouts would otherwise leave as many process groups behind."""
    return build_groups(topology)


def _assemble_64(data: Data, run: ResolvedRun, groups: Groups, device: torch.device) -> Assembly:
    built, store = build_sharded_model(run, groups, device, torch.float64)
    built.model.double()
    replaying = built.context.recompute

    @contextmanager
    def recompute() -> Iterator[None]:
        # a mode is off inside backward, which torch treats as one of the calls that the mode has been told about
        with Float64(), replaying():
            yield

    built.context.recompute = recompute  # type: ignore[method-assign]
    engine = Engine64(built.model, store, optimizer_factory(run.recipe.optimizer, device), run.recipe, groups)
    return Assembly(run=run, groups=groups, device=device, built=built, engine=engine, data=data)  # type: ignore[arg-type]


def _step(trainer: Trainer) -> StepRecord:
    sums, result = trainer.train_step()
    biases = [bias.cpu().numpy() for bias in trainer.built.all_biases()]
    return StepRecord(
        loss=sums.loss,
        aux_loss=sums.aux_loss,
        z_loss=sums.z_loss,
        grad_norm=result.grad_norm,
        clip_factor=result.clip_factor,
        counts_LE=sums.counts_LE.cpu().numpy().copy(),
        rows_LE=sums.rows_LE.cpu().numpy().copy(),
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
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy().copy()


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
