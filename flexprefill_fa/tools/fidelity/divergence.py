"""How far two readings of a text are apart: KL of the next-token distributions, loss, and the most likely token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexprefill_fa.tools.fidelity.reading import Reader

_PIECE_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Logits of one reading that are there at once; some six times as many numbers are held for them."""

PIECE_COPIES = 6


class NotFiniteError(ArithmeticError):
    """Logits are NaN or infinite.

    Attributes:
        dense: whether those of the dense model are.
        position: the first that has some.
    """

    def __init__(self, dense: bool, position: int) -> None:
        super().__init__(f"the logits of position {position} are not finite")
        self.dense, self.position = dense, position


@dataclass(frozen=True)
class Divergence:
    """Sparse from dense.

    Attributes:
        kl: mean over the positions of KL(dense || sparse) of the next token's distribution, in nats.
        kl_99: its 99th percentile.
        dense_loss, loss: mean cross-entropy of the text's next token, in nats.
        same_top: share of the positions whose most likely token is the same.
        positions: how many there were.
    """

    kl: float
    kl_99: float
    dense_loss: float
    loss: float
    same_top: float
    positions: int


def piece_positions(vocabulary: int, device: torch.device) -> int:
    """Positions whose logits are computed at once."""
    return max(1, _PIECE_ELEMENTS.get(device.type, 2**24) // vocabulary)


def diverge(reader: Reader, dense: Tensor, sparse: Tensor, ids: Tensor, skip: int) -> Divergence:
    """Compare two readings.

    Args:
        reader: of the model, without sparse prefill.
        dense, sparse: hidden states `[n, d]`; dense ones may lie on another device.
        ids: int64 `[1, n]`, the text.
        skip: first positions that do not count. The last one has no next token in the text and does not either.

    Raises:
        NotFiniteError: for the first position whose logits are not finite.
    """
    n = ids.shape[1]
    device = sparse.device
    targets = ids[0].to(device)
    step = piece_positions(reader.vocabulary, device)
    columns = []
    for first in range(skip, n - 1, step):
        end = min(first + step, n - 1)
        both = torch.cat((dense[first:end].to(device), sparse[first:end]))
        log_p, log_q = reader.logits(both).to(device).float().log_softmax(-1).chunk(2)
        _check(log_p, dense=True, first=first)
        _check(log_q, dense=False, first=first)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).masked_fill_(p == 0, 0).sum(-1)  # 0 ln 0 = 0, for tokens that a model rules out
        nll = [-each.gather(1, targets[first + 1 : end + 1, None])[:, 0] for each in (log_p, log_q)]
        same = log_p.argmax(-1) == log_q.argmax(-1)
        columns.append(torch.stack((kl, *nll, same.float())))
    table = torch.cat(columns, dim=1).double().cpu()  # [4, positions]
    kl, dense_loss, loss, same_top = table.mean(1).tolist()
    return Divergence(kl, table[0].quantile(0.99).item(), dense_loss, loss, same_top, table.shape[1])


def _check(log_probability: Tensor, *, dense: bool, first: int) -> None:
    bad = log_probability.isnan().any(-1)
    if bad.any():
        raise NotFiniteError(dense, first + int(bad.nonzero()[0]))
