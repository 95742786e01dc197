"""`reference/router.py` in two kernels: scores, choice, weights and sums in one pass over the logits, and its adjoint.

A program takes tiles of tokens of one sequence and keeps whole rows of logits in registers. Experts are chosen by
repeated maximum over unique 64-bit keys: the score's bits in an order-preserving form above, the reversed index below.
So equal scores go by the lowest index, NaN counts as largest (as in torch.topk) and an index is always legal. Sums
over tokens go through one partial row per program, added up in a fixed order: no atomics, the same bits every time.

T tokens in S sequences of L, E experts, K experts per token, G groups; B..: sizes of tiles, powers of two.
"""

import torch
import triton
import triton.language as tl

from moe_train.kernels.rule import RouterRule
from moe_train.kernels.triton.host import cdiv, power_of_2

LOWEST = tl.constexpr(-(2**63))
KINDS = {"softmax": 0, "softmax_after_topk": 1, "sigmoid": 2, "sqrtsoftplus": 3}
ROWS_PER_PROGRAM = 32
TILE_ELEMENTS = 1024
WARPS = 2
SUMMED_PROGRAMS, SUMMED_EXPERTS = 128, 32


def forward(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    chosen_TK: torch.Tensor | None,
    valid_T: torch.Tensor | None,
    num_sequences: int,
    rule: RouterRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference."""
    num_tokens, num_experts = logits_TE.shape
    device = logits_TE.device
    length = num_tokens // max(num_sequences, 1)
    tiles = _tiles(length, num_experts, rule)
    programs = cdiv(length, tiles["BT"] * tiles["TILES"])
    ids_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.int64, device=device)
    weights_TK = torch.empty(num_tokens, rule.top_k, dtype=torch.float32, device=device)
    counts_SPE = torch.empty(num_sequences, programs, num_experts, dtype=torch.int32, device=device)
    sums_SPE = torch.empty(num_sequences, programs, num_experts, dtype=torch.float32, device=device)
    z_SP = torch.empty(num_sequences, programs, dtype=torch.float32, device=device)
    if num_tokens:
        _forward_kernel[(num_sequences, programs)](
            logits_TE,
            bias_E,
            chosen_TK,
            valid_T,
            ids_TK,
            weights_TK,
            counts_SPE,
            sums_SPE,
            z_SP,
            length,
            num_experts,
            rule.eps,
            rule.min_sum,
            rule.scale,
            K=rule.top_k,
            KIND=KINDS[rule.score],
            NORMALIZE=rule.normalize,
            G=rule.num_groups,
            TOPK_GROUPS=rule.topk_groups,
            GROUP_SIZE=num_experts // rule.num_groups,
            BEST_TWO=rule.best_two and num_experts > rule.num_groups,
            BG=power_of_2(rule.num_groups),
            **tiles,
        )
    return ids_TK, weights_TK, *_add_up(counts_SPE, sums_SPE, z_SP)


def _add_up(
    counts_SPE: torch.Tensor, sums_SPE: torch.Tensor, z_SP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Over the programs, in one launch."""
    sequences, programs, experts = counts_SPE.shape
    counts_SE = torch.empty(sequences, experts, dtype=torch.int64, device=z_SP.device)
    sums_SE = torch.empty(sequences, experts, dtype=torch.float32, device=z_SP.device)
    z = torch.empty((), dtype=torch.float32, device=z_SP.device)
    _add_kernel[(sequences, cdiv(experts, SUMMED_EXPERTS))](
        counts_SPE,
        sums_SPE,
        z_SP,
        counts_SE,
        sums_SE,
        z,
        programs,
        experts,
        z_SP.numel(),
        STEPS=power_of_2(cdiv(programs, SUMMED_PROGRAMS)),
        Z_STEPS=power_of_2(cdiv(z_SP.numel(), SUMMED_PROGRAMS)),
        BP=SUMMED_PROGRAMS,
        BE=SUMMED_EXPERTS,
    )
    return counts_SE, sums_SE, z


def backward(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    valid_T: torch.Tensor | None,
    dweights_TK: torch.Tensor,
    dsums_SE: torch.Tensor,
    dz: torch.Tensor,
    rule: RouterRule,
) -> torch.Tensor:
    """See the reference."""
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE)
    if not num_tokens:
        return dlogits_TE
    num_sequences = len(dsums_SE)
    length = num_tokens // num_sequences
    tiles = _tiles(length, num_experts, rule)
    _backward_kernel[(num_sequences, cdiv(length, tiles["BT"] * tiles["TILES"]))](
        logits_TE,
        ids_TK,
        valid_T,
        dweights_TK.contiguous(),
        dsums_SE.contiguous(),
        dz,
        dlogits_TE,
        length,
        num_experts,
        rule.eps,
        rule.min_sum,
        rule.scale,
        K=rule.top_k,
        KIND=KINDS[rule.score],
        NORMALIZE=rule.normalize,
        **tiles,
    )
    return dlogits_TE


def _tiles(length: int, num_experts: int, rule: RouterRule) -> dict[str, int]:
    block = power_of_2(num_experts)
    rows = max(1, min(ROWS_PER_PROGRAM, TILE_ELEMENTS // block))
    tiles = min(ROWS_PER_PROGRAM // rows, power_of_2(cdiv(max(length, 1), rows)))
    return {"BT": rows, "TILES": tiles, "BE": block, "BK": power_of_2(rule.top_k), "num_warps": WARPS}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) without losing small exp(x); x beyond 20, as torch does."""
    small = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + small
    ratio = tl.where(above == 1.0, 1.0, small / tl.where(above == 1.0, 1.0, above - 1.0))
    near = tl.where(above == 1.0, small, tl.log(above) * ratio)
    return tl.where(x > 20.0, x, near)


@triton.jit
def _load_tile(logits, valid, sequence, program, tile, length, E, BT: tl.constexpr, TILES: tl.constexpr, column):
    """Rows of one tile: token numbers, which are inside, which are routed, and their logits (-inf beyond E)."""
    within = (program * TILES + tile) * BT + tl.arange(0, BT)
    inside = within < length
    token = sequence.to(tl.int64) * length + within
    live = inside
    if valid is not None:
        live = inside & (tl.load(valid + token, mask=inside, other=0) != 0)
    is_expert = column < E
    x = tl.load(logits + token[:, None] * E + column[None, :], mask=live[:, None] & is_expert[None, :], other=0.0)
    return token, inside, live, tl.where(is_expert[None, :], x.to(tl.float32), float("-inf"))


@triton.jit
def score_rows(x, KIND: tl.constexpr):
    """Softmax, logsumexp, and the scores of this kind."""
    top = tl.max(x, axis=1)
    exponential = tl.exp(x - top[:, None])
    total = tl.sum(exponential, axis=1)
    softmax = exponential / total[:, None]
    score = softmax
    if KIND == 2:
        score = 1.0 / (1.0 + tl.exp(-x))
    if KIND == 3:
        score = tl.where(x < -40.0, tl.exp(x / 2), tl.sqrt(_softplus(tl.maximum(x, -40.0))))
    return softmax, top + tl.log(total), score


@triton.jit
def _keys(value, column, BLOCK: tl.constexpr):
    """Unique 64-bit keys in the order of (value, lowest column first); -0 equals 0, NaN is above infinity."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    return ordered.to(tl.int64) * 4294967296 + (BLOCK - 1 - column)[None, :].to(tl.int64)


@triton.jit
def _column_of(key, BLOCK: tl.constexpr):
    return (BLOCK - 1 - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _keep_groups(
    keys,
    column,
    G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST_TWO: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
):
    """Keys with those of all but the best groups at the lowest value."""
    group_of = column // GROUP_SIZE
    group = tl.arange(0, BG)
    scores = tl.full([BT, BG], 0.0, tl.float32)
    for g in range(G):
        member = tl.where((group_of == g)[None, :], keys, LOWEST)
        best = tl.max(member, axis=1)
        value = _value_of(best)
        if BEST_TWO:
            value += _value_of(tl.max(tl.where(member == best[:, None], LOWEST, member), axis=1))
        scores = tl.where((group == g)[None, :], value[:, None], scores)
    group_keys = tl.where((group < G)[None, :], _keys(scores, group, BG), LOWEST)
    kept = tl.zeros([BT, keys.shape[1]], tl.int32)
    for _ in range(TOPK_GROUPS):
        best = tl.max(group_keys, axis=1)
        kept = tl.where(group_of[None, :] == _column_of(best, BG)[:, None], 1, kept)
        group_keys = tl.where(group_keys == best[:, None], LOWEST, group_keys)
    return tl.where(kept != 0, keys, LOWEST)


@triton.jit
def _forward_kernel(
    logits,
    bias,
    chosen,
    valid,
    ids,
    weights,
    counts,
    sums,
    z,
    length,
    E,
    eps,
    min_sum,
    scale,
    K: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BEST_TWO: tl.constexpr,
    BT: tl.constexpr,
    TILES: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
):
    sequence, program = tl.program_id(0), tl.program_id(1)
    column, slot = tl.arange(0, BE), tl.arange(0, BK)
    is_expert, is_slot = column < E, slot < K
    count_sum = tl.zeros([BE], tl.int32)
    share_sum = tl.zeros([BE], tl.float32)
    z_sum = tl.zeros([BT], tl.float32)
    for tile in range(TILES):
        token, inside, live, x = _load_tile(logits, valid, sequence, program, tile, length, E, BT, TILES, column)
        softmax, lse, score = score_rows(x, KIND)
        ranked = x if KIND == 1 else score
        keys = tl.zeros([BT, BE], tl.int64)
        if chosen is None:
            choice = ranked
            if bias is not None:
                choice = ranked + tl.load(bias + column, mask=is_expert, other=0.0).to(tl.float32)[None, :]
            keys = tl.where(is_expert[None, :], _keys(choice, column, BE), LOWEST)
            if G > 1:
                keys = _keep_groups(keys, column, G, TOPK_GROUPS, GROUP_SIZE, BEST_TWO, BT, BG)
        id_tile = tl.full([BT, BK], -1, tl.int32)
        value_tile = tl.zeros([BT, BK], tl.float32)
        taken = tl.zeros([BT, BE], tl.int32)
        for k in range(K):
            if chosen is None:
                best = tl.max(keys, axis=1)
                picked = _column_of(best, BE)
                keys = tl.where(keys == best[:, None], LOWEST, keys)
            else:
                picked = tl.load(chosen + token * K + k, mask=live, other=-1).to(tl.int32)
            here = column[None, :] == picked[:, None]
            value = tl.sum(tl.where(here, ranked, 0.0), axis=1)
            taken += here.to(tl.int32)
            id_tile = tl.where((slot == k)[None, :], picked[:, None], id_tile)
            value_tile = tl.where((slot == k)[None, :], value[:, None], value_tile)
        if KIND == 1:
            value_tile = tl.where(is_slot[None, :], value_tile, float("-inf"))
            exponential = tl.exp(value_tile - tl.max(value_tile, axis=1)[:, None])
            value_tile = exponential / tl.sum(exponential, axis=1)[:, None]
        elif NORMALIZE:
            total = tl.sum(value_tile, axis=1) + eps
            value_tile = value_tile / tl.where(total < min_sum, min_sum, total)[:, None]
        target = token[:, None] * K + slot[None, :]
        stored = inside[:, None] & is_slot[None, :]
        tl.store(ids + target, tl.where(live[:, None], id_tile, -1).to(tl.int64), mask=stored)
        tl.store(weights + target, tl.where(live[:, None], value_tile * scale, 0.0), mask=stored)
        shares = softmax
        if KIND >= 2:
            shares = score / tl.sum(score, axis=1)[:, None]
        count_sum += tl.sum(tl.where(live[:, None], taken, 0), axis=0)
        share_sum += tl.sum(tl.where(live[:, None], shares, 0.0), axis=0)
        z_sum += tl.where(live, lse * lse, 0.0)
    partial = sequence.to(tl.int64) * tl.num_programs(1) + program
    tl.store(counts + partial * E + column, count_sum, mask=is_expert)
    tl.store(sums + partial * E + column, share_sum, mask=is_expert)
    tl.store(z + partial, tl.sum(z_sum, axis=0))


@triton.jit
def _add_kernel(
    counts,
    sums,
    z,
    counts_out,
    sums_out,
    z_out,
    programs,
    E,
    parts,
    STEPS: tl.constexpr,
    Z_STEPS: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    sequence, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BE + tl.arange(0, BE)
    count = tl.zeros([BE], tl.int32)
    total = tl.zeros([BP, BE], tl.float32)
    for step in range(STEPS):
        program = step * BP + tl.arange(0, BP)
        source = (sequence * programs + program)[:, None] * E + column[None, :]
        there = (program < programs)[:, None] & (column < E)[None, :]
        count += tl.sum(tl.load(counts + source, mask=there, other=0), axis=0)
        total += tl.load(sums + source, mask=there, other=0.0)
    tl.store(counts_out + sequence * E + column, count.to(tl.int64), mask=column < E)
    tl.store(sums_out + sequence * E + column, tl.sum(total, axis=0), mask=column < E)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        z_sum = tl.zeros([BP], tl.float32)
        for step in range(Z_STEPS):
            part = step * BP + tl.arange(0, BP)
            z_sum += tl.load(z + part, mask=part < parts, other=0.0)
        tl.store(z_out, tl.sum(z_sum, axis=0))


@triton.jit
def _backward_kernel(
    logits,
    ids,
    valid,
    dweights,
    dsums,
    dz,
    dlogits,
    length,
    E,
    eps,
    min_sum,
    scale,
    K: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BT: tl.constexpr,
    TILES: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    sequence, program = tl.program_id(0), tl.program_id(1)
    column, slot = tl.arange(0, BE), tl.arange(0, BK)
    is_expert, is_slot = column < E, slot < K
    dshare = tl.load(dsums + sequence.to(tl.int64) * E + column, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    dz_value = tl.load(dz).to(tl.float32)
    for tile in range(TILES):
        token, inside, live, x = _load_tile(logits, valid, sequence, program, tile, length, E, BT, TILES, column)
        softmax, lse, score = score_rows(x, KIND)
        ranked = x if KIND == 1 else score
        source = token[:, None] * K + slot[None, :]
        dweight = tl.load(dweights + source, mask=live[:, None] & is_slot[None, :], other=0.0).to(tl.float32) * scale
        value = tl.zeros([BT, BK], tl.float32)
        for k in range(K):
            picked = tl.load(ids + token * K + k, mask=live, other=-1).to(tl.int32)
            found = tl.sum(tl.where(column[None, :] == picked[:, None], ranked, 0.0), axis=1)
            value = tl.where((slot == k)[None, :], found[:, None], value)
        dvalue = dweight
        if KIND == 1:
            value = tl.where(is_slot[None, :], value, float("-inf"))
            exponential = tl.exp(value - tl.max(value, axis=1)[:, None])
            p = exponential / tl.sum(exponential, axis=1)[:, None]
            dvalue = p * (dweight - tl.sum(p * dweight, axis=1)[:, None])
        elif NORMALIZE:
            total = tl.sum(value, axis=1) + eps
            divisor = tl.where(total < min_sum, min_sum, total)
            inner = tl.where(total >= min_sum, tl.sum(dweight * value, axis=1) / divisor, 0.0)
            dvalue = (dweight - inner[:, None]) / divisor[:, None]
        dranked = tl.zeros([BT, BE], tl.float32)
        for k in range(K):
            picked = tl.load(ids + token * K + k, mask=live, other=-1).to(tl.int32)
            part = tl.sum(tl.where((slot == k)[None, :], dvalue, 0.0), axis=1)
            dranked += tl.where(column[None, :] == picked[:, None], part[:, None], 0.0)
        if KIND <= 1:
            dscore = dshare + dranked if KIND == 0 else dshare + tl.zeros([BT, BE], tl.float32)
            gradient = softmax * (dscore - tl.sum(softmax * dscore, axis=1)[:, None])
            if KIND == 1:
                gradient += dranked
        else:
            total_score = tl.sum(score, axis=1)
            inner_share = tl.sum(score * dshare, axis=1) / total_score
            dscore = dranked + (dshare - inner_share[:, None]) / total_score[:, None]
            if KIND == 2:
                gradient = dscore * score * (1.0 - score)
            else:
                sigmoid = 1.0 / (1.0 + tl.exp(-x))
                gradient = dscore * tl.where(x < -40.0, score * 0.5, sigmoid / (2.0 * score))
        gradient += softmax * (2.0 * dz_value * lse)[:, None]
        tl.store(
            dlogits + token[:, None] * E + column[None, :],
            tl.where(live[:, None], gradient, 0.0),
            mask=inside[:, None] & is_expert[None, :],
        )
