"""Which layouts are compared. Pure: sizes -> list of `Layout`.

A new axis is a field of `Layout` with its values in `full_grid`; the quick grid finds it by itself.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Precision = Literal["fp32", "fp64", "bf16"]
Backend = Literal["loop", "grouped", "fused"]
Split = Literal["whole", "single", "between"]
Shared = Literal["local", "split", "external"]
Device = Literal["cpu", "cuda"]
PRECISIONS: tuple[Precision, ...] = ("fp64", "fp32", "bf16")

QUICK_LIMIT = 16
"""Layouts of a quick certificate: enough for every value of every axis at worlds 1 to 4."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of running the same optimizer steps.

    expert: ranks of an EP group. stage: ZeRO. split: how a rank's sequences become micro-batches: `whole` is one,
    `single` one sequence each, `between` something in between; `micro_size` and `accumulation` say it in numbers.
    recompute: activation checkpointing. precision: fp64 leaves DeepSpeed out, which takes float32 and less; bf16, with
    float32 master weights, is told the reference's choice of experts, which its rounding would change.
    tensor, expert_tensor: ranks that share the dense part, and every expert. redundant: copies of experts beyond one.
    shared: shared experts held by each rank, cut over the tensor ranks, or on ranks of their own. after: routed after
    the tokens are shared out (`moe.route_after_dp_transform`).
    """

    world: int
    expert: int
    stage: int
    split: Split
    micro_size: int
    accumulation: int
    recompute: bool
    backend: Backend
    precision: Precision
    tensor: int = 1
    expert_tensor: int = 1
    redundant: int = 0
    shared: Shared = "local"
    after: bool = False

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.world // self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.expert * self.expert_tensor)

    @property
    def shared_ranks(self) -> int:
        return int(self.shared == "external")

    def __str__(self) -> str:
        tensor = [f"TP {self.tensor}"] if self.tensor > 1 else []
        tensor += [f"expert TP {self.expert_tensor}"] if self.expert_tensor > 1 else []
        parts = [" x ".join([str(self.world), f"EP {self.expert}", *tensor])]
        parts += [f"{self.redundant} redundant"] if self.redundant else []
        parts += [f"shared {self.shared}"] if self.shared != "local" else []
        parts += ["routed after"] if self.after else []
        parts += [f"ZeRO-{self.stage}", f"{self.accumulation} x {self.micro_size}"]
        return ", ".join([*parts, *(["recompute"] if self.recompute else []), self.backend, self.precision])


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What of a model decides which layouts it has. tensors: legal tensor-parallel sizes. width: of an expert.
    whole_sequences: its choice needs them, so that it cannot be made after tokens are shared out. fused: the backend of
    that name is certified beside the others: on a CPU if the recipe asks for it, on GPUs if Triton is there. device:
    where layouts run. precisions: those wanted, of the ones that a device has.
    """

    num_experts: int
    has_shared: bool
    tensors: tuple[int, ...]
    width: int
    whole_sequences: bool = False
    fused: bool = False
    device: Device = "cpu"
    precisions: tuple[Precision, ...] = PRECISIONS

    @property
    def arithmetic(self) -> list[tuple[Precision, Backend]]:
        both = ARITHMETIC[self.device] + (FUSED_ARITHMETIC[self.device] if self.fused else ())
        return [(precision, backend) for precision, backend in both if precision in self.precisions]


ARITHMETIC: dict[Device, tuple[tuple[Precision, Backend], ...]] = {
    "cpu": (
        ("fp32", "loop"),
        ("fp32", "grouped"),
        ("fp64", "loop"),  # torch's grouped GEMM takes no float64
        ("bf16", "grouped"),
    ),
    # what runs train in there; and loops in float32, whose bounds are a thousand times closer
    "cuda": (("bf16", "loop"), ("bf16", "grouped"), ("fp32", "loop")),
}
FUSED_ARITHMETIC: dict[Device, tuple[tuple[Precision, Backend], ...]] = {
    "cpu": (("fp32", "fused"), ("bf16", "fused")),
    "cuda": (("bf16", "fused"),),
}
AXES = tuple(f.name for f in fields(Layout) if f.name not in ("micro_size", "accumulation"))
"""What is varied; micro_size and accumulation follow from `split` and the data-parallel size."""


def full_grid(global_size: int, worlds: Sequence[int], traits: Traits) -> list[Layout]:
    """Every way of running data and expert parallelism; every further way of dividing ranks at every ZeRO stage.

    `global_size` sequences per step must be a multiple of each world.
    """
    return [
        layout
        for world in worlds
        for layout in (*_data_and_experts(global_size, world, traits), *_divided_otherwise(global_size, world, traits))
    ]


def _data_and_experts(global_size: int, world: int, traits: Traits) -> Iterator[Layout]:
    """The product of all choices that need neither tensor parallelism nor a slot plan."""
    for expert in _divisors(world):
        for precision, backend in traits.arithmetic:
            for stage in range(4):
                for split, micro_size in _splits(global_size // world):
                    for recompute in (False, True):
                        yield Layout(
                            world=world,
                            expert=expert,
                            stage=stage,
                            split=split,
                            micro_size=micro_size,
                            accumulation=global_size // (world * micro_size),
                            recompute=recompute,
                            backend=backend,
                            precision=precision,
                        )


def _divided_otherwise(global_size: int, world: int, traits: Traits) -> Iterator[Layout]:
    """Every division of ranks beyond EP and data, at every stage and precision; the other choices take turns."""
    turn = 0
    backends = _backends(traits)
    for division in _divisions(world, traits):
        splits = _splits(global_size // (world // division["tensor"]))
        for stage in range(4):
            for precision in backends:
                split, micro_size = splits[turn % len(splits)]
                yield Layout(
                    world=world,
                    stage=stage,
                    split=split,
                    micro_size=micro_size,
                    accumulation=global_size * division["tensor"] // (world * micro_size),
                    # turns of 5 and 7: against stages and precisions, which come round every 12
                    recompute=turn // 7 % 2 == 1,
                    backend=backends[precision][turn // 5 % len(backends[precision])],
                    precision=precision,
                    **division,
                )
                turn += 1


def _backends(traits: Traits) -> dict[Precision, list[Backend]]:
    """By precision; where loops have no bf16 layouts of their own, they take turns there too."""
    found: dict[Precision, list[Backend]] = {}
    for precision, backend in traits.arithmetic:
        found.setdefault(precision, ["loop"])
        if backend not in found[precision]:
            found[precision].append(backend)
    return found


def _divisions(world: int, traits: Traits) -> Iterator[dict]:
    for tensor, wide in itertools.product(_divisors(world), repeat=2):
        if tensor not in traits.tensors or traits.width % wide or max(tensor, wide) % min(tensor, wide):
            continue
        for expert in _divisors(world // wide):
            for shared, redundant in itertools.product(("local", "split", "external"), (False, True)):
                routed = expert - (shared == "external")
                if shared != "local" and not traits.has_shared:
                    continue
                if (shared == "split" and tensor == 1) or (shared == "external" and (expert == 1 or wide > 1)):
                    continue
                if redundant and routed < 2:
                    continue
                plain = tensor == wide == 1 and shared == "local" and not redundant
                for after in (False, True) if max(tensor, wide) > 1 and not traits.whole_sequences else (False,):
                    if not plain:
                        yield {
                            "tensor": tensor,
                            "expert_tensor": wide,
                            "expert": expert,
                            "shared": shared,
                            # one more slot on every rank that has routed experts, and one beyond: an uneven plan
                            "redundant": min(routed + 1, traits.num_experts * (routed - 1)) if redundant else 0,
                            "after": after,
                        }


def quick_grid(global_size: int, worlds: Sequence[int], traits: Traits, limit: int = QUICK_LIMIT) -> list[Layout]:
    """At most `limit` layouts: every value of every axis if the limit allows, then as many pairs of values as fit.

    Greedy: the layout that shows the most values not seen yet, then the most pairs not seen yet, then the first.
    """
    candidates = full_grid(global_size, worlds, traits)
    bits: dict[tuple, int] = {}
    # sets as bits of integers: thousands of candidates are looked at again for every layout chosen
    shown = [(_bits(_values(c), bits), _bits(_pairs(c), bits)) for c in candidates]
    values = pairs = 0
    chosen: list[int] = []
    while len(chosen) < min(limit, len(candidates)):
        gains = [((v & ~values).bit_count(), (p & ~pairs).bit_count()) for v, p in shown]
        best = max(range(len(candidates)), key=gains.__getitem__)
        if not gains[best][1]:
            break
        chosen.append(best)
        values |= shown[best][0]
        pairs |= shown[best][1]
    return [candidates[number] for number in sorted(chosen)]


def _bits(members: set[tuple], bits: dict[tuple, int]) -> int:
    return sum(1 << bits.setdefault(member, len(bits)) for member in members)


def _values(layout: Layout) -> set[tuple]:
    """(axis, value) of a layout. How ranks are divided counts as one axis: EP 2 of 2 is not EP 2 of 4.

    So do the corners where most errors live: experts cut over ranks, several copies of each slice, their gradients
    sharded by ZeRO beside DeepSpeed's, and several micro-batches; the same with redundant experts.
    """
    several = layout.stage >= 2 and layout.accumulation > 1 and layout.precision == "fp32"
    cut_and_copied = layout.expert > 1 and layout.expert_data > 1
    return {(axis, getattr(layout, axis)) for axis in AXES if axis != "redundant"} | {
        ("redundant", bool(layout.redundant)),
        ("division", layout.world, layout.expert),
        ("corner", cut_and_copied and several),
        ("tied corner", bool(layout.redundant) and several),
        ("tokens", _order(layout.tensor, layout.expert_tensor)),
    }


def _order(tensor: int, expert_tensor: int) -> str:
    if tensor == expert_tensor:
        return "alone" if tensor == 1 else "the same"
    return "shared out" if tensor > expert_tensor else "brought together"


def _pairs(layout: Layout) -> set[tuple]:
    return set(itertools.combinations(sorted(_values(layout), key=str), 2))


def _splits(per_rank: int) -> list[tuple[Split, int]]:
    """Micro-batch sizes of a rank that has `per_rank` sequences a step."""
    found: list[tuple[Split, int]] = [("whole", per_rank)]
    if per_rank > 1:
        found.append(("single", 1))
    between = [size for size in _divisors(per_rank) if 1 < size < per_rank]
    if between:
        found.append(("between", between[len(between) // 2]))
    return found


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
