"""One small entry per Hugging Face family: which class is the MoE block, what its parts are called, how it routes.

Only families in this table are trained; an unknown one is refused with what an entry needs. All of them hold their
experts as `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], without bias, and compute
down(act(gate) * up).

The plan of tensor parallelism says what becomes of every linear layer outside of the MoE blocks; see `model.tensor`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_train.errors import RoutingError
from moe_train.moe import ChildNames, RouterSpec

Action = Literal[
    "copy_input", "columns", "gather_output", "slice_input", "rows", "sum_gradients", "copy_rope_output", "whole"
]
"""What tensor parallelism does to one module: the keys of `model.tensor.ACTIONS`, where each is explained."""


@dataclass(frozen=True)
class TensorRule:
    """pattern: regular expression of the end of a module's name. divides: what `parallel.tensor` must divide for it, as
    (its name in a recipe, its size)."""

    pattern: str
    actions: tuple[Action, ...]
    divides: tuple[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class FamilyProfile:
    """block, norm: class names of the MoE block, and of norms that multiply x / sqrt(mean(x^2) + eps) by their weight.
    num_experts: configuration attribute. spec: configuration -> routing.
    tensor: configuration -> plan of tensor parallelism. published: fields of the family's config.json that transformers
    leaves out and always takes to be these; serving engines read them."""

    block: str
    norm: str
    num_experts: str
    spec: Callable[[Any], RouterSpec]
    names: ChildNames
    tensor: Callable[[Any], tuple[TensorRule, ...]]
    published: dict[str, Any] = field(default_factory=dict)


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


# ---- plans of tensor parallelism


def _size(config: Any, field: str) -> tuple[str, int]:
    return f"model.config.{field}", getattr(config, field)


def _attention_by_heads(config: Any) -> tuple[TensorRule, ...]:
    """Each rank computes its share of the query heads, and the key and value heads that go with them."""
    heads, kv_heads = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    return (
        TensorRule("self_attn", ("copy_input",)),
        TensorRule(r"self_attn\.q_proj", ("columns",), heads),
        TensorRule(r"self_attn\.[kv]_proj", ("columns",), kv_heads),
        TensorRule(r"self_attn\.o_proj", ("rows",), heads),
        *_dense_layers(config),
    )


def _attention_by_heads_normed(config: Any) -> tuple[TensorRule, ...]:
    """As above; one norm of the width of a head serves all heads, so that its gradient is a sum over the ranks."""
    return *_attention_by_heads(config), TensorRule(r"self_attn\.[qk]_norm", ("sum_gradients",))


def _attention_in_full(config: Any) -> tuple[TensorRule, ...]:
    """Norms over the whole width of queries and keys: the projections are shared out, attention is not."""
    width = _size(config, "hidden_size")
    kv_width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return (
        TensorRule("self_attn", ("copy_input",)),
        TensorRule(r"self_attn\.q_proj", ("columns", "gather_output"), width),
        TensorRule(r"self_attn\.[kv]_proj", ("columns", "gather_output"), ("the width of keys and values", kv_width)),
        TensorRule(r"self_attn\.o_proj", ("slice_input", "rows"), width),
        *_dense_layers(config),
    )


def _attention_by_latent_heads(config: Any) -> tuple[TensorRule, ...]:
    """Multi-head latent attention: each rank computes the whole latents, and its share of the heads from them."""
    heads = _size(config, "num_attention_heads")
    low_rank = config.q_lora_rank is not None
    return (
        *((TensorRule(r"self_attn\.q_a_proj", ("whole",)),) if low_rank else ()),
        TensorRule(rf"self_attn\.({'q_b' if low_rank else 'q'}|kv_b)_proj", ("copy_input", "columns"), heads),
        TensorRule(r"self_attn\.kv_a_proj_with_mqa", ("copy_rope_output",)),
        TensorRule(r"self_attn\.o_proj", ("rows",), heads),
        *_dense_layers(config),
    )


def _dense_layers(config: Any) -> tuple[TensorRule, ...]:
    """What lies outside of attention: the head, and the layers without experts if there are any."""
    head = TensorRule("lm_head", ("whole",))
    dense_first, dense_only = getattr(config, "first_k_dense_replace", 0), getattr(config, "mlp_only_layers", None)
    sparse_step = getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    if not any(i < dense_first or i in (dense_only or ()) or (i + 1) % sparse_step for i in layers):
        return (head,)
    width = _size(config, "intermediate_size")
    return (
        head,
        TensorRule("mlp", ("copy_input",)),
        TensorRule(r"mlp\.(gate|up)_proj", ("columns",), width),
        TensorRule(r"mlp\.down_proj", ("rows",), width),
    )


_PLAIN = ChildNames(router="gate", experts="experts")

PROFILES: dict[str, FamilyProfile] = {
    "mixtral": FamilyProfile(
        block="MixtralSparseMoeBlock",
        norm="MixtralRMSNorm",
        num_experts="num_local_experts",
        spec=_softmax(True),
        names=_PLAIN,
        tensor=_attention_by_heads,
    ),
    "qwen3_moe": FamilyProfile(
        block="Qwen3MoeSparseMoeBlock",
        norm="Qwen3MoeRMSNorm",
        num_experts="num_experts",
        spec=_softmax(None),
        names=_PLAIN,
        tensor=_attention_by_heads_normed,
    ),
    "olmoe": FamilyProfile(
        block="OlmoeSparseMoeBlock",
        norm="OlmoeRMSNorm",
        num_experts="num_experts",
        spec=_softmax(None),
        names=_PLAIN,
        tensor=_attention_in_full,
    ),
    "qwen2_moe": FamilyProfile(
        block="Qwen2MoeSparseMoeBlock",
        norm="Qwen2MoeRMSNorm",
        num_experts="num_experts",
        spec=_softmax(None),
        names=ChildNames(
            router="gate", experts="experts", shared_experts="shared_expert", shared_experts_gate="shared_expert_gate"
        ),
        tensor=_attention_by_heads,
    ),
    "deepseek_v3": FamilyProfile(
        block="DeepseekV3MoE",
        norm="DeepseekV3RMSNorm",
        num_experts="n_routed_experts",
        spec=_deepseek_v3,
        names=ChildNames(
            router="gate", experts="experts", shared_experts="shared_experts", bias="e_score_correction_bias"
        ),
        tensor=_attention_by_latent_heads,
        published={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
}


def profile_of(model_type: str) -> FamilyProfile:
    """Raises `RoutingError` for a family without an entry: gate outputs are never guessed."""
    if model_type not in PROFILES:
        raise RoutingError(
            f"model.model_type ({model_type}) has no profile; supported: {', '.join(PROFILES)}. An entry in "
            "moe_train/model/profiles.py names the block's class, its router, experts and shared experts, its score, "
            "and what tensor parallelism does to its other layers"
        )
    return PROFILES[model_type]


def num_experts_of(config: Any) -> int:
    return getattr(config, profile_of(config.model_type).num_experts)
