"""Losses and the bias that keep experts in use. Pure functions; each says what it equals at perfect balance.

T tokens in S whole sequences, E experts, K experts per token.
"""

import torch

from moe_train.moe.route import RouterSpec, Routing


def sequence_aux_loss(
    routing: Routing, spec: RouterSpec, num_sequences: int, sequence_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over sequences of  sum_e f_e * P_e  (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    f_e = E / (K * tokens) * number of times expert e was chosen in the sequence; P_e = mean over the sequence of the
    scores, normalised to sum 1. Each sequence adds 1.0 at perfect balance. It looks at one sequence at a time, so it
    does not depend on how a batch is cut into micro-batches or ranks.

    Args:
        sequence_T: which sequence each token is of, where padding was left out; None: T / S consecutive tokens each.
    """
    scores_TE = routing.scores_TE
    assert scores_TE is not None
    if spec.score != "softmax":
        scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    num_tokens, num_experts = scores_TE.shape
    if sequence_T is None:
        length = num_tokens // max(num_sequences, 1)
        tokens_S1: float | torch.Tensor = float(max(length, 1))
        mean_SE = scores_TE.view(num_sequences, length, num_experts).sum(dim=1) / tokens_S1
        sequence_T = torch.arange(num_tokens, device=scores_TE.device) // max(length, 1)
    else:
        one_hot_ST = (sequence_T == torch.arange(num_sequences, device=scores_TE.device).unsqueeze(1)).to(scores_TE)
        tokens_S1 = one_hot_ST.sum(dim=1, keepdim=True).clamp(min=1)
        mean_SE = one_hot_ST @ scores_TE / tokens_S1  # a product and no scatter: the same bits every time
    place_R = (sequence_T.unsqueeze(1) * num_experts + routing.topk_ids_TK).reshape(-1)
    counts_SE = scores_TE.new_zeros(num_sequences * num_experts)
    counts_SE.scatter_add_(0, place_R, torch.ones_like(place_R, dtype=scores_TE.dtype))
    chosen_SE = counts_SE.view(num_sequences, num_experts) * (num_experts / (spec.top_k * tokens_S1))
    return (chosen_SE * mean_SE).sum()


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
