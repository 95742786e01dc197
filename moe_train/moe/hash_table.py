"""Fixed routing by token id: a table [vocabulary V, K] of experts (Hash Layers, Roller et al. 2021, arXiv 2106.04426).

A hash layer sends every token with id v to the experts of row v; its gate only weighs them. The table is drawn once
for a run that starts from scratch and is read from the checkpoint otherwise (`tid2eid` of DeepSeek-V4).
"""

import math

import torch

from moe_train.errors import RoutingError


def balanced_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    """Random table, int64 [V, K] on the CPU: K distinct experts per id, every expert equally often.

    Equally often means within one id, in each column and over the whole table. The same holds, per column, within
    every block of E consecutive ids: tokenizers number tokens roughly by frequency, so that each expert gets its
    part of frequent and of rare ones. The same arguments give the same table, whatever the global generator did
    and whatever the default device is.

    A block takes a random order of the experts as a ring. Id i of the block starts at a random place of the ring,
    another for each id, and takes K experts in a row: K rotations of one permutation, so no row holds an expert twice
    and every row is, taken alone, a uniform draw of K out of E. The last block, of r < E ids, walks on from column to
    column (`_rest`).
    """
    for name, value, low in (("vocab_size", vocab_size, 1), ("num_experts", num_experts, 1), ("top_k", top_k, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise RoutingError(f"{name} ({value!r}) of a hash layer must be an integer of at least {low}: correct it")
    if top_k > num_experts:
        raise RoutingError(
            f"top_k ({top_k}) of a hash layer exceeds its number of experts ({num_experts}): lower "
            "num_experts_per_tok or raise the number of experts under model.config"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks, rest = divmod(vocab_size, num_experts)
    rings = _permutations(blocks + 1, num_experts, generator)
    starts = _permutations(blocks, num_experts, generator)
    places = (starts.unsqueeze(-1) + torch.arange(top_k, device="cpu")) % num_experts
    full = rings[:blocks].unsqueeze(-1).expand(-1, -1, top_k).gather(1, places)
    last = rings[blocks][_rest(rest, num_experts, top_k)]
    rows = last[torch.randperm(rest, generator=generator, device="cpu")]
    return torch.cat([full.reshape(-1, top_k), rows])


def _permutations(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count, size], a random order of 0..size-1 per row."""
    keys = torch.randint(2**62, (count, size), generator=generator, device="cpu")
    return keys.argsort(dim=1, stable=True)


def _rest(rows: int, num_experts: int, top_k: int) -> torch.Tensor:
    """Places on the ring for r < E ids, [r, K]: distinct in a row, distinct in a column, all places equally often.

    Column by column the ring is walked without a gap, which makes all places equally often and a column distinct.
    After a whole number of rounds the walk would meet its first column again: it goes on one place further, where
    every place has come equally often. Places of one row then differ: within the rounds by multiples of gcd(r, E),
    between them by less than that.
    """
    row = torch.arange(rows, device="cpu").unsqueeze(-1)
    column = torch.arange(top_k, device="cpu")
    columns_per_round = num_experts // math.gcd(rows, num_experts)
    return (row + column * rows + column // columns_per_round) % num_experts


def check_table(table: torch.Tensor, vocab_size: int, num_experts: int, top_k: int) -> None:
    """Raise `RoutingError` for a table that cannot route. An expert may come twice in a row. Reads the device."""
    if table.dtype not in (torch.int64, torch.int32):
        raise RoutingError(
            f"hash table: dtype {table.dtype} must be int64 or int32: it holds expert numbers, convert it"
        )
    if tuple(table.shape) != (vocab_size, top_k):
        raise RoutingError(
            f"hash table: shape {list(table.shape)} must be [vocab_size ({vocab_size}), top_k ({top_k})]: use the "
            "table of this model, or correct vocab_size or num_experts_per_tok under model.config"
        )
    if not table.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(table))
    if low < 0 or high >= num_experts:
        wrong = low if low < 0 else high
        token = int((table == wrong).any(dim=1).nonzero()[0])
        raise RoutingError(
            f"hash table: entry {wrong} of token id {token} must lie between 0 and {num_experts - 1}, the experts of "
            "the layer: use the table of this model or correct its number of experts under model.config"
        )
