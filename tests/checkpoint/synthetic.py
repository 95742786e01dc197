"""A checkpoint of a small made-up model, every kind of thing in it that a real one has, and layouts to put it in."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, save_checkpoint
from moe_train.checkpoint.source import Key
from moe_train.checkpoint.target import Layout
from moe_train.parallel import ParallelGroup
from moe_train.parallel.tensor_slice import TensorSlice

EXPERTS = 5
DENSE = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (12, 6),
    "model.layers.0.self_attn.q_proj.bias": (12,),
    "model.layers.0.self_attn.o_proj.weight": (6, 12),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.0.mlp.gate.weight": (EXPERTS, 6),
    "model.layers.0.mlp.shared_expert.up_proj.weight": (12, 6),
    "model.layers.0.mlp.shared_expert.down_proj.weight": (6, 12),
    "model.layers.0.mlp.shared_expert_gate.weight": (1, 6),
    "model.layers.10.mlp.gate.weight": (EXPERTS, 6),
    "model.scale": (),
}
ROUTED = {
    f"model.layers.{layer}.mlp.experts.{name}": shape
    for layer in (0, 10)
    for name, shape in {"gate_up_proj": (24, 6), "down_proj": (6, 12)}.items()
}
KINDS = {"master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.bfloat16, "max_of_it": torch.float64}
"""Any optimizer's state names and types."""
RANDOM_RANKS = 3

LAYOUTS = {
    "one process": Layout(world=1),
    "data parallel, ZeRO-0": Layout(world=3),
    "data parallel, ZeRO-1": Layout(world=4, zero=1),
    "EP 3, uneven, ZeRO-3": Layout(world=6, expert=3, zero=3),
    "EP 2, redundant": Layout(world=4, expert=2, redundant=3, zero=2),
    "shared ranks": Layout(world=6, expert=3, shared_ranks=1, redundant=1, zero=1),
    "shared ranks, ZeRO-0": Layout(world=4, expert=4, shared_ranks=2),
    "more ranks than experts": Layout(world=8, expert=8, zero=1),
    "TP 2, expert TP 3": Layout(world=6, tensor=2, expert_tensor=2, expert=3, zero=1),
    "TP 3, shared experts cut": Layout(world=6, tensor=3, expert=2, shared_tensor=True, zero=3),
    "expert TP 4, ZeRO-0": Layout(world=8, tensor=2, expert=2, expert_tensor=4),
}


class FewCuts:
    """Of the model above; a `Cuts`."""

    def dense(self, name: str, shape: tuple[int, ...], tensor: int) -> list[TensorSlice] | None:
        if tensor == 1 or "self_attn" not in name:
            return None
        make, size = (TensorSlice.columns, shape[-1]) if "o_proj" in name else (TensorSlice.rows, shape[0])
        return [make(shape, rank * size // tensor, (rank + 1) * size // tensor) for rank in range(tensor)]

    def shared(self, name: str, gate: bool) -> bool:
        return name.startswith("shared_expert.") or (gate and name.startswith("shared_expert_gate."))


def few_cuts(manifest: Manifest) -> FewCuts:
    return FewCuts()


def logical_tensors(seed: int = 0) -> dict[Key, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {
        Key(kind, name, expert): drawn(shape, dtype)
        for shapes, experts in ((DENSE, [None]), (ROUTED, range(EXPERTS)))
        for name, shape in shapes.items()
        for expert in experts
        for kind, dtype in KINDS.items()
    }
    found[Key("buffer", "model.layers.0.mlp.gate.e_score_correction_bias", None)] = drawn((EXPERTS,))
    for rank in range(RANDOM_RANKS):
        noise = torch.randint(0, 256, (500,), generator=generator, dtype=torch.uint8)
        found[Key("rng", f"rank{rank}.cpu", None)] = noise
    return found


def manifest_of(step: int) -> Manifest:
    return Manifest(
        step=step,
        model_type="made_up",
        layout={"world": RANDOM_RANKS, "expert_parallel": 1, "zero_stage": 1},
        recipe={"seed": 7},
        scalars={"dense": {"step": 3.0}, "experts": {"step": 3.0}},
        state={
            "sequences": 24,
            "data": "identity",
            "run_id": "made-up",
            "history": {"loss": [1 / 3, 2.5]},
            "python_random": {str(rank): {"python": [3, [rank], None]} for rank in range(RANDOM_RANKS)},
        },
    )


def save(root: Path, tensors: dict[Key, torch.Tensor], step: int = 3) -> Path:
    """Whole tensors, by one process."""
    return save_checkpoint(root, manifest_of(step), whole_pieces(tensors), ParallelGroup.single(), 100)


def whole_pieces(tensors: dict[Key, torch.Tensor]) -> Iterator[Piece]:
    for (kind, name, expert), value in tensors.items():
        shape = tuple(value.shape)
        yield Piece(name=name, expert=expert, kind=kind, shape=shape, start=0, data=value.reshape(-1))


def read(directory: Path) -> dict[Key, torch.Tensor]:
    """As a run reads: every logical tensor, put together from its parts."""
    reader = CheckpointReader(directory)
    dtypes = {Key(*item.tensor): getattr(torch, item.dtype) for item in reader.manifest.slices}
    found = {}
    for kind in {key.kind for key in dtypes}:
        for (name, expert), shape in reader.tensors(kind).items():
            key = Key(kind, name, expert)
            found[key] = torch.zeros(math.prod(shape), dtype=dtypes[key]).view(shape)
    reader.fill(whole_pieces(found))
    return found


def same_bits(one: dict[Key, torch.Tensor], other: dict[Key, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and not different(one, other, one)


def different(one: dict[Key, torch.Tensor], other: dict[Key, torch.Tensor], keys: Iterable[Key]) -> list[Key]:
    def bits(value: torch.Tensor) -> bytes:
        return value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return [
        key
        for key in keys
        if (one[key].shape, one[key].dtype) != (other[key].shape, other[key].dtype)
        or bits(one[key]) != bits(other[key])
    ]
