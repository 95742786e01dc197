"""Losses and the bias that keep experts in use. Pure functions; each says what it equals at perfect balance.

T tokens in S whole sequences, E experts, K experts per token.
"""

import torch

from moe_train.moe.route import RouterSpec, Routing


def sequence_aux_loss(routing: Routing, spec: RouterSpec, num_sequences: int) -> torch.Tensor:
    """Sum over sequences of  sum_e f_e * P_e  (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    f_e = E / (K * tokens) * number of times expert e was chosen in the sequence; P_e = mean over the sequence of the
    scores, normalised to sum 1. Each sequence adds 1.0 at perfect balance. It looks at one sequence at a time, so it
    does not depend on how a batch is cut into micro-batches or ranks.
    """
    tokens = routing.scores_TE.shape[0] // num_sequences
    scores_STE = routing.scores_TE.view(num_sequences, tokens, spec.num_experts)
    if spec.score == "sigmoid":
        scores_STE = scores_STE / scores_STE.sum(dim=-1, keepdim=True)
    ids_SR = routing.topk_ids_TK.view(num_sequences, -1)
    counts_SE = scores_STE.new_zeros(num_sequences, spec.num_experts)
    counts_SE.scatter_add_(1, ids_SR, torch.ones_like(ids_SR, dtype=counts_SE.dtype))
    chosen_SE = counts_SE * (spec.num_experts / (spec.top_k * tokens))
    return (chosen_SE * scores_STE.mean(dim=1)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum()


@torch.no_grad()
def update_bias_(bias_LE: torch.Tensor, counts_LE: torch.Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (arXiv 2408.15664, algorithm 1), in place, once per optimizer step.

    bias_e += rate * sign(mean load - load_e); `counts_LE` are the tokens per expert of the whole step, over all ranks.
    """
    load_LE = counts_LE.to(torch.float64)
    error_LE = load_LE.mean(dim=-1, keepdim=True) - load_LE
    bias_LE.add_(error_LE.sign().to(bias_LE.dtype), alpha=rate)
