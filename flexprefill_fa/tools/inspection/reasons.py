"""Why a layer's blocks are kept: the clause, or the rule, and the share that the rule compares with its threshold.

In a page they are bytes, of the lower triangle of (query block, key block), row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.grid import Grid
from flexprefill_fa.integrations.transformers import SparseCall
from flexprefill_fa.masks import Selector
from flexprefill_fa.masks.element import element_of
from flexprefill_fa.masks.selector import SHARED_HEADS
from flexprefill_fa.masks.shares import BlockShares
from flexprefill_fa.tools.inspection.maps import KINDS

PARTS = ("row", "representative", "share", "share_fine")
"""Bytes of each head and block, in their order: a share in two of them, the higher first, as `REACHED` says."""

REACHED = 2**15
"""What is added to a share's ten-thousandths where it reaches the threshold: rounded, it could not be told."""

OTHERS = "kept in any case"
"""The clause of blocks that a selector always keeps and has no name for."""


@dataclass(frozen=True)
class Reasons:
    """Of one layer's blocks.

    Attributes:
        clauses: of what is kept whatever the rule says, the same in every head: name -> bool `[nb, nb]`, causal.
        shares: None where the selector has none.
    """

    clauses: dict[str, Tensor]
    shares: BlockShares | None


def find_reasons(call: SparseCall, config: Selector) -> Reasons:
    """By the rule in plain PyTorch, for a prompt in one piece."""
    tokens = call.query.shape[2]
    grid = Grid(tokens, tokens, config.block_size)
    found = element_of(call.query[0], call.key[0], 0, tokens, grid, call.scale)
    if found is None:
        raise ValueError("query and key must have at least one token, got none")
    element, kind, clauses = found[0], type(config), {}
    own_clauses = kind.clauses is not Selector.clauses
    if kind.pattern is Selector.pattern:
        always = config.always(element) & element.visible()
        clauses = {name: blocks & always for name, blocks in config.clauses(element).items()}
        if (others := always & ~torch.stack(list(clauses.values())).any(0)).any():
            clauses[OTHERS] = others
    elif own_clauses:
        clauses = {name: blocks & element.visible() for name, blocks in config.clauses(element).items()}
    return Reasons(clauses, config.block_shares(element))


def rule_words(config: Selector) -> str:
    """What a block is kept by that no clause names."""
    return "the rule, for a head of its key head" if config.name.endswith(SHARED_HEADS) else "the rule"


def share_words(config: Any, shares: BlockShares, head: int, query_block: int, key_block: int) -> str:
    """A block's share, which query gives it through what, and how it compares with the threshold.

    The page says the same: `reasonsOf` in heads.js.
    """
    place = head, query_block, key_block
    share, threshold = shares.share[place].item(), getattr(config, shares.threshold)
    largest = given = through = ""
    if shares.row is not None:
        query = query_block * config.block_size + int(shares.row[place])
        largest, given = "largest ", f", given by query {query:,}"
    if shares.representative is not None:
        number = int(shares.representative[place])
        through = f" through representative {number}" if number else " through all of its keys"
    compared = "at least" if share >= threshold else "below"
    return f"{largest}share {share:.4f} {shares.what}{given}{through}: {compared} {shares.threshold} {threshold}"


def map_count(heads: int, shares: bool) -> int:
    """Bytes of a layer for each cell: those of `KINDS`, which clauses, and `PARTS` where there are shares."""
    return 1 + heads * (len(KINDS) + (len(PARTS) if shares else 0))


@dataclass(frozen=True)
class ReasonMaps:
    """A layer's reasons as bytes.

    Attributes:
        clauses: texts, "" where no clause keeps a block.
        what, threshold: as of `BlockShares`. least: the threshold's value. None where there are no shares.
        parts: those of `PARTS` that there are.
        data: uint8, nb (nb + 1) / 2: which text; then heads x `parts` x nb (nb + 1) / 2.
    """

    clauses: list[str]
    what: str | None
    threshold: str | None
    least: float | None
    parts: tuple[str, ...]
    data: bytes


def reason_maps(reasons: Reasons, config: Selector, blocks: int) -> ReasonMaps:
    """The bytes of a layer of so many blocks."""
    codes = torch.zeros(blocks, blocks, dtype=torch.int64)
    for i, kept in enumerate(reasons.clauses.values()):
        codes += kept.cpu().long() << i
    found, which = codes.unique(return_inverse=True)
    texts = [", ".join(name for i, name in enumerate(reasons.clauses) if code >> i & 1) for code in found.tolist()]
    row, column = torch.tril_indices(blocks, blocks)
    clauses, shares = bytes(which[row, column].tolist()), reasons.shares
    if shares is None:
        return ReasonMaps(texts, None, None, None, (), clauses)
    least = getattr(config, shares.threshold)
    parts = _parts(shares, least)
    data = torch.stack(list(parts.values()), 1).cpu()[..., row, column].flatten()
    return ReasonMaps(texts, shares.what, shares.threshold, least, tuple(parts), clauses + bytes(data.tolist()))


def _parts(shares: BlockShares, threshold: float) -> dict[str, Tensor]:
    level = (shares.share.double() * 10000).round().clamp(0, 10000).long() + REACHED * (shares.share >= threshold)
    parts = (shares.row, shares.representative, level >> 8, level & 255)
    return {name: part for name, part in zip(PARTS, parts, strict=True) if part is not None}
