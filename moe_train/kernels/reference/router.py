"""Logits -> experts, weights and the sums that losses and load counts need. See `kernels.router.route`.

T tokens in S sequences of equal length, E experts, K experts per token, G groups. All in the type of the logits.
"""

import torch
import torch.nn.functional as F

from moe_train.kernels.rule import RouterRule


def forward(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    chosen_TK: torch.Tensor | None,
    valid_T: torch.Tensor | None,
    num_sequences: int,
    rule: RouterRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, K], weights [T, K], counts [S, E], sums of shares [S, E], sum of logsumexp^2 []."""
    num_tokens, num_experts = logits_TE.shape
    scores_TE = scores_of(logits_TE, rule.score)
    ranked_TE = logits_TE if rule.score == "softmax_after_topk" else scores_TE
    live_T1 = _live(valid_T, logits_TE).unsqueeze(1)
    ids_TK = _choose(ranked_TE, bias_E, rule) if chosen_TK is None else chosen_TK.clone()
    ids_TK = torch.where(live_T1, ids_TK, -1)
    weights_TK = _weigh(ranked_TE.gather(1, ids_TK.clamp(min=0)), rule)
    weights_TK = torch.where(live_T1, weights_TK, 0.0)
    length = num_tokens // max(num_sequences, 1)
    sequence_T = torch.arange(num_tokens, device=logits_TE.device) // max(length, 1)
    place_R = (sequence_T.unsqueeze(1) * (num_experts + 1) + ids_TK + 1).reshape(-1)  # column 0: padding
    counts = place_R.new_zeros(num_sequences * (num_experts + 1)).scatter_add_(0, place_R, torch.ones_like(place_R))
    counts_SE = counts.view(num_sequences, num_experts + 1)[:, 1:].clone()
    shares_TE = torch.where(live_T1, shares_of(scores_TE, rule.score), 0.0)
    sums_SE = shares_TE.view(num_sequences, length, num_experts).sum(dim=1)
    z = torch.where(live_T1.squeeze(1), logits_TE.logsumexp(dim=-1).square(), 0.0).sum()
    return ids_TK, weights_TK, counts_SE, sums_SE, z


def backward(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    valid_T: torch.Tensor | None,
    dweights_TK: torch.Tensor,
    dsums_SE: torch.Tensor,
    dz: torch.Tensor,
    rule: RouterRule,
) -> torch.Tensor:
    """Gradient of the logits [T, E]."""
    num_tokens = logits_TE.shape[0]
    scores_TE = scores_of(logits_TE, rule.score)
    ranked_TE = logits_TE if rule.score == "softmax_after_topk" else scores_TE
    dranked_TE = torch.zeros_like(logits_TE)
    safe_TK = ids_TK.clamp(min=0)
    dranked_TE.scatter_add_(1, safe_TK, _weigh_backward(ranked_TE.gather(1, safe_TK), dweights_TK, rule))
    length = num_tokens // max(len(dsums_SE), 1)
    dshares_TE = dsums_SE.to(logits_TE.dtype).repeat_interleave(length, dim=0, output_size=num_tokens)
    if rule.score in ("softmax", "softmax_after_topk"):
        after_topk = rule.score == "softmax_after_topk"
        dscores_TE = dshares_TE if after_topk else dshares_TE + dranked_TE
        inner_T1 = (scores_TE * dscores_TE).sum(dim=-1, keepdim=True)
        dlogits_TE = scores_TE * (dscores_TE - inner_T1)
        if after_topk:
            dlogits_TE = dlogits_TE + dranked_TE
    else:
        total_T1 = scores_TE.sum(dim=-1, keepdim=True)
        inner_T1 = (scores_TE * dshares_TE).sum(dim=-1, keepdim=True) / total_T1
        dscores_TE = dranked_TE + (dshares_TE - inner_T1) / total_T1
        dlogits_TE = dscores_TE * _slope(logits_TE, scores_TE, rule.score)
    lse_T1 = logits_TE.logsumexp(dim=-1, keepdim=True)
    dlogits_TE = dlogits_TE + (logits_TE - lse_T1).exp() * (2 * dz.to(logits_TE.dtype) * lse_T1)
    return torch.where(_live(valid_T, logits_TE).unsqueeze(1), dlogits_TE, 0.0)


def _live(valid_T: torch.Tensor | None, like_TE: torch.Tensor) -> torch.Tensor:
    if valid_T is None:
        return torch.ones(like_TE.shape[0], dtype=torch.bool, device=like_TE.device)
    return valid_T


def scores_of(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    if score == "sigmoid":
        return logits_TE.sigmoid()
    if score == "sqrtsoftplus":
        far = torch.exp(logits_TE.clamp(max=-40.0) / 2)  # there softplus is exp to the last bit, and then vanishes
        return torch.where(logits_TE < -40.0, far, F.softplus(logits_TE.clamp(min=-40.0)).sqrt())
    return logits_TE.softmax(dim=-1)


def _slope(logits_TE: torch.Tensor, scores_TE: torch.Tensor, score: str) -> torch.Tensor:
    """d score / d logit of scores that do not depend on other experts."""
    if score == "sigmoid":
        return scores_TE * (1 - scores_TE)
    return torch.where(logits_TE < -40.0, scores_TE / 2, logits_TE.sigmoid() / (2 * scores_TE))


def shares_of(scores_TE: torch.Tensor, score: str) -> torch.Tensor:
    return scores_TE if score.startswith("softmax") else scores_TE / scores_TE.sum(dim=-1, keepdim=True)


def _choose(ranked_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: RouterRule) -> torch.Tensor:
    """Best first; equal ones by the lowest index."""
    choice_TE = ranked_TE if bias_E is None else ranked_TE + bias_E
    if rule.num_groups > 1:
        choice_TGE = choice_TE.view(len(choice_TE), rule.num_groups, choice_TE.shape[1] // rule.num_groups)
        counted = min(2 if rule.best_two else 1, choice_TGE.shape[-1])
        kept_TG = _first(choice_TGE.topk(counted, dim=-1).values.sum(dim=-1), rule.topk_groups)
        legal_TG = torch.zeros(choice_TGE.shape[:2], dtype=torch.bool, device=choice_TE.device)
        legal_TG.scatter_(1, kept_TG, True)
        choice_TE = choice_TGE.masked_fill(~legal_TG.unsqueeze(-1), float("-inf")).view_as(choice_TE)
    return _first(choice_TE, rule.top_k)


def _first(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _weigh(ranked_TK: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    if rule.score == "softmax_after_topk":
        return ranked_TK.softmax(dim=-1) * rule.scale
    if rule.normalize:
        sum_T1 = ranked_TK.sum(dim=-1, keepdim=True) + rule.eps
        ranked_TK = ranked_TK / (sum_T1.clamp(min=rule.min_sum) if rule.min_sum else sum_T1)
    return ranked_TK * rule.scale


def _weigh_backward(ranked_TK: torch.Tensor, dweights_TK: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    dweights_TK = dweights_TK.to(ranked_TK.dtype) * rule.scale
    if rule.score == "softmax_after_topk":
        p_TK = ranked_TK.softmax(dim=-1)
        return p_TK * (dweights_TK - (p_TK * dweights_TK).sum(dim=-1, keepdim=True))
    if not rule.normalize:
        return dweights_TK
    sum_T1 = ranked_TK.sum(dim=-1, keepdim=True) + rule.eps
    divisor_T1 = sum_T1.clamp(min=rule.min_sum) if rule.min_sum else sum_T1
    inner_T1 = (dweights_TK * ranked_TK).sum(dim=-1, keepdim=True) / divisor_T1
    follows_T1 = (sum_T1 >= rule.min_sum) if rule.min_sum else torch.ones_like(sum_T1, dtype=torch.bool)
    return (dweights_TK - torch.where(follows_T1, inner_T1, 0.0)) / divisor_T1
