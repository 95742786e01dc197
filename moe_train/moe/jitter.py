"""Router jitter (Switch Transformer, arXiv 2101.03961): training scales what enters an MoE block by random factors.

The experts see the scaled input too, as in Hugging Face's Mixtral. The factor of one element depends on (seed, layer,
sequence of the run, place in it, element) alone: it is the same at every layout and in recompute, and no generator's
state is touched.

T tokens, H hidden size.
"""

import torch

from moe_train.moe.sequences import Sequences

WORD = 0xFFFFFFFF


def jitter(x_TH: torch.Tensor, width: float, key: int, sequences: Sequences) -> torch.Tensor:
    """x times factors in [1 - width, 1 + width). `key`: of seed and layer, 32 bits of it are used."""
    column_H = _mixed(torch.arange(x_TH.shape[1], device=x_TH.device))
    row_T = _mixed(_mixed(sequences.number_T ^ (key & WORD)) ^ sequences.place_T)
    bits_TH = _mixed(row_T.unsqueeze(1) ^ column_H)
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    return x_TH * (bits_TH.to(wide) * (2 * width / (WORD + 1)) + (1 - width)).to(x_TH.dtype)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser on 32-bit words held in int64: each bit of a word changes half of the result's."""
    words = words & WORD
    words = (words ^ (words >> 16)) * 0x85EBCA6B & WORD
    words = (words ^ (words >> 13)) * 0xC2B2AE35 & WORD
    return words ^ (words >> 16)
