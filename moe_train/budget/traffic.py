"""Bytes that one rank sends in an optimizer step, by what they are for.

n ranks, S bytes: an all_reduce sends 2 (n-1)/n S from each rank, a reduce_scatter or all_gather (n-1)/n S (rings), an
all_to_all the share of its rows that is for others, (n-1)/n at even choices.
"""

from dataclasses import dataclass

from moe_train.budget.states import gradient_bytes, sums_in_fp32
from moe_train.model import compute_dtype, num_experts_of
from moe_train.model.held import Held, StoredParameter
from moe_train.train.check import ResolvedRun


@dataclass(frozen=True, kw_only=True)
class Flow:
    """ranks: of the group that exchanges. with_load: it grows with the rows of the fullest rank."""

    what: str
    nbytes: float
    ranks: tuple[int, ...]
    with_load: bool = False


def micro_tokens(run: ResolvedRun) -> int:
    """Tokens of a micro-batch that a rank holds."""
    return run.recipe.batch.micro_size * run.recipe.data.sequence_length


def worked_tokens(run: ResolvedRun) -> int:
    """Of a micro-batch, the tokens that a rank sends to experts."""
    return -(-micro_tokens(run) // run.topology.token_slice)


def visits_per_rank(run: ResolvedRun) -> float:
    """The part of all tokens that some expert of a rank is chosen for, at even choices: 1 less the probability that
    none of E / n experts is among K of E."""
    experts, routed = num_experts_of(run.model_config), run.topology.expert - run.plan.shared_ranks
    missed = 1.0
    for chosen in range(run.model_config.num_experts_per_tok):
        missed *= max(experts - experts / routed - chosen, 0.0) / (experts - chosen)
    return 1.0 - missed


def flows_of(run: ResolvedRun, held: Held, num_moe_layers: int) -> list[Flow]:
    """Everything a rank sends in one optimizer step, even choices taken for granted."""
    topology = run.topology
    groups = {
        "expert": tuple(topology.expert_groups()[0]),
        "holders": tuple(topology.expert_data_groups()[0]),
        "data": tuple(topology.data_groups()[0]),
        "tensor": tuple(topology.tensor_groups()[0]),
    }
    found = [
        Flow(
            what="dispatch and combine",
            nbytes=num_moe_layers * run.accumulation * _exchange(run),
            ranks=groups["expert"],
            with_load=True,
        ),
        Flow(
            what="expert gradients and weights",
            nbytes=sum(_stored(parameter, run) for parameter in held.stored),
            ranks=groups["holders"],
        ),
        Flow(what="redundant copies", nbytes=_copies(run, held), ranks=groups["expert"]),
        Flow(what="dense gradients and weights", nbytes=_dense(run, held), ranks=groups["data"]),
        Flow(what="tensor parallelism", nbytes=_tensor(run), ranks=groups["tensor"]),
    ]
    return [flow for flow in found if flow.nbytes]


def _others(size: int) -> float:
    return (size - 1) / size


def _exchange(run: ResolvedRun) -> float:
    """Of one MoE layer and micro-batch: a token goes to each rank that has experts for it."""
    shared = run.plan.shared_ranks
    rows_per_token = visits_per_rank(run) * (run.topology.expert - shared) + (shared > 0)
    rows = worked_tokens(run) * run.topology.token_gather * rows_per_token * _others(run.topology.expert)
    return rows * sum(run.row_bytes())


def _stored(parameter: StoredParameter, run: ResolvedRun) -> float:
    numel, stage = parameter.home * parameter.unit_numel, run.recipe.zero.stage
    weights, gradients = numel * compute_dtype(run.recipe).itemsize, numel * gradient_bytes(run.recipe)
    share = _others(parameter.holders)
    if stage == 0:
        return 2 * share * gradients
    if stage == 3:
        return run.accumulation * share * (gradients + (run.forwards + 1) * weights)
    return share * (gradients * (run.accumulation if stage == 2 else 1) + weights)


def _copies(run: ResolvedRun, held: Held) -> float:
    """Gradients go home and weights come from there, once per step."""
    numel = sum(parameter.copies * parameter.unit_numel for parameter in held.stored)
    return float(numel * (gradient_bytes(run.recipe) + compute_dtype(run.recipe).itemsize))


def _dense(run: ResolvedRun, held: Held) -> float:
    stage, numel, share = run.recipe.zero.stage, held.num_dense, _others(run.topology.data)
    weights, gradients = numel * compute_dtype(run.recipe).itemsize, numel * gradient_bytes(run.recipe)
    if stage == 3:
        return run.accumulation * share * (gradients + (run.forwards + 1) * weights)
    if sums_in_fp32(run.recipe):
        return share * (2 * gradients + weights)
    if stage == 0 and run.recipe.precision.compute == "fp32":
        return 2 * share * gradients
    return share * (gradients * (run.accumulation if stage == 2 else 1) + weights)


def _tensor(run: ResolvedRun) -> float:
    """Each layer adds up attention's partial outputs, and gathers the tokens its MoE layer shared out; backward too."""
    hidden = micro_tokens(run) * run.model_config.hidden_size * compute_dtype(run.recipe).itemsize
    once = _others(run.topology.tensor) * hidden * (2 + (run.topology.token_slice > 1))
    return run.model_config.num_hidden_layers * run.accumulation * once * (run.forwards + 1)
