"""The parallel MoE layer. Groups come in as arguments; no deepspeed, wandb or torch.distributed here."""

from moe_train.moe.balance import AuxLoss, BiasUpdate, blend_bias_, global_batch_aux_loss, update_bias_
from moe_train.moe.balanced_choice import ExpertChoiceRouter, SinkhornRouter
from moe_train.moe.block import MoELayer
from moe_train.moe.capacity import CapacityRouter, Drop
from moe_train.moe.config import MoEConfig, MoEFieldNames, Scoring, find_modules
from moe_train.moe.context import MoEContext
from moe_train.moe.experts import KERNEL_BACKENDS, ExpertSource, ExpertWeights, resolve_backend
from moe_train.moe.forced import ForcedRouter, expert_shares
from moe_train.moe.fp8 import ExpertPrecision, fp8_gemms, gemms_of_sizes, paying_gemms
from moe_train.moe.fused import FUSED_MOE, FusedMoE, FusedMoEBase
from moe_train.moe.hash_table import balanced_table
from moe_train.moe.ideal import IdealSplit, ideal_split
from moe_train.moe.layer import ChildNames, LayerOptions, ParallelMoELayer
from moe_train.moe.parallelize import gradient_groups, parallelize, replan
from moe_train.moe.placement import SlotPlan, assign_experts, check_counts, default_counts, replica_routes
from moe_train.moe.planner import plan_slots, rank_loads, rank_shares
from moe_train.moe.resident import ResidentExperts, ResidentParameters
from moe_train.moe.route import RouterSpec, Routing, route_tokens, router_logits
from moe_train.moe.router import HashRouter, Router, ScoreRouter
from moe_train.moe.shared import BorrowedModule, ParameterSource, SharedBlock, SplitSharedExperts
from moe_train.moe.statistics import RANK_ROWS, ROUTER_SUMS, ChosenExperts, ExpertClock, StepStatistics
from moe_train.moe.wrapper import ExpertWrapper

__all__ = [
    "FUSED_MOE",
    "KERNEL_BACKENDS",
    "RANK_ROWS",
    "ROUTER_SUMS",
    "AuxLoss",
    "BiasUpdate",
    "BorrowedModule",
    "CapacityRouter",
    "ChildNames",
    "ChosenExperts",
    "Drop",
    "ExpertChoiceRouter",
    "ExpertClock",
    "ExpertPrecision",
    "ExpertSource",
    "ExpertWeights",
    "ExpertWrapper",
    "ForcedRouter",
    "FusedMoE",
    "FusedMoEBase",
    "HashRouter",
    "IdealSplit",
    "LayerOptions",
    "MoEConfig",
    "MoEContext",
    "MoEFieldNames",
    "MoELayer",
    "ParallelMoELayer",
    "ParameterSource",
    "ResidentExperts",
    "ResidentParameters",
    "Router",
    "RouterSpec",
    "Routing",
    "ScoreRouter",
    "Scoring",
    "SharedBlock",
    "SinkhornRouter",
    "SlotPlan",
    "SplitSharedExperts",
    "StepStatistics",
    "assign_experts",
    "balanced_table",
    "blend_bias_",
    "check_counts",
    "default_counts",
    "expert_shares",
    "find_modules",
    "fp8_gemms",
    "gemms_of_sizes",
    "global_batch_aux_loss",
    "gradient_groups",
    "ideal_split",
    "parallelize",
    "paying_gemms",
    "plan_slots",
    "rank_loads",
    "rank_shares",
    "replan",
    "replica_routes",
    "resolve_backend",
    "route_tokens",
    "router_logits",
    "update_bias_",
]
