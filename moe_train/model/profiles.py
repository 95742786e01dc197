"""One small entry per Hugging Face family: which class is the MoE block, what its parts are called, how it routes.

Only families in this table are trained; an unknown one is refused with what an entry needs. All of them hold their
experts as `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], without bias, and compute
down(act(gate) * up).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_train.errors import RoutingError
from moe_train.moe import ChildNames, RouterSpec


@dataclass(frozen=True, kw_only=True)
class FamilyProfile:
    """block: class name of the MoE block. num_experts: configuration attribute. spec: configuration -> routing."""

    block: str
    num_experts: str
    spec: Callable[[Any], RouterSpec]
    names: ChildNames


def _softmax(normalize: bool | None) -> Callable[[Any], RouterSpec]:
    """Softmax over all experts, then top-k; `normalize` None: as `norm_topk_prob` says."""

    def spec(config: Any) -> RouterSpec:
        return RouterSpec(
            num_experts=num_experts_of(config),
            top_k=config.num_experts_per_tok,
            score="softmax",
            normalize=config.norm_topk_prob if normalize is None else normalize,
        )

    return spec


def _deepseek_v3(config: Any) -> RouterSpec:
    return RouterSpec(
        num_experts=num_experts_of(config),
        top_k=config.num_experts_per_tok,
        score="sigmoid",
        normalize=config.norm_topk_prob,
        eps=1e-20,
        scale=config.routed_scaling_factor,
        num_groups=config.n_group,
        topk_groups=config.topk_group,
        has_bias=True,
    )


_PLAIN = ChildNames(router="gate", experts="experts")

PROFILES: dict[str, FamilyProfile] = {
    "mixtral": FamilyProfile(
        block="MixtralSparseMoeBlock", num_experts="num_local_experts", spec=_softmax(True), names=_PLAIN
    ),
    "qwen3_moe": FamilyProfile(
        block="Qwen3MoeSparseMoeBlock", num_experts="num_experts", spec=_softmax(None), names=_PLAIN
    ),
    "olmoe": FamilyProfile(block="OlmoeSparseMoeBlock", num_experts="num_experts", spec=_softmax(None), names=_PLAIN),
    "qwen2_moe": FamilyProfile(
        block="Qwen2MoeSparseMoeBlock",
        num_experts="num_experts",
        spec=_softmax(None),
        names=ChildNames(
            router="gate", experts="experts", shared_experts="shared_expert", shared_experts_gate="shared_expert_gate"
        ),
    ),
    "deepseek_v3": FamilyProfile(
        block="DeepseekV3MoE",
        num_experts="n_routed_experts",
        spec=_deepseek_v3,
        names=ChildNames(
            router="gate", experts="experts", shared_experts="shared_experts", bias="e_score_correction_bias"
        ),
    ),
}


def profile_of(model_type: str) -> FamilyProfile:
    """Raises `RoutingError` for a family without an entry: gate outputs are never guessed."""
    if model_type not in PROFILES:
        raise RoutingError(
            f"model.model_type ({model_type}) has no profile; supported: {', '.join(PROFILES)}. An entry in "
            "moe_train/model/profiles.py names the block's class, its router, experts and shared experts, and its score"
        )
    return PROFILES[model_type]


def num_experts_of(config: Any) -> int:
    return getattr(config, profile_of(config.model_type).num_experts)
