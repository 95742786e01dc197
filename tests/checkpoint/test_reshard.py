"""A checkpoint written anew for another layout holds the same bits, and each rank's files hold what that rank owns."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import (
    DENSE,
    EXPERTS,
    KINDS,
    LAYOUTS,
    RANDOM_RANKS,
    ROUTED,
    few_cuts,
    logical_tensors,
    manifest_of,
    read,
    same_bits,
    save,
    whole_pieces,
)

from moe_train.checkpoint import CheckpointReader, Piece, read_manifest, save_checkpoint
from moe_train.checkpoint import save as saving
from moe_train.checkpoint import stream as streaming
from moe_train.checkpoint.compare import compare
from moe_train.checkpoint.manifest import Manifest
from moe_train.checkpoint.reshard import plan_reshard, reshard
from moe_train.checkpoint.source import Key
from moe_train.checkpoint.target import LAYOUT_KEYS, Layout
from moe_train.errors import CheckpointError, TopologyError
from moe_train.moe import SlotPlan
from moe_train.optim import ExpertTensor, ShardOptions
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import mlp_part

TENSORS = logical_tensors()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Several files per rank, buffers that cut tensors anywhere; and no wait for the disk."""
    monkeypatch.setattr(saving, "FILE_BYTES", 1500)
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 88)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def to(source: Path, destination: Path, layout: Layout) -> Path:
    return reshard(source, destination, vars(layout), few_cuts, jobs=3).destination


def digests(directory: Path) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in read_manifest(directory).files.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """The same checkpoint at every layout, all made of the first."""
    root = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FILE_BYTES", 1500)
        base = save(root, TENSORS)
        return {name: to(base, root / name, layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_any_layout_from_any_other(tmp_path, saved, source, target):
    """The same bits as a run reads them, equal by hash; and the very files that another source gives."""
    made = to(saved[source], tmp_path / "made", LAYOUTS[target])
    assert digests(made) == digests(saved[target])
    assert same_bits(read(made), TENSORS)
    found = compare(saved[source], made)
    assert found.equal, found
    assert found.kinds == Counter(key.kind for key in TENSORS)


def test_there_are_many_files_of_many_ranks(saved):
    """Or the grid above would prove little."""
    for name, layout in LAYOUTS.items():
        files = digests(saved[name])
        ranks = {file[:10] for file in files}
        assert len(ranks) == layout.world, name
        assert len(files) > len(ranks), name
    parts = [item for item in read_manifest(saved["TP 2, expert TP 3"]).slices if item.part]
    assert {item.expert is None for item in parts} == {True, False}
    split = [item for item in parts if item.start]
    assert split, "parts that ZeRO has cut once more"


def test_all_else_of_the_manifest_stays(saved):
    old, new = manifest_of(3), read_manifest(saved["EP 2, redundant"])
    for name in ("step", "model_type", "recipe", "scalars", "state"):
        assert getattr(new, name) == getattr(old, name), name
    layout = LAYOUTS["EP 2, redundant"]
    assert new.layout == {key: getattr(layout, name) for name, key in LAYOUT_KEYS.items()}
    assert new.format == 2
    random = {item.name: item.file[:10] for item in new.slices if item.kind == "rng"}
    assert random == {f"rank{rank}.cpu": f"rank_{rank:05d}" for rank in range(RANDOM_RANKS)}
    assert {item.file[:10] for item in new.slices if item.kind == "buffer"} == {"rank_00000"}


def test_random_states_of_more_ranks_than_there_are(saved):
    """They are kept for a reshard back."""
    stored = read_manifest(saved["one process"]).slices
    assert {item.name: item.file[:10] for item in stored if item.kind == "rng"} == {
        f"rank{rank}.cpu": "rank_00000" for rank in range(RANDOM_RANKS)
    }


def test_ranks_read_back_their_own_parts(saved):
    """What a run at the layout asks for is there as it is cut: nothing has to be put together."""
    layout = LAYOUTS["TP 2, expert TP 3"]
    reader = CheckpointReader(saved["TP 2, expert TP 3"])
    reader._assemble = None  # type: ignore[assignment]
    for name, shape in ROUTED.items():
        for expert in range(EXPERTS):
            for rank in range(layout.expert_tensor):
                part = mlp_part(name, shape, rank, layout.expert_tensor)
                whole = TENSORS[Key("exp_avg", name, expert)]
                data = torch.zeros(part.numel)
                piece = Piece(name=name, expert=expert, kind="exp_avg", shape=shape, start=0, data=data, part=part)
                reader.fill([piece])
                assert torch.equal(data, part.take(whole).view(-1))


# ---- what each rank owns, against the optimizer's own shards


def pieces_of_stores(layout: Layout) -> set[tuple]:
    """(rank, name, expert, part, start, stop) of all that `ExpertTensor`s of this layout would save."""
    topology = layout.topology
    options = ShardOptions(
        stage=layout.zero, compute_dtype=torch.float32, grad_dtype=torch.float32,
        device=torch.device("cpu"), state_device=torch.device("cpu"),
    )  # fmt: skip
    plan = SlotPlan(EXPERTS, layout.expert, layout.shared_ranks)
    holders = sorted(rank for group in topology.expert_groups() for rank in group[: layout.shared_ranks])
    found = set()
    for rank in range(layout.world):

        def mine(groups: list[list[int]], rank: int = rank) -> ParallelGroup:
            ranks = next(ranks for ranks in groups if rank in ranks)
            return ParallelGroup(ranks, rank, object())

        expert, width = mine(topology.expert_groups()), mine(topology.expert_tensor_groups())
        tensors = []
        for name, shape in ROUTED.items():
            part = mlp_part(name, shape, width.rank_in_group, width.world_size) if width.world_size > 1 else None
            first, count = plan.home(expert.rank_in_group)
            units = range(first, first + count)
            tensors.append((name, units, shape, mine(topology.expert_data_groups()), EXPERTS, part))
        for name, shape in DENSE.items():
            if layout.shared_ranks and ".shared_expert" in name and rank in holders:
                tensors.append((name, [None], shape, mine([holders]), None, None))
            if layout.shared_tensor and ".shared_expert." in name:
                tensor = mine(topology.tensor_groups())
                part = mlp_part(name, shape, tensor.rank_in_group, tensor.world_size)
                tensors.append((name, [None], shape, mine(topology.data_groups()), None, part))
        for name, units, shape, group, experts, part in tensors:
            tensor = ExpertTensor(name, units, shape, group, options, num_experts=experts, part=part)
            for piece in tensor.fragments({"master": tensor.master.detach()}):
                if piece.owner:
                    found.add((rank, piece.name, piece.expert, piece.part, piece.start, piece.stop))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_lie_where_their_optimizer_has_them(saved, name):
    layout = LAYOUTS[name]
    slices = read_manifest(saved[name]).slices
    expected = pieces_of_stores(layout)
    names = {piece[1] for piece in expected}
    for kind in KINDS:
        stored = {
            (int(item.file[5:10]), item.name, item.expert, item.part, item.start, item.stop)
            for item in slices
            if item.kind == kind and item.name in names
        }
        assert stored == expected


def test_everything_else_is_cut_over_the_data_group(saved):
    """As ZeRO-3 does; TP 3 over 6 ranks: data groups [0, 3], [1, 4], [2, 5]."""
    slices = read_manifest(saved["TP 3, shared experts cut"]).slices

    def of(name: str) -> set[tuple]:
        return {
            (int(i.file[5:10]), i.part and i.part.box, i.start, i.stop)
            for i in slices
            if i.name.endswith(name) and i.kind == "exp_avg"
        }

    assert of("embed_tokens.weight") == {(0, None, 0, 33), (3, None, 33, 66)}
    assert of("input_layernorm.weight") == {(0, None, 0, 3), (3, None, 3, 6)}
    assert of("layers.10.mlp.gate.weight") == {(0, None, 0, 15), (3, None, 15, 30)}
    assert of("model.scale") == {(0, None, 0, 1)}
    columns = {rank: ((0, 6), (4 * rank, 4 * rank + 4)) for rank in range(3)}
    assert of("o_proj.weight") == {
        (rank + 3 * shard, columns[rank], 12 * shard, 12 * shard + 12) for rank in range(3) for shard in range(2)
    }
    assert of("q_proj.bias") == {
        (rank + 3 * shard, ((4 * rank, 4 * rank + 4),), 2 * shard, 2 * shard + 2)
        for rank in range(3)
        for shard in range(2)
    }


def test_at_stage_0_whole_tensors_are_dealt_out(saved):
    slices = [i for i in read_manifest(saved["data parallel, ZeRO-0"]).slices if i.expert is None and i.kind in KINDS]
    assert all((item.start, item.stop) == (0, max(1, torch.Size(item.shape).numel())) for item in slices)
    ranks = {item.name: {other.file[:10] for other in slices if other.name == item.name} for item in slices}
    assert {len(files) for files in ranks.values()} == {1}, "a parameter and its states lie on one rank"
    assert Counter(int(next(iter(files))[5:]) for files in ranks.values()) == {0: 4, 1: 4, 2: 3}


# ---- any sizes


@st.composite
def layouts(draw, experts: int) -> Layout:
    """Any that a run could have; widths below are multiples of 12."""
    tensor = draw(st.sampled_from([1, 2, 3, 4]))
    expert_tensor = draw(st.sampled_from([m for m in (1, 2, 3, 4, 6) if m % tensor == 0 or tensor % m == 0]))
    expert = draw(st.integers(1, 4))
    unit = torch.Size([expert, expert_tensor]).numel()
    world = unit * draw(st.integers(1, 2))
    while world % tensor:
        world += unit
    shared = draw(st.integers(0, expert - 1)) if expert_tensor == 1 else 0
    redundant = draw(st.integers(0, experts * (expert - shared - 1)))
    cut = tensor > 1 and not shared and draw(st.booleans())
    return Layout(
        world=world, expert=expert, tensor=tensor, expert_tensor=expert_tensor, zero=draw(st.integers(0, 3)),
        redundant=redundant, shared_ranks=shared, shared_tensor=cut,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sizes(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("sizes", numbered=True)
    experts, hidden, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 2))
    block, inner = "model.layers.0.mlp", 12 * width
    shapes = {
        "model.norm.weight": (hidden,),
        "model.layers.0.self_attn.q_proj.weight": (inner, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, inner),
        f"{block}.shared_expert.gate_proj.weight": (inner, hidden),
    }
    tensors = {Key("master", name, None): torch.randn(shape) for name, shape in shapes.items()}
    for expert in range(experts):
        for name, shape in {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}.items():
            for kind in ("master", "momentum"):
                tensors[Key(kind, f"{block}.experts.{name}", expert)] = torch.randn(shape)
    first, second = data.draw(layouts(experts)), data.draw(layouts(experts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BUFFER_BYTES", data.draw(st.sampled_from([8, 100, 4096])))
        patch.setattr(saving, "FILE_BYTES", data.draw(st.sampled_from([300, 1 << 20])))
        base = save(root, tensors)
        there = to(base, root / "there", first)
        back = to(there, root / "back", second)
    assert same_bits(read(back), tensors)
    assert compare(base, back).equal
    shutil.rmtree(root)


@pytest.mark.parametrize("numel", [0, 1])
def test_tensors_of_hardly_any_elements(tmp_path, numel):
    tensors = {Key("master", "empty", None): torch.randn(numel), Key("master", "other", None): torch.randn(3)}
    made = to(save(tmp_path, tensors), tmp_path / "made", Layout(world=4, zero=3))
    assert same_bits(read(made), tensors)
    assert compare(tmp_path / "step_00000003", made).kinds == {"master": 2}


def test_a_rank_of_very_many_files_gets_larger_ones(tmp_path, monkeypatch):
    """A file's number has three digits."""
    monkeypatch.setattr(saving, "FILE_BYTES", 1)
    monkeypatch.setattr(streaming, "FILES_PER_RANK", 20)
    base = save_checkpoint(tmp_path, manifest_of(3), whole_pieces(TENSORS), ParallelGroup.single(), 2)
    made = to(base, tmp_path / "made", Layout(world=2))
    assert len(digests(made)) <= 40
    assert same_bits(read(made), TENSORS)


# ---- where from, where to


def test_a_folder_of_checkpoints_means_the_newest_whole_one(tmp_path):
    for step, seed in ((9, 1), (10, 2), (11, 3)):
        save(tmp_path / "run" / "checkpoints", logical_tensors(seed), step)
    (tmp_path / "run" / "checkpoints" / "best").write_text("step_00000009\n")
    pointed = to(tmp_path / "run" / "checkpoints" / "best", tmp_path / "pointed", Layout(world=2))
    assert same_bits(read(pointed), logical_tensors(1))
    (tmp_path / "run" / "checkpoints" / "best").write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match=r"best names '\.\./elsewhere', which is no checkpoint"):
        to(tmp_path / "run" / "checkpoints" / "best", tmp_path / "other", Layout(world=2))
    victim = tmp_path / "run" / "checkpoints" / "step_00000011" / "rank_00000_001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    for number, folder in enumerate((tmp_path / "run" / "checkpoints", tmp_path / "run")):
        done = reshard(folder, tmp_path / f"made{number}", {"world": 2}, jobs=1)
        assert [str(victim) in reason for reason in done.passed_over] == [True]
        assert read_manifest(done.destination).step == 10
        assert same_bits(read(done.destination), logical_tensors(2))
    for step in (9, 10):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "rank_00000_001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* is whole: .*step_00000011"):
        reshard(tmp_path / "run", tmp_path / "made3", {"world": 2}, jobs=1)


@pytest.mark.parametrize("what", ["folder", "file", "link to nowhere"])
def test_a_destination_that_exists_is_refused(tmp_path, saved, what):
    destination = tmp_path / "made"
    if what == "folder":
        destination.mkdir()
    elif what == "file":
        destination.touch()
    else:
        destination.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="made exists: a checkpoint is never overwritten"):
        to(saved["one process"], destination, Layout(world=2))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_destination_inside_of_the_source_is_refused(saved):
    source = saved["one process"]
    before = sorted(source.iterdir())
    with pytest.raises(CheckpointError, match="lies inside of"):
        to(source, source / "deeper" / "made", Layout(world=2))
    assert sorted(source.iterdir()) == before


def test_a_link_in_the_temporary_folder_s_place_is_refused(tmp_path, saved):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "made.tmp").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match=r"made\.tmp is a link"):
        to(saved["one process"], tmp_path / "made", Layout(world=2))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_destination_that_cannot_be_made(tmp_path, saved):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file.*cannot be made \(Not a directory\)"):
        to(saved["one process"], tmp_path / "file" / "made", Layout(world=2))


def test_no_checkpoint_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=f"{path} holds no checkpoint: give a step_<N> folder"):
            to(path, tmp_path / "made", Layout(world=2))


def test_no_space_is_known_before_anything_is_written(tmp_path, saved, monkeypatch):
    free = SimpleNamespace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        CheckpointError, match=r"made: \d+ bytes \(.* KiB\) are needed and 20000 \(19.53 KiB\) are free"
    ):
        to(saved["one process"], tmp_path / "made", Layout(world=2))
    assert not list(tmp_path.iterdir())
    free.free = 1 << 40
    assert same_bits(read(to(saved["one process"], tmp_path / "made", Layout(world=2))), TENSORS)


WRONG = {
    "EP of no ranks": ({"world": 4, "expert": 3}, r"parallel.expert \(3\) must divide the number of ranks \(4\)"),
    "S of all": ({"world": 2, "expert": 2, "shared_ranks": 2}, r"shared_expert_ranks \(2\) must be below"),
    "R without EP": ({"world": 2, "redundant": 2}, r"redundant_experts \(2\) needs expert parallelism"),
    "too many R": ({"world": 2, "expert": 2, "redundant": 6}, r"redundant_experts \(6\) exceeds 5"),
    "S and expert TP": (
        {"world": 4, "expert": 2, "expert_tensor": 2, "shared_ranks": 1},
        r"expert_tensor \(2\) and parallel.shared_expert_ranks \(1\)",
    ),
    "shared cut without TP": ({"world": 2, "shared_tensor": True}, r"parallel.tensor is 1"),
    "width": ({"world": 5, "expert_tensor": 5}, r"width \(12\) is no multiple of the 5 ranks"),
    "ZeRO-4": ({"world": 2, "zero": 4}, r"ZeRO stage from 0 to 3 \(4\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layout_that_does_not_fit_is_refused_before_anything_is_read(tmp_path, saved, monkeypatch, name):
    changes, words = WRONG[name]
    monkeypatch.setattr("moe_train.checkpoint.source.verify_file", None)
    with pytest.raises(TopologyError, match=words):
        reshard(saved["one process"], tmp_path / "made", changes, few_cuts)
    assert not list(tmp_path.iterdir())


def test_a_family_that_is_not_known_cannot_be_cut(tmp_path, saved):
    with pytest.raises(TopologyError, match="depends on the model's family"):
        reshard(saved["one process"], tmp_path / "made", {"world": 2, "tensor": 2})


def test_what_is_not_named_stays_as_in_the_source(tmp_path, saved):
    plan = plan_reshard(saved["shared ranks"], tmp_path / "made", {"zero": 3, "redundant": 0}, few_cuts)
    assert plan.layout == replace(LAYOUTS["shared ranks"], zero=3, redundant=0)
    with pytest.raises(TopologyError, match=r"must divide the number of ranks \(5\)"):
        plan_reshard(saved["shared ranks"], tmp_path / "made", {"world": 5}, few_cuts)


def test_a_plan_writes_nothing_and_says_what_would_be(tmp_path, saved):
    changes = {"world": 6, "expert": 3, "zero": 0}
    plan = plan_reshard(saved["one process"], tmp_path / "made", changes, few_cuts)
    text = plan.describe()
    assert not list(tmp_path.iterdir())
    for words in (
        "step 3, made_up",
        "its layout   world 1, expert_parallel 1",
        "world 6, EP 3, ZeRO-0",
        f"{(EXPERTS * len(ROUTED) + len(DENSE))} master",
        "rank_00000",
        "experts 0 to 1",
        "rank_00005",
        "experts 2 to 3",
        "experts 4 to 4",
        "are free",
    ):
        assert words in text
    done = reshard(saved["one process"], tmp_path / "made", changes, few_cuts)
    assert {file.name: file.nbytes for file in plan.files} == {
        name: entry.bytes for name, entry in read_manifest(done.destination).files.items()
    }
    on_disk = sum(path.stat().st_size for path in done.destination.iterdir())
    assert on_disk <= plan.nbytes
    assert sorted(path.name for path in done.destination.iterdir()) == sorted(
        [*digests(done.destination), "manifest.json"]
    )


def test_progress_counts_all_bytes(tmp_path, saved):
    seen: dict[str, list[tuple[int, int]]] = {}
    reshard(
        saved["one process"], tmp_path / "made", {"world": 2},
        report=lambda phase, done, total: seen.setdefault(phase, []).append((done, total)),
    )  # fmt: skip
    assert list(seen) == ["hashing one process", "writing"]
    for told in seen.values():
        assert told[-1][0] == told[-1][1]
    made = read_manifest(tmp_path / "made")
    assert seen["writing"][-1][1] == sum(entry.bytes for entry in made.files.values())


# ---- --check


def changed(tensors: dict[Key, torch.Tensor], key: Key) -> dict[Key, torch.Tensor]:
    value = tensors[key].clone()
    value.view(-1)[-1] += 1
    return {**tensors, key: value}


@pytest.mark.parametrize(
    "key",
    [
        Key("master", "model.layers.10.mlp.experts.down_proj", 3),
        Key("exp_avg_sq", "model.layers.0.mlp.experts.gate_up_proj", 0),
        Key("max_of_it", "model.scale", None),
        Key("buffer", "model.layers.0.mlp.gate.e_score_correction_bias", None),
        Key("rng", "rank2.cpu", None),
    ],
    ids=str,
)
def test_one_changed_element_is_named(tmp_path, saved, key):
    other = save(tmp_path, changed(TENSORS, key))
    found = compare(saved["EP 3, uneven, ZeRO-3"], to(other, tmp_path / "other", LAYOUTS["shared ranks"]))
    assert not found.equal
    assert found.differences == [f"{key}: other values"]
    assert str(key) in str(found)


def test_the_first_of_many_differences_comes_first(tmp_path, saved):
    """In the order of the model: layer 0 before layer 10, an expert's weights before its states."""
    tensors = TENSORS
    for expert in (4, 2):
        for layer in (10, 0):
            for kind in ("exp_avg", "master"):
                tensors = changed(tensors, Key(kind, f"model.layers.{layer}.mlp.experts.down_proj", expert))
    found = compare(saved["one process"], save(tmp_path, tensors))
    assert found.differences[:3] == [
        "master of model.layers.0.mlp.experts.down_proj, expert 2: other values",
        "exp_avg of model.layers.0.mlp.experts.down_proj, expert 2: other values",
        "master of model.layers.0.mlp.experts.down_proj, expert 4: other values",
    ]
    assert len(found.differences) == 8


def test_what_only_one_has_and_other_shapes_and_types_are_named(tmp_path, saved):
    tensors = dict(TENSORS)
    del tensors[Key("exp_avg", "model.layers.0.mlp.gate.weight", None)]
    tensors[Key("master", "model.new", None)] = torch.zeros(2)
    norm, bias = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"
    tensors[Key("master", norm, None)] = torch.zeros(3, 2)
    tensors[Key("master", bias, None)] = torch.zeros(12, dtype=torch.float64)
    other = save(tmp_path, tensors)
    found = compare(saved["data parallel, ZeRO-1"], other)
    assert set(found.differences) == {
        f"exp_avg of model.layers.0.mlp.gate.weight: only in {saved['data parallel, ZeRO-1']}",
        f"master of model.new: only in {other}",
        f"master of {norm}: float32 [6] and float32 [3, 2]",
        f"master of {bias}: float32 [12] and float64 [12]",
    }


def with_manifest(root: Path, **changes) -> Path:
    manifest = replace(manifest_of(3), **changes)
    return save_checkpoint(root, manifest, whole_pieces(TENSORS), ParallelGroup.single(), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "other"}, "model_type: made_up and other"),
        ({"step": 4}, "step: 3 and 4"),
        ({"scalars": {"dense": {"step": 3.0}, "experts": {"step": 2.0}}}, "scalars of the experts optimizer"),
        ({"state": {**manifest_of(3).state, "sequences": 25}}, "state sequences: 24 and 25"),
        ({"state": {**manifest_of(3).state, "history": {}}}, "state history: {'loss': [0.33"),
        (
            {"state": {**manifest_of(3).state, "python_random": {str(r): {} for r in range(3)}}},
            "state python_random: other values",
        ),
    ],
)
def test_other_states_of_the_trainer_are_named(tmp_path, saved, changes, words):
    found = compare(saved["one process"], with_manifest(tmp_path, **changes))
    assert len(found.differences) == 1
    assert words in found.differences[0]


def test_what_belongs_to_a_run_or_a_layout_is_not_compared(tmp_path, saved):
    state = {**manifest_of(3).state, "run_id": "other", "plans": [[[1]]]}
    assert compare(saved["one process"], with_manifest(tmp_path, state=state, recipe={}, layout={"world": 9})).equal


def test_random_states_of_other_ranks_are_not_compared_and_that_is_said(tmp_path, saved):
    tensors = {key: value for key, value in TENSORS.items() if key.name != "rank2.cpu"}
    found = compare(saved["one process"], save(tmp_path, tensors))
    assert found.equal
    assert "random states are of other ranks" in str(found)
    assert "rng" not in found.kinds


def test_the_fingerprint_is_of_the_content(tmp_path, saved):
    prints = {compare(saved["one process"], saved[name]).fingerprint for name in ("EP 2, redundant", "shared ranks")}
    assert len(prints) == 1
    one = save(tmp_path, changed(TENSORS, Key("exp_avg", "model.scale", None)))
    assert compare(one, one).fingerprint not in prints


def test_a_manifest_of_the_first_format_is_read(tmp_path, saved):
    """What is made of it is of the second."""
    shutil.copytree(saved["one process"], tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    tree = json.loads(path.read_text())
    for item in tree["slices"]:
        del item["part"]
    tree = {**tree, "slices": tuple(tree["slices"]), "format": 1}
    del tree["sha256"]
    path.write_text(Manifest(**tree).to_json())
    made = to(tmp_path / "old", tmp_path / "made", LAYOUTS["TP 2, expert TP 3"])
    assert digests(made) == digests(saved["TP 2, expert TP 3"])
    assert read_manifest(made).format == 2
