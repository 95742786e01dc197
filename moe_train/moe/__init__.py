"""The parallel MoE layer. Groups come in as arguments; no deepspeed, wandb or torch.distributed here."""

from moe_train.moe.balance import update_bias_
from moe_train.moe.context import MoEContext
from moe_train.moe.experts import ExpertSource, ExpertWeights, ResidentExperts, resolve_backend
from moe_train.moe.layer import ChildNames, LayerOptions, ParallelMoELayer
from moe_train.moe.placement import Placement, assign_experts
from moe_train.moe.route import RouterSpec, Routing, route_tokens, router_logits

__all__ = [
    "ChildNames",
    "ExpertSource",
    "ExpertWeights",
    "LayerOptions",
    "MoEContext",
    "ParallelMoELayer",
    "Placement",
    "ResidentExperts",
    "RouterSpec",
    "Routing",
    "assign_experts",
    "resolve_backend",
    "route_tokens",
    "router_logits",
    "update_bias_",
]
