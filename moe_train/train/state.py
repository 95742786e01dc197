"""Between a running trainer and a checkpoint: what is saved, and how it is put back."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, newest_complete
from moe_train.checkpoint.commit import Retention
from moe_train.checkpoint.piece import size_of
from moe_train.checkpoint.save import Save
from moe_train.checkpoint.snapshot import Snapshot
from moe_train.errors import CheckpointError, TopologyError
from moe_train.hub import FolderLayout, HubReader
from moe_train.model import BuiltModel
from moe_train.optim import Engine, Fragment
from moe_train.parallel import Groups, raise_together
from moe_train.train.assemble import Assembly


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, and what must be unchanged for it to go on.

    step: optimizer steps done. sequences: samples consumed. data: identity of the data and of its order.
    run_id: tracking. history: `LoadHistory.state_dict()`. counts: tokens per layer and expert since the last log. rows:
    those that were not dropped, where some may be.
    plans: redundant experts of each rank, by layer. counts_since_plan: tokens since those were chosen.
    guards: `LoadGuards.state_dict()`, and the bias rate as they have raised it. val_loss: of this very step, or None.
    guards: `LoadGuards.state_dict()`, and the bias rate as they have raised it. record: `LayerRecorder.state_dict()`.
    """

    step: int
    sequences: int
    data: str
    run_id: str
    history: dict[str, Any] = field(default_factory=dict)
    counts: list[list[int]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    plans: list[list[list[int]]] = field(default_factory=list)
    counts_since_plan: list[list[int]] = field(default_factory=list)
    guards: dict[str, Any] = field(default_factory=dict)
    val_loss: float | None = None
    record: dict[str, Any] = field(default_factory=dict)


def begin_save(
    root: Path, assembly: Assembly, position: Position, retention: Retention, snapshot: Snapshot | None
) -> Save:
    """Write a checkpoint's files, to be committed: all of them now, or, from a copy in `snapshot`, on a thread.

    Where a copy does not fit in a host's memory they are written now all the same. Collective. Raises
    `CheckpointError` on every rank if nothing could be begun.
    """
    engine, built, groups = assembly.engine, assembly.built, assembly.groups
    fragments = (f for f in _fragments(engine) if f.owner)
    lead, rng = groups.rank == 0, _rng(groups.rank, built.context.counts_LE.device)
    pieces = list(_chain(_pieces(fragments), _buffers(built) if lead else (), rng))  # views: nothing is copied
    save = Save(
        root,
        _manifest(assembly, position),
        groups.world,
        retention,
        nbytes=size_of(pieces),
        memory=snapshot.growth(pieces) if snapshot else 0,
    )
    if snapshot and save.fits_memory:
        save.start(snapshot.take(pieces))
    else:
        save.write(pieces)
    return save


def _manifest(assembly: Assembly, position: Position) -> Manifest:
    """Of this moment: nothing in it changes when training goes on. Collective."""
    engine, built, groups, recipe = assembly.engine, assembly.built, assembly.groups, assembly.run.recipe
    topology = groups.topology
    return Manifest(
        step=position.step,
        model_type=built.model.config.model_type,
        layout={
            "world": topology.world,
            "expert_parallel": topology.expert,
            "tensor_parallel": topology.tensor,
            "expert_tensor_parallel": topology.expert_tensor,
            "zero_stage": recipe.zero.stage,
            "redundant_experts": built.layers[0].plan.num_redundant,
            "shared_expert_ranks": built.layers[0].plan.shared_ranks,
            "shared_expert_tensor": recipe.parallel.shared_expert_tensor,
        },
        recipe=recipe.model_dump(mode="json"),
        scalars={"dense": engine.scalars(), "experts": _any_rank(groups, engine.store.scalars())},
        state={
            "sequences": position.sequences,
            "data": position.data,
            "model_config": json.loads(built.model.config.to_json_string(use_diff=False)),
            "run_id": position.run_id,
            "history": position.history,
            "counts": position.counts,
            "rows": position.rows,
            "plans": position.plans,
            "counts_since_plan": position.counts_since_plan,
            "guards": position.guards,
            "val_loss": position.val_loss,
            "record": position.record,
            "python_random": {str(r): s for r, s in enumerate(groups.world.gather_objects(_python_random()))},
        },
    )


def find_checkpoint(root: Path, groups: Groups) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint and why newer ones were passed over. Collective."""
    return newest_complete(root, groups.world)


def load_state(directory: Path, engine: Engine, built: BuiltModel, groups: Groups, data: str) -> Position:
    """Put a checkpoint back, into any layout. Everything is checked before anything is changed. Collective.

    Raises `CheckpointError` on every rank: another model, other data, or parts missing. Ranks ask for different parts,
    so one may find what the others do not: each phase ends with an agreement before the next one changes anything.
    """
    reader: CheckpointReader | None = None

    def check() -> None:
        nonlocal reader
        reader = CheckpointReader(directory, verify=False)  # `find_checkpoint` has compared the hashes
        found = reader.manifest.state["data"]
        if found != data:
            raise CheckpointError(
                f"{directory} was trained on other data (identity {found}, now {data}): the corpus, "
                "data.sequence_length, data.validation_fraction, the blend or seed has changed; start with another "
                "--run-dir"
            )
        forced = bool(reader.manifest.recipe.get("moe", {}).get("force_load"))
        if forced != built.is_forced:
            raise CheckpointError(
                f"{directory} was trained {'with' if forced else 'without'} moe.force_load, and this recipe "
                f"{'has none' if forced else 'has one'}: a benchmark and a real run do not go on from each other; give "
                "another --run-dir"
            )
        masters = list(_pieces(_fragments(engine), kinds={"master"}))
        reader.check([*masters, *_buffers(built)], _wanted(engine))

    def fill() -> None:
        assert reader is not None
        scalars = reader.manifest.scalars
        engine.allocate_state(reader.kinds(), scalars["dense"])
        engine.store.allocate_state(reader.kinds(), scalars["experts"])
        reader.fill(_pieces(_fragments(engine)))
        reader.fill(_buffers(built))

    for phase in (check, fill):
        _or_all_raise(groups, phase)
    assert reader is not None
    manifest = reader.manifest
    _restore_plans(manifest.state.get("plans", []), engine, built)
    engine.publish()
    # of the ranks that trained: a reshard changes the layout and leaves the random states and the recipe
    trained = (len(manifest.state["python_random"]), manifest.recipe["parallel"].get("tensor", 1))
    if trained == (groups.topology.world, groups.topology.tensor):
        _restore_rng(reader, groups.rank, manifest.state["python_random"][str(groups.rank)])
    return Position(
        step=manifest.step,
        sequences=manifest.state["sequences"],
        data=data,
        run_id=manifest.state["run_id"],
        history=manifest.state["history"],
        counts=manifest.state["counts"],
        rows=manifest.state.get("rows", []),
        plans=manifest.state.get("plans", []),
        counts_since_plan=manifest.state.get("counts_since_plan", []),
        guards=manifest.state.get("guards", {}),
        record=manifest.state.get("record", {}),
    )


def load_weights(folder: Path, engine: Engine, built: BuiltModel, groups: Groups) -> None:
    """Put a Hugging Face folder's weights in place of drawn ones, in any layout: each rank reads what it holds.

    Everything is checked before anything is changed. Collective. Raises `CheckpointError` on every rank.
    """
    reader: HubReader | None = None

    def check() -> None:
        nonlocal reader
        reader = HubReader(folder, FolderLayout(built.model.config))
        masters = list(_pieces(_fragments(engine), kinds={"master"}))
        reader.check([*masters, *_buffers(built)], _wanted(engine))

    def fill() -> None:
        assert reader is not None
        reader.fill(_pieces(_fragments(engine), kinds={"master"}))
        reader.fill(_buffers(built))

    for phase in (check, fill):
        _or_all_raise(groups, phase)
    engine.publish()


def _restore_plans(saved: list[list[list[int]]], engine: Engine, built: BuiltModel) -> None:
    """Redundant experts where they were, if the layout is the same: no number depends on it, the last bits do."""
    plans = []
    for layer, replicas in zip(built.layers, saved, strict=False):
        old = layer.plan
        if [len(experts) for experts in replicas] != [len(experts) for experts in old.replicas]:
            return
        try:
            plans.append(replace(old, replicas=tuple(map(tuple, replicas))))
        except TopologyError:  # as many copies on each rank, and other homes
            return
    if len(plans) == len(built.layers):
        for layer, plan in zip(built.layers, plans, strict=True):
            layer.set_plan(plan)
        engine.store.set_plans(plans)


def _or_all_raise(groups: Groups, phase: Callable[[], None]) -> None:
    error = None
    try:
        phase()
    except CheckpointError as caught:
        error = caught
    raise_together(groups.world, error)


def _fragments(engine: Engine) -> Iterator[Fragment]:
    yield from engine.dense_fragments()
    yield from engine.store.fragments()


def _pieces(fragments: Iterable[Fragment], kinds: set[str] | None = None) -> Iterator[Piece]:
    for fragment in fragments:
        for kind, view in fragment.views.items():
            if kinds is None or kind in kinds:
                yield Piece(
                    name=fragment.name,
                    expert=fragment.expert,
                    kind=kind,
                    shape=fragment.shape,
                    start=fragment.start,
                    data=view,
                    part=fragment.part,
                )


def _buffers(built: BuiltModel) -> Iterator[Piece]:
    """Correction biases: float32, equal on every rank."""
    names = {id(buffer): name for name, buffer in built.model.named_buffers()}
    for bias in built.all_biases():
        yield Piece(
            name=names[id(bias)], expert=None, kind="buffer", shape=tuple(bias.shape), start=0, data=bias.view(-1)
        )


def _wanted(engine: Engine) -> set[tuple[str, int | None]]:
    wanted: set[tuple[str, int | None]] = {(name, None) for name in engine.names.values()}
    wanted |= {(tensor.name, unit) for tensor in engine.store.tensors for unit in tensor.logical_units}
    return wanted


def _any_rank(groups: Groups, scalars: dict[str, float]) -> dict[str, float]:
    """Rank 0 may hold no expert; whoever does has the expert optimizer's step count."""
    return next((found for found in groups.world.gather_objects(scalars) if found), {})


def _chain(*iterables: Iterable[Piece]) -> Iterator[Piece]:
    for iterable in iterables:
        yield from iterable


def _python_random() -> dict[str, Any]:
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [numpy_name, np.asarray(numpy_keys).tolist(), *numpy_rest],
    }


def _rng(rank: int, device: torch.device) -> Iterator[Piece]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    for name, state in states.items():
        yield Piece(name=f"rank{rank}.{name}", expert=None, kind="rng", shape=tuple(state.shape), start=0, data=state)


def _restore_rng(reader: CheckpointReader, rank: int, saved: dict[str, Any]) -> None:
    for (name, _), shape in reader.tensors("rng").items():
        owner, _, kind = name.partition(".")
        if owner != f"rank{rank}" or (kind == "cuda" and not torch.cuda.is_available()):
            continue
        state = torch.empty(math.prod(shape), dtype=torch.uint8)
        reader.fill([Piece(name=name, expert=None, kind="rng", shape=shape, start=0, data=state)])
        torch.set_rng_state(state) if kind == "cpu" else torch.cuda.set_rng_state(state)
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
