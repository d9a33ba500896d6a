"""Where the real queries and keys of a batch element lie among blocks, for the oracles (DESIGN.md, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Element:
    """One batch element in its own coordinates (section 4, "Chunks" and "Padding")."""

    block: int
    dropped: int  # wholly padded leading key blocks
    pad: int  # padded positions left in key block 0
    n: int  # real keys
    n_pos: int  # n' = pad + n
    nb: int  # key blocks
    n_queries: int  # real queries, the last positions
    q_index0: int  # index of the first real query in the query tensor
    rows: np.ndarray  # [R] absolute query block indices that hold a real query
    first: np.ndarray  # [R] position of each row's first query (it may be padding)
    last: np.ndarray  # [R] position of each row's last real query

    @property
    def j0(self) -> np.ndarray:
        """Key block of each row's first position; -1 where that lies in the dropped padding. `[R]`"""
        return self.first // self.block

    @property
    def j1(self) -> np.ndarray:
        """Key block of each row's last real position. `[R]`"""
        return self.last // self.block

    @property
    def causal(self) -> np.ndarray:
        """Cells with J <= J1. bool `[R, nb]`"""
        return np.arange(self.nb)[None, :] <= self.j1[:, None]

    @property
    def always(self) -> np.ndarray:
        """Step 5: the first block that holds a real key, J0 and J1. bool `[R, nb]`"""
        cells = self.block_diagonal(0)
        cells[:, 0] = True
        return cells

    def column(self, j: int) -> np.ndarray:
        """Causal cells of key block j. bool `[R, nb]`"""
        cells = np.zeros((len(self.rows), self.nb), dtype=bool)
        cells[:, j] = self.causal[:, j]
        return cells

    def block_diagonal(self, t: int) -> np.ndarray:
        """Cells (I, J0 - t) and (I, J1 - t). bool `[R, nb]`"""
        cells = np.zeros((len(self.rows), self.nb), dtype=bool)
        for r in range(len(self.rows)):
            for j in (self.j0[r] - t, self.j1[r] - t):
                if j >= 0:
                    cells[r, j] = True
        return cells

    def offset_cells(self) -> np.ndarray:
        """Cells that each token offset 0 ... n - 1 passes through (paper). bool `[n, R, nb]`"""
        offset = np.arange(self.n)[:, None]
        low = (self.first[None, :] - offset) // self.block  # [n, R]
        high = (self.last[None, :] - offset) // self.block
        j = np.arange(self.nb)
        return (low[:, :, None] <= j) & (j <= high[:, :, None])


def elements_of(n_batch: int, lq: int, lkv: int, block: int, starts, lengths) -> list[Element]:
    starts, lengths = padding(n_batch, lkv, starts, lengths)
    elements = []
    for start, n in zip(starts, lengths, strict=True):
        dropped = start // block
        origin, end = dropped * block, start + n
        off = lkv - lq  # absolute position of query 0
        rows, first, last = [], [], []
        for row in range(math.ceil(lq / block)):
            row_first = off + row * block
            row_last = min(off + min((row + 1) * block, lq), end) - 1
            if n > 0 and row_last >= max(row_first, start):
                rows.append(row)
                first.append(row_first - origin)
                last.append(row_last - origin)
        n_pos = start % block + n
        elements.append(
            Element(
                block=block,
                dropped=dropped,
                pad=start % block,
                n=n,
                n_pos=n_pos,
                nb=math.ceil(n_pos / block),
                n_queries=max(0, end - max(off, start)),
                q_index0=max(off, start) - off,
                rows=np.array(rows, dtype=np.int64),
                first=np.array(first, dtype=np.int64),
                last=np.array(last, dtype=np.int64),
            )
        )
    return elements


def padding(n_batch: int, lkv: int, starts, lengths) -> tuple[list[int], list[int]]:
    """Starts and lengths as lists of ints, with their defaults."""
    starts = [0] * n_batch if starts is None else [int(s) for s in starts]
    lengths = [lkv - s for s in starts] if lengths is None else [int(n) for n in lengths]
    if len(starts) != n_batch or len(lengths) != n_batch:
        raise ValueError(f"starts and lengths must have {n_batch} entries, got {len(starts)} and {len(lengths)}")
    if any(s < 0 or n < 0 or s + n > lkv for s, n in zip(starts, lengths, strict=True)):
        raise ValueError(f"real keys must lie in [0, {lkv}), got starts={starts}, lengths={lengths}")
    return starts, lengths
