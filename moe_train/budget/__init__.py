"""What a recipe will cost on a rank before it is started: memory, wire, FLOPs, time."""

from moe_train.budget.estimate import Hardware, Plan, compare_with_run, plan_run

__all__ = ["Hardware", "Plan", "compare_with_run", "plan_run"]
