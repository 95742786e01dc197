"""A Hugging Face MoE block as a `MoELayer`: the same parts under the same names, on one process.

T tokens, H hidden size, E experts, K experts per token.
"""

import ast
import inspect
import textwrap
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from moe_train.errors import ConfigError
from moe_train.moe.config import MoEConfig
from moe_train.moe.fused import Checks, FusedMoEBase, fused_moe_class
from moe_train.moe.layer import ParallelMoELayer
from moe_train.moe.route import Routing
from moe_train.moe.router import router_of

RETURNS_WEIGHTS = ("GptOssMLP",)
"""Blocks of Hugging Face that return (hidden states, weights)."""

SIZES = ("hidden_dim", "hidden_size", "input_size")
FLAGS = ("training", "is_hash")
"""What a block's forward may read without having a part that would be lost."""


class MoELayer(nn.Module):
    """Args:
        moe_config: what the block's parts are called, and how its gate is read.
        module: the block, with its weights. Its children become this layer's under their own names, so that
            parameters, state dict and optimizers see what they saw before.
        checks: see `FusedMoEBase`.
        ignore: attributes that the block's forward reads and that make no difference. Any that are not named here and
            not known are refused, because this layer does not run that forward.

    top_k, num_experts. moe_layer_idx: the block's own, for a `gate_router`. fused_moe: the backend; no child.

    Raises `ConfigError` for parts that are missing or left over, `ValueError` for a top-k that does not fit.
    """

    def __init__(
        self, moe_config: MoEConfig, module: nn.Module, *, checks: Checks = "full", ignore: Collection[str] = ()
    ):
        super().__init__()
        if isinstance(module, MoELayer | ParallelMoELayer):
            raise RuntimeError(f"this block is a {type(module).__name__} already: wrap a block once")
        backend = fused_moe_class(moe_config)
        gate, experts = moe_config.required(module, "gate"), moe_config.required(module, "experts")
        shared, shared_gate = (moe_config.field(module, f"shared_experts{suffix}") for suffix in ("", "_gate"))
        top_k = moe_config.top_k(module)
        fused = backend(moe_config, experts, shared, shared_gate, top_k)
        check_block(moe_config, module, top_k, fused.num_experts, ignore)
        fused.checks = checks
        layer_idx = getattr(module, "moe_layer_idx", None)
        self.gate_router = router_of(
            moe_config,
            gate,
            top_k,
            fused.num_experts,
            layer_idx,
            norm_topk_prob=moe_config.norm_topk_prob(module),
            scale=moe_config.scale(module),
        )
        self.moe_config, self.moe_layer_idx = moe_config, layer_idx
        self.top_k, self.num_experts = top_k, fused.num_experts
        self.returns_weights = type(module).__name__ in RETURNS_WEIGHTS
        self._fused = [fused]  # in a list, because a child would give every parameter a second name
        self._adopt(module)
        self.train(module.training)

    def _adopt(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        kept = module.state_dict(keep_vars=True)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in kept)
        here = {id(tensor) for tensor in [*self.parameters(), *self.buffers()]}
        fused = self.fused_moe
        extra = [name for name, p in [*fused.named_parameters(), *fused.named_buffers()] if id(p) not in here]
        if extra:
            raise TypeError(
                f"{type(fused).__name__} has tensors of its own ({', '.join(extra)}), which the block's state dict has "
                "no name for: compute with the experts that it is given"
            )

    @property
    def fused_moe(self) -> FusedMoEBase:
        if not self._fused:
            raise RuntimeError("the experts of this layer were given to a parallel one: use that")
        return self._fused[0]

    def train(self, mode: bool = True):
        for fused in self._fused:
            fused.train(mode)
        return super().train(mode)

    def routing(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> Routing:
        """Logits, scores, indices and weights of [..., H], for T tokens in one dimension."""
        if hidden_states.dim() < 2:
            raise ValueError(f"hidden_states must be [..., H], not of shape {list(hidden_states.shape)}")
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if input_ids is not None:
            if input_ids.numel() != x_TH.shape[0]:
                raise ValueError(f"{input_ids.numel()} input_ids for {x_TH.shape[0]} tokens: give one id per token")
            input_ids = input_ids.reshape(-1)
        gate = self.moe_config.required(self, "gate")
        return self.gate_router.route(gate, x_TH, input_ids)

    def route(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., H] -> expert indices [..., K] and weights [..., K]."""
        routing = self.routing(hidden_states, input_ids)
        shape = (*hidden_states.shape[:-1], self.top_k)
        return routing.topk_ids_TK.view(shape), routing.topk_weights_TK.view(shape)

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> Any:
        """[..., H] -> [..., H], or what else the block returns (see `RETURNS_WEIGHTS`).

        Args:
            input_ids: [...], for routers that hash them.
        """
        indices, weights = self.route(hidden_states, input_ids)
        y = self.fused_moe(hidden_states, indices, weights)
        return (y, weights.view(-1, self.top_k).to(y.dtype)) if self.returns_weights else y

    def give_up(self) -> FusedMoEBase:
        """The experts and shared experts, for a parallel layer; this layer cannot be used any more."""
        fused = self.fused_moe
        self._fused.clear()
        return fused


def check_block(
    moe_config: MoEConfig, module: nn.Module, top_k: int, num_experts: int, ignore: Collection[str]
) -> None:
    """Raise `ConfigError` for what a block has and a layer in its place would not."""
    start = type(module).__name__
    own = {name for name, _ in module.named_parameters(recurse=False)}
    with_router = moe_config.gate_router is not None  # which may well read a tensor of the block
    lost = [name for name in moe_config.unclaimed(module) if name not in ignore and not (with_router and name in own)]
    if lost:
        raise ConfigError(
            f"{start} has parts that would be lost ({', '.join(lost)}): name them in MoEFieldNames if they are shared "
            "experts or their gate; another part needs a layer of its own"
        )
    counted = getattr(moe_config.field(module, "gate"), "num_experts", num_experts)
    if counted != num_experts:
        raise ConfigError(
            f"{start}: its gate chooses among {counted} experts and there are {num_experts}: give the whole block, "
            "before anything slices it"
        )
    for name in ("jitter_noise", "input_jitter_noise"):
        if getattr(module, name, None):
            raise ConfigError(f"{start}.{name} ({getattr(module, name)}) is not supported: set it to 0.0")
    harmless = {"top_k": top_k, "num_experts": num_experts, "routed_scaling_factor": 1.0}
    claimed = {getattr(moe_config.field_names, name) for name in vars(moe_config.field_names)} - {None}
    claimed = {name.split(".")[0] for name in claimed} | {*SIZES, *FLAGS, *ignore}
    for name in reads_of(module):
        value = getattr(module, name, None)
        if name in claimed or not _matters(value) or (name in harmless and value == harmless[name]):
            continue
        if with_router and isinstance(value, torch.Tensor):
            continue
        raise ConfigError(
            f"{start}.forward reads `{name}` ({_brief(value)}), which a MoELayer does not: if it scales or biases the "
            "routing, use MoEFieldNames.scale or a gate_router; if it makes no difference, name it in `ignore`"
        )
    if type(module).__name__ not in RETURNS_WEIGHTS and returns_several(module):
        raise ConfigError(
            f"{start}.forward returns more than the hidden states, and what else is not known here: whoever calls it "
            "would take one tensor apart"
        )


def reads_of(module: nn.Module) -> list[str]:
    """Attributes of itself that a module's forward names; [] where its source is not at hand."""
    return sorted(
        {
            node.attr
            for node in ast.walk(_forward_of(module))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
    )


def returns_several(module: nn.Module) -> bool:
    tree = _forward_of(module)
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(tree))


def _forward_of(module: nn.Module) -> ast.AST:
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
        return ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):  # built elsewhere, or written in a console: nothing to read
        return ast.Module(body=[], type_ignores=[])


def _matters(value: Any) -> bool:
    """Whether an attribute may change what a forward computes: not if it is off, absent or the identity."""
    if isinstance(value, torch.Tensor):
        return True
    return not (value is None or value is False or isinstance(value, nn.Identity) or (value == 0 and value is not True))


def _brief(value: Any) -> str:
    return type(value).__name__ if isinstance(value, torch.Tensor | nn.Module) or callable(value) else repr(value)[:40]
