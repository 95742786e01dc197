"""Where the elements of each logical tensor lie in a family's Hugging Face folder, as transformers itself puts them.

There is no table of names here. transformers' own conversion for saving is run on the numbers of elements instead of on
weights: what comes out says which tensor of a folder has which elements, whether experts lie there one by one, fused or
transposed. The same answer serves both directions.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moe_train.errors import RoutingError
from moe_train.model.build import find_blocks

Tensor = tuple[str, str, int | None]
"""(kind, name, expert) of a logical tensor, as a checkpoint names it."""
Pattern = tuple[int, ...]
Shape = tuple[int, ...]
SIDE = 4
"""4 x 4 elements stand in for an expert where names are asked for: enough for halves and for pairs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Part of a folder's tensor, and the elements of one logical tensor that are in it.

    shape: of the whole tensor in the folder. row: it is stacked, and this is the row of one expert.
    elements: their numbers in the flattened logical tensor, in the folder's order; a range, or an int tensor.
    """

    name: str
    shape: tuple[int, ...]
    row: int | None
    elements: range | torch.Tensor

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shape if self.row is None else self.shape[1:]

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """Of a flattened logical tensor, what lies here, in this order."""
        if isinstance(self.elements, range):
            return flat[self.elements.start : self.elements.stop]
        return flat[self.elements]


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """Where 4 x 4 numbers in place of an expert's elements went. pattern: those that did, in order."""

    name: str
    row: int | None
    pattern: Pattern


@dataclass(frozen=True, kw_only=True)
class Logical:
    """shape: of the logical tensor (of one expert). places: together they hold each element once."""

    shape: tuple[int, ...]
    places: tuple[Place, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class FolderLayout:
    """Of one model. tensors: logical tensor -> its places, in the order of the model.

    in_memory: the same for a folder that was written as the model is held, experts stacked (which transformers
    reads too); under names of the model.
    """

    def __init__(self, config: PretrainedConfig):
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.stacked = {
            f"{block.experts_name}.{name}": tuple(parameter.shape)
            for block in find_blocks(self.model)
            for name, parameter in block.experts.named_parameters(recurse=False)
        }
        parameters = dict(self.model.named_parameters())  # of tied ones the first, as in a checkpoint
        all_parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in all_parameters}
        self._dense = {name: p for name, p in parameters.items() if name not in self.stacked} | buffers
        self.tensors: dict[Tensor, Logical] = {}
        renamed, experts = self._renamed(), self._experts()
        for name, value in (parameters | buffers).items():
            kind = "buffer" if name in buffers else "master"
            if name not in self.stacked:
                self.tensors[kind, name, None] = _whole(renamed[name], tuple(value.shape))
                continue
            for expert in range(value.shape[0]):
                shape = tuple(value.shape[1:])
                self.tensors[kind, name, expert] = Logical(shape=shape, places=experts[name, expert])

    @cached_property
    def in_memory(self) -> dict[Tensor, Logical]:
        found = {}
        for tensor, logical in self.tensors.items():
            _, name, expert = tensor
            found[tensor] = _whole(name, logical.shape, self.stacked.get(name), expert)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in a folder, in the order of the model."""
        places = (place for logical in self.tensors.values() for place in logical.places)
        return {place.name: place.shape for place in places}

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type of a logical tensor in a folder of this type: a family keeps some in float32 whatever is asked."""
        kept = self.model._keep_in_fp32_modules_strict or ()
        return torch.float32 if any(pattern in name for pattern in kept) else dtype

    def _convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Names and values as `save_pretrained` would write them, of a model whose parameters have these shapes."""
        with _shaped(self.model, tensors):
            return revert_weight_conversion(self.model, dict(tensors))

    def _renamed(self) -> dict[str, str]:
        """Names in a folder of the tensors that are no experts; they are renamed at most."""
        names = {id(value): name for name, value in self._dense.items()}
        found = {names.get(id(value), ""): stored for stored, value in self._convert(self._dense).items()}
        changed = sorted(found.keys() ^ names.values())
        if changed:
            raise self._unknown(f"does more than rename {[found.get(name, name) for name in changed][:3]}")
        return found

    def _experts(self) -> dict[tuple[str, int], tuple[Place, ...]]:
        """By parameter and expert."""
        shapes = {
            stored: tuple(value.shape)
            for stored, value in self._convert(
                {name: torch.empty(shape, device="meta") for name, shape in self.stacked.items()}
            ).items()
        }
        found = self._stand_ins()
        if shapes.keys() != {part.name for parts in found.values() for part in parts}:
            raise self._unknown("names experts by their size")
        real: dict[tuple, dict[Pattern, tuple[Shape, range | torch.Tensor]]] = {}
        places = {}
        for (name, expert), parts in found.items():
            shape = self.stacked[name]
            key = (name.rpartition(".")[2], shape)
            if key not in real:
                real[key] = self._elements(name, shape, found[name, 0])
            if {part.pattern for part in parts} != set(real[key]):
                raise self._unknown(f"stores expert {expert} of {name} unlike expert 0")
            for part in parts:
                local = shapes[part.name] if part.row is None else shapes[part.name][1:]
                if real[key][part.pattern][0] != local:
                    raise self._unknown(f"gives {part.name} a shape of its own {list(shapes[part.name])}")
            places[name, expert] = tuple(
                Place(
                    name=part.name,
                    shape=shapes[part.name],
                    row=part.row,
                    elements=real[key][part.pattern][1],
                )
                for part in parts
            )
        return places

    def _stand_ins(self) -> dict[tuple[str, int], list["StandIn"]]:
        """What is stored where of each expert of each parameter, told by numbers in place of weights."""
        units, experts = SIDE * SIDE, next(iter(self.stacked.values()))[0]
        numbers = {}
        for position, (name, shape) in enumerate(self.stacked.items()):
            if len(shape) != 3 or shape[0] != experts:
                raise self._unknown(f"has {name} {list(shape)}, which is no stack of {experts} matrices")
            first = position * experts * units
            numbers[name] = torch.arange(first, first + experts * units).view(experts, SIDE, SIDE)
        names = list(numbers)
        found: dict[tuple[str, int], list[StandIn]] = defaultdict(list)
        for stored, value in self._convert(numbers).items():
            one = len((value // units).unique()) == 1
            if not one and len(value) != experts:
                raise self._unknown(f"mixes experts in {stored}")
            for row, part in {None: value}.items() if one else enumerate(value):
                elements = part.flatten().tolist()
                owner = {divmod(number // units, experts) for number in elements}
                position, expert = owner.pop()
                if owner or row not in (None, expert):
                    raise self._unknown(f"mixes experts in {stored}")
                pattern = tuple(number % units for number in elements)
                found[names[position], expert].append(StandIn(name=stored, row=row, pattern=pattern))
        return found

    def _elements(
        self, name: str, shape: tuple[int, ...], parts: list["StandIn"]
    ) -> dict[Pattern, tuple[Shape, range | torch.Tensor]]:
        """Shape, and numbers of one expert's elements as they are stored, by the pattern of their stand-in."""
        numel = math.prod(shape[1:])
        dtype = torch.int32 if numel < 2**31 else torch.int64
        stored = self._convert({name: torch.arange(numel, dtype=dtype).view(1, *shape[1:])})
        found = {
            part.pattern: stored[part.name] if part.row is None else stored[part.name][0]
            for part in parts
            if part.name in stored
        }
        held = torch.cat([elements.flatten() for elements in found.values()]).sort().values
        if len(found) != len(parts) or not torch.equal(held, torch.arange(numel, dtype=dtype)):
            raise self._unknown(f"does more than move the elements of {name}")
        return {pattern: (tuple(elements.shape), _compact(elements.flatten())) for pattern, elements in found.items()}

    def _unknown(self, what: str) -> RoutingError:
        return RoutingError(
            f"the folder layout that transformers gives {self.model.config.model_type} {what}: export and "
            "model.weights cannot follow it"
        )


def _whole(
    name: str, shape: tuple[int, ...], stacked: tuple[int, ...] | None = None, row: int | None = None
) -> Logical:
    """A logical tensor that lies in one place, under a name of its own."""
    place = Place(name=name, shape=stacked or shape, row=row, elements=range(math.prod(shape)))
    return Logical(shape=shape, places=(place,))


@contextmanager
def _shaped(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model's parameters in the shapes of what stands in for them: some conversions compare the two."""
    parameters = dict(model.named_parameters())
    changed = {n: parameters[n] for n, t in tensors.items() if n in parameters and parameters[n].shape != t.shape}

    def put(name: str, value: torch.nn.Parameter) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)

    try:
        for name in changed:
            put(name, torch.nn.Parameter(torch.empty(tensors[name].shape, device="meta")))
        yield
    finally:
        for name, value in changed.items():
            put(name, value)


def _compact(elements: torch.Tensor) -> range | torch.Tensor:
    first = int(elements[0])
    neighbours = range(first, first + len(elements))
    same = torch.equal(elements, torch.arange(first, neighbours.stop, dtype=elements.dtype))
    return neighbours if same else elements
