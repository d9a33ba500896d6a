"""The comparison of a FlashPrefill selection with the oracle's, block for block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from oracle_flashprefill import FlashOracle, oracle_select
from torch import Tensor

from flexprefill_fa import BlockSelection, FlashPrefillConfig, select_blocks

# A score that comes closer to the threshold, relatively to the scores' size, may fall either way in fp32; with rounded
# means one between two numbers of the inputs' dtype may become either.
NEAR_TIE = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


def ask_oracle(
    query: Tensor,
    key: Tensor,
    config: FlashPrefillConfig,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> FlashOracle:
    return oracle_select(query, key, **asdict(config), starts=starts, lengths=lengths, scale=scale)


def compare_with_oracle(
    query: Tensor,
    key: Tensor,
    config: FlashPrefillConfig,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[int, int, int, BlockSelection]:
    """(cells that only a score decides, those of them that are kept, near-ties, the selection)."""
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths, scale=scale)
    oracle = ask_oracle(query, key, config, starts, lengths, scale)
    clear = torch.from_numpy(oracle.margin) >= NEAR_TIE[key.dtype]
    expected, keep = torch.from_numpy(oracle.keep), selection.to_dense()
    wrong = ((keep != expected) & clear).nonzero()
    assert not len(wrong), (
        f"cells {wrong[:5].tolist()} differ from the oracle: {config}, query {tuple(query.shape)}, "
        f"key {tuple(key.shape)}, {starts=}, {lengths=}, {scale=}"
    )
    decided = torch.from_numpy(oracle.by_score)
    return int(decided.sum()), int((decided & keep).sum()), int((~clear).sum()), selection
