"""One way to call, cut and stack the experts of a block, however its family stores them.

N rows, E experts, I expert intermediate size, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What Hugging Face's fused experts say about themselves."""


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How experts are stored.

    code: `list` (one module per expert), or the name of a fused layout in `LAYOUTS`.
    gated: `gate_up_proj` holds gate and up projection; otherwise `up_proj` is all there is.
    transposed: weights are [E, in, out] and not [E, out, in]. bias: both projections have one.
    own_gate: the class has a formula of its own for what follows the first projection (`_apply_gate`).
    float32: the family computes in float32 whatever the rows are.
    """

    code: str
    gated: bool = True
    transposed: bool = False
    bias: bool = False
    own_gate: bool = False
    float32: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the fused parameters: first projection, second projection, and their biases."""
        if self.code == "list":
            return ()
        weights = ("gate_up_proj" if self.gated else "up_proj", "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.bias else weights


LAYOUTS = {
    "L0": ExpertLayout(code="L0"),
    "L0*": ExpertLayout(code="L0*", own_gate=True),
    "L1": ExpertLayout(code="L1", transposed=True),
    "L2": ExpertLayout(code="L2", transposed=True, bias=True, own_gate=True),
    "L3": ExpertLayout(code="L3", transposed=True, bias=True, own_gate=True, float32=True),
    "L4": ExpertLayout(code="L4", gated=False),
}
"""L0: gate_up_proj [E, 2I, H], down_proj [E, H, I]; L0*: with a gate formula of its own. L1: both transposed.
L2: L1 with biases, gate and up columns in turn (gpt_oss). L3: L2 with gate columns first (openai_privacy_filter).
L4: up_proj [E, I, H], down_proj [E, H, I] (nemotron_h)."""

_BY_FLAGS = {
    (True, False, False, True): "L0",
    (True, False, True, True): "L1",
    (True, True, True, False): "L2",
    (True, True, True, True): "L3",
    (False, False, False, True): "L4",
}


REFUSED = {
    "Llama4TextExperts": "multiplies the rows by their weights before the experts, and not their outputs",
    "LongcatFlashExperts": "counts identity experts among its ids, which no rank holds",
    "DbrxExperts": "keeps all experts in one matrix [E * I, H] per projection",
    "JetMoeParallelExperts": "holds one projection of all experts and not whole experts",
}
"""Classes of Hugging Face whose parameters could be taken for a layout, and why they have none."""


class ExpertWrapper(nn.Module):
    """Args:
        experts: a ModuleList of experts, or one module with `num_experts` and fused parameters.
        layout: for fused modules that do not say themselves how they are stored; see `LAYOUTS`.

    num_experts: held here, fewer after `slice_experts`. global_num_experts: before it.

    Raises `ValueError` for experts that no layout describes: computing them wrongly would be worse.
    """

    def __init__(self, experts: nn.Module, layout: ExpertLayout | None = None):
        super().__init__()
        if type(experts).__name__ in REFUSED:
            raise ValueError(
                f"{type(experts).__name__} {REFUSED[type(experts).__name__]}: make it a ModuleList of experts"
            )
        self.layout = detect_layout(experts) if layout is None else layout
        self.experts: nn.Module = experts
        self.global_num_experts = self.num_experts = _count(experts)
        self._sliced = False
        if self.layout.code != "list":
            _check_parameters(experts, self.layout)

    def call_expert(self, index: int, x_NH: torch.Tensor) -> torch.Tensor:
        """Local expert `index` on rows [N, H]. N may be 0: its parameters then get a gradient of zero, not None."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} is not among the {self.num_experts} held here")
        if self.layout.code == "list":
            return _call_module(self.experts[index], x_NH)  # type: ignore[index]
        return self._feed_forward(x_NH, *(parameter[index] for parameter in self._fused))

    def call_experts(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Every local expert on its rows. Fused gradients are stacked once, not once per expert."""
        if len(rows) != self.num_experts:
            raise ValueError(f"rows for {len(rows)} experts, and {self.num_experts} are held here")
        if self.layout.code == "list":
            return [self.call_expert(index, x_NH) for index, x_NH in enumerate(rows)]
        parts = zip(*(parameter.unbind(0) for parameter in self._fused), strict=True)
        return [self._feed_forward(x_NH, *weights) for x_NH, weights in zip(rows, parts, strict=True)]

    def apply_gate(self, up_N2I: torch.Tensor) -> torch.Tensor:
        """What the family puts between its projections, on the whole output of the first one."""
        experts = self.experts
        if not self.layout.gated:
            return experts.act_fn(up_N2I)  # type: ignore[operator]
        if hasattr(type(experts), "_apply_gate"):
            return experts._apply_gate(up_N2I)  # type: ignore[operator]
        gate, up = up_N2I.chunk(2, dim=-1)
        return experts.act_fn(gate) * up  # type: ignore[operator]

    @property
    def can_stack(self) -> bool:
        return self.layout.code in ("L0", "L0*", "L1")

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up [E, 2I, H], down [E, H, I]) without a copy, for a grouped GEMM with `apply_gate` in between."""
        if not self.can_stack:
            raise ValueError(
                f"{type(self.experts).__name__} (layout {self.layout.code}) cannot be stacked as gate_up [E, 2I, H] "
                "and down [E, H, I] without a copy or biases: call the experts one by one"
            )
        gate_up, down = self._fused
        return (gate_up.transpose(1, 2), down.transpose(1, 2)) if self.layout.transposed else (gate_up, down)

    def slice_experts(self, start: int, count: int) -> None:
        """Keep experts start..start+count-1 only; once, and before an optimizer exists.

        A ModuleList keeps the original modules. Fused parameters are copied, so that the memory of the others goes.
        """
        if self._sliced:
            raise RuntimeError(f"these experts were sliced before, to {self.num_experts} of {self.global_num_experts}")
        if not (isinstance(start, int) and isinstance(count, int)) or min(start, count) < 0:
            raise ValueError(f"start ({start}) and count ({count}) of the experts to keep must be integers from 0 on")
        if start + count > self.num_experts:
            raise ValueError(f"experts {start}..{start + count - 1} are not among the {self.num_experts} there are")
        if any(parameter.grad is not None for parameter in self.experts.parameters()):
            raise RuntimeError("the experts have gradients already: slice them before training and its optimizer")
        if self.layout.code == "list":
            self.experts = self.experts[start : start + count]  # type: ignore[index]
        else:
            for name in self.layout.parameters:
                setattr(self.experts, name, _cut(getattr(self.experts, name), start, count))
            self.experts.num_experts = count  # type: ignore[assignment]
        self.num_experts, self._sliced = count, True

    @property
    def _fused(self) -> list[torch.Tensor]:
        return [getattr(self.experts, name) for name in self.layout.parameters]

    def _feed_forward(self, x_NH: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        """One expert; weights: first and second projection, and their biases where the layout has some."""
        dtype = x_NH.dtype
        if self.layout.float32:
            wide = torch.promote_types(dtype, torch.float32)
            x_NH, weights = x_NH.to(wide), tuple(weight.to(wide) for weight in weights)
        up, down, *biases = weights
        up_bias, down_bias = biases if biases else (None, None)
        inner = self.apply_gate(self._project(x_NH, up, up_bias))
        return self._project(inner, down, down_bias).to(dtype)

    def _project(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x @ weight if self.layout.transposed else F.linear(x, weight)
        return y if bias is None else y + bias


def detect_layout(experts: nn.Module) -> ExpertLayout:
    """The layout that the experts' class and flags name. Raises `ValueError` with the reason where there is none."""
    name = type(experts).__name__
    if isinstance(experts, nn.ModuleList):
        return ExpertLayout(code="list")
    if isinstance(experts, nn.ModuleDict):
        raise ValueError(
            f"{name} keeps its experts in a ModuleDict, by name, and an expert's number would be a guess: "
            "put them in a ModuleList in order"
        )
    _count(experts)
    missing = [flag for flag in FLAGS if not hasattr(experts, flag)]
    if missing:
        raise ValueError(
            f"{name} does not say how its experts are stored (no {', '.join(missing)}), so its formula is unknown: "
            f"if it is one of {', '.join(LAYOUTS)}, say so with layout=LAYOUTS[...]; if not, make it a ModuleList"
        )
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{name} normalises each expert's output with one weight for all experts: not supported")
    flags = tuple(bool(getattr(experts, flag)) for flag in FLAGS)
    if flags not in _BY_FLAGS:
        said = ", ".join(f"{flag} {value}" for flag, value in zip(FLAGS, flags, strict=True))
        raise ValueError(f"{name} is stored as no layout of {', '.join(LAYOUTS)} is ({said}): make it a ModuleList")
    layout = LAYOUTS[_BY_FLAGS[flags]]  # type: ignore[index]
    # Hugging Face gives a class without a formula of its own this one
    own = getattr(getattr(type(experts), "_apply_gate", None), "__name__", "_default_apply_gate")
    if layout.gated and own != "_default_apply_gate":
        return LAYOUTS["L0*"] if layout.code == "L0" else replace(layout, own_gate=True)
    if layout.own_gate:
        raise ValueError(f"{name} (layout {layout.code}) has no _apply_gate to say what follows its first projection")
    return layout


def _count(experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    count = getattr(experts, "num_experts", None)
    if type(count) is not int:
        raise ValueError(
            f"Cannot determine number of experts: {type(experts).__name__} is no ModuleList, and its num_experts is "
            f"{count}"
        )
    return count


def _check_parameters(experts: nn.Module, layout: ExpertLayout) -> None:
    """Everything that belongs to single experts is known and has one row per expert."""
    name, count = type(experts).__name__, _count(experts)
    found = dict(experts.named_parameters())
    if set(found) != set(layout.parameters):
        raise ValueError(
            f"{name} has the parameters {', '.join(sorted(found)) or 'none'}, and layout {layout.code} is "
            f"{', '.join(layout.parameters)}: make it a ModuleList of experts"
        )
    sizes = {parameter: value.shape[0] for parameter, value in found.items()}
    if set(sizes.values()) != {count}:
        said = ", ".join(f"{parameter} {size}" for parameter, size in sizes.items())
        raise ValueError(f"{name} says it has {count} experts, and its parameters have rows for another number: {said}")
    for buffer, value in experts.named_buffers():
        if value.dim() and value.shape[0] == count:
            raise ValueError(f"{name} has a buffer {buffer} with a row per expert, which no layout knows how to cut")


def _cut(old: nn.Parameter, start: int, count: int) -> nn.Parameter:
    """A copy of some rows: their own memory, the parameter's flags and tags."""
    rows = old.detach()[start : start + count].clone(memory_format=torch.contiguous_format)
    new = nn.Parameter(rows, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def _call_module(expert: nn.Module, x_NH: torch.Tensor) -> torch.Tensor:
    """A module is called on 0 rows too: hooks that gather its parameters must run on every rank."""
    y_NH = expert(x_NH)
    if x_NH.shape[0]:
        return y_NH
    # and whatever it does with 0 rows, its parameters take part
    return _ZeroGradients.apply(y_NH, *(p for p in expert.parameters() if p.requires_grad))  # type: ignore[return-value]


class _ZeroGradients(torch.autograd.Function):
    """The identity of its first argument; the others take part with a gradient of zero."""

    @staticmethod
    def forward(ctx, y, *parameters):
        ctx.parameters = parameters
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters)
