"""Which modules of a model are MoE blocks, what their parts are called, and how their gate's output is read."""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import Any

from torch import nn

from moe_train.errors import ConfigError
from moe_train.moe.route import GroupScore, RouterSpec, Score
from moe_train.moe.wrapper import ExpertLayout

REQUIRED = ("gate", "experts")


@dataclass(frozen=True, kw_only=True)
class MoEFieldNames:
    """Attribute names of a block's parts, dotted where a part lies deeper; None: there is no such part.

    top_k, norm_topk_prob and scale are looked for in the block first, then in its gate. bias: of the gate, added to
    the scores for the choice. scale: multiplies the weights; both are read for gates that return raw logits.
    """

    gate: str = "gate"
    experts: str = "experts"
    shared_experts: str | None = "shared_experts"
    shared_experts_gate: str | None = "shared_experts_gate"
    top_k: str | None = "top_k"
    norm_topk_prob: str | None = "norm_topk_prob"
    bias: str | None = None
    scale: str | None = None

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None and entry.name in REQUIRED:
                raise ConfigError(f"MoEFieldNames.{entry.name} (None): every block has one, so name its attribute")
            if value is not None and (not isinstance(value, str) or not all(value.split("."))):
                raise ConfigError(f"MoEFieldNames.{entry.name} ({value!r}) must name an attribute, or be None for none")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How raw logits become weights; see `RouterSpec`. normalize None: as `norm_topk_prob` of block or gate says."""

    score: Score
    normalize: bool | None = None
    eps: float = 0.0
    min_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "best_two"

    def __post_init__(self):
        self.spec(self.num_groups, 1, True)  # a misspelt score is said here

    def spec(self, num_experts: int, top_k: int, norm_topk_prob: bool | None, has_bias: bool = False) -> RouterSpec:
        """Raises `ValueError` if nobody says whether to normalise."""
        normalize = norm_topk_prob if self.normalize is None else self.normalize
        if normalize is None and self.score != "softmax_after_topk":
            raise ValueError(
                "norm_topk_prob is on neither the block nor its gate: set Scoring.normalize, or name the attribute in "
                "MoEFieldNames.norm_topk_prob"
            )
        return RouterSpec(
            num_experts=num_experts,
            top_k=top_k,
            score=self.score,
            normalize=bool(normalize),
            eps=self.eps,
            min_sum=self.min_sum,
            scale=self.scale,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            group_score=self.group_score,
            has_bias=has_bias,
        )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What is wrapped, and how.

    module_name: the block's class, or a dotted pattern of module names (`model.layers.*.mlp`).
    fused_moe_cls: how experts run: a registered name or a class; None: the default.
    gate_returns_raw_logits: the gate gives logits, and `scoring` says what becomes of them.
    scoring: needed for raw logits; also lets a gate return a plain tensor.
    gate_router: (gate, hidden states [T, H], top-k, input ids [T] or None, index of the MoE layer) -> (indices [T, K],
        weights [T, K]) or, third, logits [T, E]; in place of any other reading of the gate.
    gate_router_gives_logits: it always returns the logits, so losses on them are possible.
    enable_redundant_experts: popular experts are held by more than one rank.
    enable_shared_expert_tp: the width of shared experts is shared out over the tensor group.
    enable_external_shared_experts: shared experts have ranks of their own.
    num_experts_key: where a model's configuration has the number of experts: a name, a dotted one, or a list of names.
    route_after_dp_transform: route the tokens a rank works on, not all it holds. The numbers are the same.
    expert_layout: for fused experts that do not say how they are stored.
    """

    module_name: str
    fused_moe_cls: type | str | None = None
    field_names: MoEFieldNames = MoEFieldNames()
    gate_returns_raw_logits: bool = False
    scoring: Scoring | None = None
    gate_router: Callable[..., Any] | None = None
    gate_router_gives_logits: bool = False
    enable_redundant_experts: bool = False
    enable_shared_expert_tp: bool = False
    enable_external_shared_experts: bool = False
    host_external_shared_experts: InitVar[bool] = False
    num_experts_key: str | Sequence[str] = "num_experts"
    route_after_dp_transform: bool = False
    expert_layout: ExpertLayout | None = None

    def __post_init__(self, host_external_shared_experts: bool):
        if host_external_shared_experts:
            raise ConfigError(
                "MoEConfig.host_external_shared_experts (True) says which rank a simulator stands on; here a rank's "
                "place in the expert group says whether it holds shared experts: leave it out and set "
                "enable_external_shared_experts"
            )
        if isinstance(self.num_experts_key, list):
            object.__setattr__(self, "num_experts_key", tuple(self.num_experts_key))
        problems = [*self._types(), *self._combinations()]
        if problems:
            raise ConfigError("\n".join(problems))

    def _types(self) -> list[str]:
        problems = []
        if not isinstance(self.module_name, str) or not all(self.module_name.split(".")):
            problems.append(
                f"MoEConfig.module_name ({self.module_name!r}) must be the name of a class or a dotted pattern"
            )
        for name, types, rule in (
            ("field_names", MoEFieldNames, "MoEFieldNames"),
            ("scoring", Scoring | None, "a Scoring or None"),
            ("fused_moe_cls", type | str | None, "a class, a registered name or None"),
            ("expert_layout", ExpertLayout | None, "an ExpertLayout or None"),
            *((entry.name, bool, "True or False") for entry in fields(self) if entry.type is bool),
        ):
            if not isinstance(getattr(self, name), types):
                problems.append(f"MoEConfig.{name} ({getattr(self, name)!r}) must be {rule}")
        if self.gate_router is not None and not callable(self.gate_router):
            problems.append(f"MoEConfig.gate_router ({self.gate_router!r}) must be a function or None")
        path = self._experts_path() if isinstance(self.num_experts_key, str | tuple) else ()
        if not path or not all(isinstance(part, str) and part for part in path):
            problems.append(
                f"MoEConfig.num_experts_key ({self.num_experts_key!r}) must be a name, a dotted one or a list of names"
            )
        return problems

    def _combinations(self) -> list[str]:
        problems = []
        if self.enable_shared_expert_tp and self.enable_external_shared_experts:
            problems.append(
                "MoEConfig.enable_shared_expert_tp (True) splits shared experts over ranks that "
                "enable_external_shared_experts (True) takes them from: set one of them"
            )
        for name in ("enable_shared_expert_tp", "enable_external_shared_experts"):
            if getattr(self, name) and getattr(self.field_names, "shared_experts", "") is None:
                problems.append(
                    f"MoEConfig.{name} (True) needs shared experts, and MoEFieldNames.shared_experts is None: name them"
                )
        if self.gate_router is None:
            if self.gate_returns_raw_logits and self.scoring is None:
                problems.append(
                    "MoEConfig.gate_returns_raw_logits (True) needs a scoring: what logits mean differs by family, "
                    "so set scoring=Scoring(score=...)"
                )
            if self.gate_router_gives_logits:
                problems.append("MoEConfig.gate_router_gives_logits (True) needs a gate_router")
        elif self.scoring is not None:
            problems.append("MoEConfig.scoring would never be used, as gate_router replaces it: set one of them")
        if self.scoring is None:
            for name in ("bias", "scale"):
                if getattr(self.field_names, name, None) is not None:
                    problems.append(
                        f"MoEFieldNames.{name} ({getattr(self.field_names, name)}) is read for a scoring only, and "
                        "there is none: set MoEConfig.scoring or leave the name out"
                    )
        elif getattr(self.field_names, "scale", None) is not None and self.scoring.scale != 1.0:
            problems.append(
                f"MoEFieldNames.scale ({self.field_names.scale}) and Scoring.scale ({self.scoring.scale}) both say "
                "what to multiply the weights by: set one of them"
            )
        return problems

    def _experts_path(self) -> tuple[str, ...]:
        key = self.num_experts_key
        return tuple(key.split(".")) if isinstance(key, str) else tuple(key)

    def num_experts(self, config: Any) -> int:
        """Number of logical experts in a model's configuration."""
        value = config
        for part in self._experts_path():
            legal = value if isinstance(value, dict) else _attributes(value)
            if part not in legal and not hasattr(value, part):
                raise ConfigError(
                    f"MoEConfig.num_experts_key ({'.'.join(self._experts_path())}): {type(value).__name__} has no "
                    f"`{part}`; {_suggest(part, legal, 'expert')}"
                )
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"MoEConfig.num_experts_key ({'.'.join(self._experts_path())}) leads to {value!r}, which is no number "
                "of experts: name another key"
            )
        return value

    def field(self, module: nn.Module | None, name: str, default: Any = None) -> Any:
        """The block's part called `name` here, under the name that its family gives it; `default` where absent."""
        attribute = getattr(self.field_names, name, None)
        value = None if attribute is None or module is None else _follow(module, attribute)
        return default if value is None else value

    def required(self, module: nn.Module, name: str) -> nn.Module:
        """`field` for parts that every block has. Raises `ConfigError` with what the block does have."""
        value = self.field(module, name)
        if value is None:
            attribute = getattr(self.field_names, name)
            children = [child for child, _ in module.named_children()]
            raise ConfigError(
                f"MoEFieldNames.{name} ({attribute}): {type(module).__name__} has no such part; "
                f"{_suggest(attribute, children)}"
            )
        return value

    def top_k(self, module: nn.Module) -> int:
        """Experts per token, of the block or its gate. Raises `ValueError` if neither says."""
        value = self._of_block_or_gate(module, "top_k")
        if type(value) is not int or value < 1:
            gate = type(self.field(module, "gate")).__name__
            raise ValueError(
                f"Missing required parameter 'top_k': `{self.field_names.top_k}` is {value} on "
                f"{type(module).__name__} and its gate ({gate}): set MoEFieldNames.top_k to the attribute that holds "
                "the number of experts per token"
            )
        return value

    def norm_topk_prob(self, module: nn.Module) -> bool | None:
        """Whether the chosen weights are normalised, as the block or its gate says; None if neither does."""
        return self._of_block_or_gate(module, "norm_topk_prob")

    def scale(self, module: nn.Module) -> float | None:
        """What multiplies the weights. Raises `ConfigError` where an attribute is named and not found."""
        value = self._of_block_or_gate(module, "scale")
        if value is None and self.field_names.scale is not None:
            raise ConfigError(
                f"MoEFieldNames.scale ({self.field_names.scale}): neither {type(module).__name__} nor its gate has it"
            )
        return value

    def _of_block_or_gate(self, module: nn.Module, name: str) -> Any:
        return self.field(module, name, self.field(self.field(module, "gate"), name))

    def unclaimed(self, module: nn.Module) -> list[str]:
        """Children with parameters that no field names: whoever replaces the block loses them."""
        claimed = {getattr(self.field_names, entry.name) for entry in fields(self.field_names)}
        claimed = {name.split(".")[0] for name in claimed if name is not None}
        children = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
        own = [name for name, _ in module.named_parameters(recurse=False)]
        return [name for name in (*children, *own) if name not in claimed]


def find_modules(model: nn.Module, moe_config: MoEConfig) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of the MoE blocks, in model order. Raises `ConfigError` if there are none."""
    wanted = moe_config.module_name
    is_pattern = "." in wanted or any(sign in wanted for sign in "*?[")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if (_matches(name, wanted) if is_pattern else type(module).__name__ == wanted)
    ]
    if found:
        return found
    if is_pattern:
        legal = [name for name, module in model.named_modules() if _looks_like_block(module, moe_config)]
        what = "name of a module matches"
    else:
        legal = [type(module).__name__ for module in model.modules() if _looks_like_block(module, moe_config)]
        what = "module is of this class"
    near = difflib.get_close_matches(wanted, {type(module).__name__ for module in model.modules()}, n=3)
    names = list(dict.fromkeys([*legal, *near]))
    raise ConfigError(
        f"MoEConfig.module_name ({wanted}): no {what} in {type(model).__name__}; candidates: "
        f"{_some(names) if names else 'none, as no module has experts'}"
    )


def _matches(name: str, pattern: str) -> bool:
    """Part by part, so that * stands for one part of the name."""
    parts, wanted = name.split(".") if name else [], pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _looks_like_block(module: nn.Module, moe_config: MoEConfig) -> bool:
    names = {name for name, _ in module.named_children()}
    return bool(names & {moe_config.field_names.experts.split(".")[0], "experts"})


def _follow(module: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        module = getattr(module, part, None)
    return module


def _attributes(value: Any) -> list[str]:
    return [name for name in getattr(value, "__dict__", {}) if not name.startswith("_")]


def _suggest(name: str, legal: Sequence[str] | dict[str, Any], word: str | None = None) -> str:
    """What there is; of many names those near to `name` or with `word` in them."""
    names = list(legal)
    near = difflib.get_close_matches(name.split(".")[-1], names, n=3)
    if word is not None:
        names = list(dict.fromkeys([*(entry for entry in names if word in entry), *near]))
    said = f"candidates: {_some(names)}" if names else "it has nothing like it"
    return f"{said}; did you mean {near[0]}?" if near else said


def _some(names: Sequence[str], limit: int = 12) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
