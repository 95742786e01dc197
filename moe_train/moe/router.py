"""From a block's gate to a routing: one object per way of reading what a gate returns.

Routers are no modules: the gate stays the block's own, with its parameters and names, and comes in as an argument.
T tokens, H hidden size, E experts, K experts per token.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from moe_train.errors import RoutingError
from moe_train.moe.config import MoEConfig
from moe_train.moe.route import RouterSpec, Routing, check_routing, route_fused, route_tokens
from moe_train.moe.sequences import Sequences

TensorOf = str | Callable[[nn.Module], torch.Tensor | None]
"""A tensor that belongs to a gate: its dotted name there, or a function of the gate."""


@runtime_checkable
class Router(Protocol):
    """spec: what is chosen, and what the scores are. uses_input_ids: the ids [T] must come with the tokens.
    uses_sequences: the choice looks at whole sequences, in training. ragged: it then has rows of any width.
    balanced: the choice follows the scores; if not, it is left out of balancing losses and bias updates.
    has_scores: every routing has logits and scores, so that losses can be computed from them.
    """

    spec: RouterSpec
    uses_input_ids: bool
    uses_sequences: bool
    ragged: bool
    balanced: bool
    has_scores: bool

    @property
    def top_k(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    def route(
        self,
        gate: nn.Module,
        x_TH: torch.Tensor,
        input_ids_T: torch.Tensor | None = None,
        replay_TK: torch.Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> Routing:
        """`replay_TK`: expert ids of the first forward, in recompute. They are used again, never chosen twice.
        `sequences`: of the tokens; None: in an evaluation, which routes as the family does.
        """
        ...


class _RouterBase:
    uses_input_ids = False
    uses_sequences = False
    ragged = False
    balanced = True
    has_scores = True

    def __init__(self, spec: RouterSpec):
        self.spec = spec

    @property
    def top_k(self) -> int:
        return self.spec.top_k

    @property
    def num_experts(self) -> int:
        return self.spec.num_experts


class ScoreRouter(_RouterBase):
    """The gate returns logits [T, E]; the spec does the rest. bias: the gate's correction bias."""

    def __init__(self, spec: RouterSpec, bias: TensorOf | None = None):
        super().__init__(spec)
        if spec.has_bias != (bias is not None):
            raise RoutingError(
                f"a router whose has_bias is {spec.has_bias} was given the bias {bias}: a correction bias needs both"
            )
        self.bias = bias

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        return self._score(gate, self._output(gate, x_TH), x_TH.shape[0], replay_TK)

    def route_fused(
        self, gate: nn.Module, x_TH: torch.Tensor, replay_TK: torch.Tensor | None, num_sequences: int
    ) -> Routing:
        """`route` by one operator, which also gives the sums that losses need; in float32."""
        logits_TE = _wide_logits(self._output(gate, x_TH), x_TH.shape[0], self.num_experts)
        return route_fused(logits_TE, self.spec, self._bias(gate), replay_TK, num_sequences)

    def _output(self, gate: nn.Module, x_TH: torch.Tensor) -> Any:
        return gate(x_TH)

    def _score(self, gate: nn.Module, logits: Any, num_tokens: int, replay_TK: torch.Tensor | None) -> Routing:
        logits_TE = _wide_logits(logits, num_tokens, self.num_experts)
        return route_tokens(logits_TE, self.spec, self._bias(gate), replay_TK)

    def _bias(self, gate: nn.Module) -> torch.Tensor | None:
        if self.bias is None:
            return None
        bias = _tensor_of(gate, self.bias)
        if bias is None or bias.numel() != self.num_experts:
            found = "absent" if bias is None else f"of shape {list(bias.shape)}"
            raise RoutingError(
                f"the correction bias ({self.bias}) of {type(gate).__name__} is {found}, and there are "
                f"{self.num_experts} experts: name the gate's buffer with one value per expert"
            )
        return bias.detach().reshape(-1)


class RawLogitsRouter(ScoreRouter):
    """A family's own gate that returns logits, or a tuple with the logits first."""

    def _output(self, gate, x_TH):
        output = gate(x_TH)
        return output[0] if isinstance(output, tuple) and output else output


class HashRouter(_RouterBase):
    """A fixed table says which experts a token id has [vocabulary, K]; the gate's scores weigh them.

    The gate returns logits [T, E] and is trained by the weights. table: the gate's, or anyone's.
    """

    uses_input_ids = True
    balanced = False

    def __init__(self, spec: RouterSpec, table: TensorOf):
        super().__init__(spec)
        self.table = table

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        num_tokens = x_TH.shape[0]
        ids_TK = self._look_up(gate, input_ids_T, num_tokens) if replay_TK is None else replay_TK
        logits_TE = _wide_logits(gate(x_TH), num_tokens, self.num_experts)
        return route_tokens(logits_TE, self.spec, None, ids_TK)

    @torch.no_grad()
    def _look_up(self, gate: nn.Module, input_ids: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        table_VK = _tensor_of(gate, self.table)
        if table_VK is None:
            raise RoutingError(f"hash routing has no table of experts per token id ({self.table}): give it one")
        if table_VK.dim() != 2 or not _is_integer(table_VK) or table_VK.shape[1] != self.top_k or not len(table_VK):
            raise RoutingError(
                f"the table of hash routing is {list(table_VK.shape)} of {table_VK.dtype}: it must be integers "
                f"[vocabulary, {self.top_k}], one row of top-k experts per token id"
            )
        ids_T = _check_input_ids(input_ids, num_tokens)
        vocabulary = len(table_VK)
        outside_T = (ids_T < 0) | (ids_T >= vocabulary)
        ids_TK = table_VK[ids_T.clamp(0, vocabulary - 1)].long()
        foreign_TK = (ids_TK < 0) | (ids_TK >= self.num_experts)
        outside, foreign = torch.stack([outside_T.any(), foreign_TK.any()]).tolist()  # waits for the device once
        if outside:
            raise ValueError(
                f"input_ids lie between {int(ids_T.min())} and {int(ids_T.max())}, and the table of hash routing has "
                f"the token ids 0..{vocabulary - 1}"
            )
        if foreign:
            raise RoutingError(
                f"the table of hash routing names experts between {int(ids_TK.min())} and {int(ids_TK.max())}, and "
                f"the experts are 0..{self.num_experts - 1}"
            )
        return ids_TK


class _ChosenByGate(_RouterBase):
    """Routers that get expert ids and weights as somebody else chose them."""

    def _routing(
        self, logits: torch.Tensor | None, ids: Any, weights: Any, num_tokens: int, replay_TK: torch.Tensor | None
    ) -> Routing:
        if not _is_integer(ids) or not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
            raise TypeError(
                f"expert indices must be integers and weights floating point, not {_kind(ids)} and {_kind(weights)}: "
                "check their order, or read this gate with a gate_router"
            )
        ids_TK = ids.long()
        check_routing(ids_TK, weights, num_tokens, self.top_k, self.num_experts, check_range=False)
        if replay_TK is not None and not torch.equal(ids_TK, replay_TK):
            raise RoutingError(
                "the gate chose other experts in recompute than in the first forward, so its gradient would be of "
                "another function: make the gate deterministic or turn activation checkpointing off"
            )
        logits_TE = None if logits is None else _wide_logits(logits, num_tokens, self.num_experts)
        return Routing(
            logits_TE=logits_TE,
            scores_TE=None if logits_TE is None else logits_TE.softmax(dim=-1),
            topk_ids_TK=ids_TK,
            topk_weights_TK=_wide(weights),
        )


class CustomRouter(_ChosenByGate):
    """A function in place of any reading of the gate; see `MoEConfig.gate_router` for what it gets and returns.

    has_scores: it must return the logits. Their softmax are the scores, as in Hugging Face's own balancing loss.
    """

    uses_input_ids = True

    def __init__(
        self,
        gate_router: Callable[..., Any],
        top_k: int,
        num_experts: int,
        layer_idx: int | None,
        *,
        has_scores: bool = False,
        balanced: bool = True,
    ):
        super().__init__(RouterSpec(num_experts=num_experts, top_k=top_k, score="softmax", normalize=False))
        self.gate_router, self.layer_idx = gate_router, layer_idx
        self.has_scores, self.balanced = has_scores, balanced

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        output = self.gate_router(gate, x_TH, self.top_k, input_ids_T, self.layer_idx)
        wanted = (3,) if self.has_scores else (2, 3)
        if not isinstance(output, tuple | list) or len(output) not in wanted:
            count = f"{len(output)} values" if isinstance(output, tuple | list) else type(output).__name__
            raise TypeError(
                f"gate_router returned {count}: it must return (indices, weights"
                f"{', logits)' if self.has_scores else ') or (indices, weights, logits)'}"
            )
        indices, weights, logits = (*output, None)[:3]
        return self._routing(logits, indices, weights, x_TH.shape[0], replay_TK)


class GateRouter(_ChosenByGate):
    """The gate chooses: (logits, weights, indices), as Hugging Face's routers do, or (indices, weights).

    scoring: what a gate's plain tensor means. takes_input_ids: the gate's second argument; it then chooses by the
    ids. The softmax of the logits are the scores, as in Hugging Face's own balancing loss; a gate that returns two
    values has none.
    """

    def __init__(
        self, top_k: int, num_experts: int, scoring: ScoreRouter | None = None, *, takes_input_ids: bool = False
    ):
        plain = RouterSpec(num_experts=num_experts, top_k=top_k, score="softmax", normalize=False)
        super().__init__(plain if scoring is None else scoring.spec)
        self.scoring = scoring
        self.uses_input_ids, self.balanced = takes_input_ids, not takes_input_ids

    def route(self, gate, x_TH, input_ids_T=None, replay_TK=None, sequences=None):
        num_tokens = x_TH.shape[0]
        ids = (_check_input_ids(input_ids_T, num_tokens),) if self.uses_input_ids else ()
        output = gate(x_TH, *ids)
        if isinstance(output, torch.Tensor):
            if self.scoring is None:
                raise RoutingError(
                    f"{type(gate).__name__} returned one tensor, which may be logits or weights: set "
                    "MoEConfig.scoring to say what becomes of it"
                )
            return self.scoring._score(gate, output, num_tokens, replay_TK)
        if not isinstance(output, tuple) or len(output) < 2:
            raise ValueError(
                f"Expected gate to return tuple with at least 2 elements, got {_kind(output)} from "
                f"{type(gate).__name__}: (logits, weights, indices) or (indices, weights)"
            )
        if len(output) > 3:
            raise TypeError(
                f"{type(gate).__name__} returned {len(output)} values, and which are indices and weights would be a "
                "guess: read it with a gate_router"
            )
        logits, weights, indices = output if len(output) == 3 else (None, output[1], output[0])
        return self._routing(logits, indices, weights, num_tokens, replay_TK)


def router_of(
    moe_config: MoEConfig,
    gate: nn.Module,
    top_k: int,
    num_experts: int,
    layer_idx: int | None,
    *,
    norm_topk_prob: bool | None = None,
    scale: float | None = None,
) -> Router:
    """The router that a configuration asks for: its own function, raw logits, or the gate's own choice.

    Args:
        norm_topk_prob, scale: of the block (`MoEConfig.norm_topk_prob`, `MoEConfig.scale`); None: those of the gate.
            Read for a scoring only.

    Raises `RoutingError` if top-k or groups do not fit, `ValueError` if a scoring lacks `norm_topk_prob`.
    """
    if moe_config.gate_router is not None:
        has_scores = moe_config.gate_router_gives_logits
        return CustomRouter(moe_config.gate_router, top_k, num_experts, layer_idx, has_scores=has_scores)
    scoring = None
    if moe_config.scoring is not None:
        bias = moe_config.field_names.bias
        normalize = moe_config.field(gate, "norm_topk_prob") if norm_topk_prob is None else norm_topk_prob
        scale = moe_config.scale(gate) if scale is None else scale
        spec = moe_config.scoring.spec(num_experts, top_k, normalize, has_bias=bias is not None)
        scoring = RawLogitsRouter(spec if scale is None else replace(spec, scale=scale), bias)
    if moe_config.gate_returns_raw_logits:
        assert scoring is not None
        return scoring
    takes_input_ids = "input_ids" in inspect.signature(gate.forward).parameters
    return GateRouter(top_k, num_experts, scoring, takes_input_ids=takes_input_ids)


def _wide_logits(logits: Any, num_tokens: int, num_experts: int) -> torch.Tensor:
    """The gate's logits, checked, in float32 at least."""
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise RoutingError(f"the gate must return logits [T, E] of floating point, not {_kind(logits)}")
    if tuple(logits.shape) != (num_tokens, num_experts):
        raise RoutingError(
            f"the gate returned logits of shape {list(logits.shape)} for {num_tokens} tokens and {num_experts} "
            f"experts: they must be [{num_tokens}, {num_experts}]"
        )
    return _wide(logits)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_input_ids(input_ids: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    if input_ids is None:
        raise ValueError("hash routing requires input_ids, and this forward has none: inputs_embeds are not enough")
    if not _is_integer(input_ids):
        raise ValueError(f"hash routing requires input_ids that are integers, not {_kind(input_ids)}")
    if input_ids.numel() != num_tokens:
        raise ValueError(f"{input_ids.numel()} input_ids for {num_tokens} tokens: hash routing needs one id per token")
    return input_ids.reshape(-1).long()


def _tensor_of(gate: nn.Module, source: TensorOf) -> torch.Tensor | None:
    if not isinstance(source, str):
        return source(gate)
    value: Any = gate
    for part in source.split("."):
        value = getattr(value, part, None)
    return value


def _is_integer(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
