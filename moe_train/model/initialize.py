"""Every logical tensor is drawn alone: its values depend on (seed, Hugging Face name, expert), never on the layout.

The family's own `_init_weights` draws them, on one module or one expert at a time. Equality with stock
`from_config`, which draws everything from one stream, is not promised.
"""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


def seed_of(seed: int, *names: object) -> int:
    """A seed for one thing, by its name: 63 bits of a hash."""
    digest = hashlib.blake2b("\0".join(str(part) for part in (seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def drawn_from(device: torch.device, seed: int, *names: object) -> Iterator[None]:
    """The default generators of the CPU and `device`, seeded by name and put back afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # `torch.manual_seed` seeds every kind of device there might be: 1 ms, for each of thousands of experts
        number = seed_of(seed, *names)
        torch.default_generator.manual_seed(number)
        if on_gpu:
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(number)
        yield


@torch.no_grad()
def materialise_dense(model: PreTrainedModel, device: torch.device, seed: int) -> None:
    """Give every parameter and buffer left on the meta device memory and its initial value.

    Raises AssertionError if the family's `_init_weights` leaves one unset.
    """
    model.to_empty(device=device)
    for tensor in _floating(model):
        tensor.fill_(torch.nan)
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            with drawn_from(device, seed, name):
                model._init_weights(module)
    model.tie_weights()
    unset = [name for name, tensor in _named_floating(model) if tensor.isnan().any()]
    assert not unset, f"{type(model).__name__}._init_weights leaves these unset: {unset}"


@torch.no_grad()
def draw_expert(
    model: PreTrainedModel, experts: nn.Module, name: str, expert: int, device: torch.device, seed: int
) -> dict[str, torch.Tensor]:
    """One expert's initial weights by parameter name, each without the leading expert dimension.

    Args:
        experts: the family's own module, on the meta device; only its type and shapes are used.
        name: Hugging Face name of that module in the model.
    """
    single = copy.copy(experts)
    single._parameters = {
        key: nn.Parameter(torch.empty(1, *parameter.shape[1:], device=device))
        for key, parameter in experts.named_parameters(recurse=False)
    }
    with drawn_from(device, seed, name, expert):
        model._init_weights(single)
    return {key: parameter.data[0] for key, parameter in single.named_parameters(recurse=False)}


@torch.no_grad()
def draw_modules(
    model: PreTrainedModel, modules: dict[str, nn.Module], prefix: str, device: torch.device, seed: int
) -> dict[str, torch.Tensor]:
    """Initial values of modules that the model will not own, as `materialise_dense` would have drawn them.

    Args:
        modules: on the meta device, by attribute name under `prefix`.

    Returns: by `<attribute>.<parameter>`.
    """
    values = {}
    for attribute, meta in modules.items():
        module = copy.deepcopy(meta).to_empty(device=device)
        for name, part in module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                with drawn_from(device, seed, ".".join(filter(None, (prefix, attribute, name)))):
                    model._init_weights(part)
        values |= {f"{attribute}.{name}": parameter.data for name, parameter in module.named_parameters()}
    return values


def _named_floating(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


def _floating(model: nn.Module) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor in _named_floating(model))
