"""Exact dense attention in fp32, and what a block-sparse output loses against it, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexprefill_fa import BlockSelection
from flexprefill_fa.exact import block_mass, exact_probabilities

MASS_BLOCK = 64
"""Tokens per block of `Exact.mass`: selections of 64- and of 128-token blocks both are unions of such blocks."""

_SCORE_BYTES = 256 * 2**20  # fp32 scores of one kv head held at a time


@dataclass(frozen=True)
class Exact:
    """Dense causal attention of as many queries as keys: its output, fp32 `[B, Hq, n, D]`, and `mass`.

    That is fp32 `[B, Hq, nb, nb]`: the probability that the rows of a query block give to the keys of a key block,
    summed over the rows; blocks of `MASS_BLOCK` tokens.
    """

    out: Tensor
    mass: Tensor

    def recall(self, selection: BlockSelection) -> Tensor:
        """What `BlockSelection.recall` computes, fp64 `[B, Hq]`, without computing the scores again.

        Its blocks must be a multiple of `MASS_BLOCK`.
        """
        factor, blocks = selection.block_size // MASS_BLOCK, self.mass.shape[-1]
        keep = selection.to_dense().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        kept = self.mass.double().masked_fill_(~keep[..., :blocks, :blocks], 0)
        return kept.sum((-2, -1)) / self.out.shape[2]

    def head_errors(self, out: Tensor) -> Tensor:
        """Relative L2 distance of an output `[B, Hq, n, D]` from `out`, over each head's rows, fp64 `[B, Hq]`."""
        exact = self.out.double()
        return (out.double() - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Exact:
    """Dense causal attention of `[B, H, n, D]` in fp32 at the default scale, some rows of one kv head at a time."""
    groups, length = query.shape[1] // key.shape[1], value.shape[2]
    values = F.pad(value.float(), (0, 0, 0, -length % MASS_BLOCK))
    out = torch.empty(*query.shape, device=query.device)
    for kv_head, first, probability in exact_probabilities(query, key, MASS_BLOCK, score_bytes=_SCORE_BYTES):
        rows, seen = probability.shape[2:]
        group = slice(kv_head * groups, (kv_head + 1) * groups)
        out[:, group, first : first + rows] = probability @ values[:, kv_head, None, :seen]
    return Exact(out, block_mass(query, key, MASS_BLOCK))
