"""The comparison of a selection with the oracle's, shared by the tests of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from oracle_flexprefill import OracleSelection, oracle_select
from torch import Tensor

from flexprefill_fa import BlockSelection, FlexPrefillConfig, select_blocks

# A decision that is relatively closer than this may fall either way in fp32.
NEAR_TIE = 1e-5


def ask_oracle(
    query: Tensor,
    key: Tensor,
    config: FlexPrefillConfig,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> OracleSelection:
    return oracle_select(query, key, **asdict(config), starts=starts, lengths=lengths, scale=scale)


def compare_with_oracle(
    query: Tensor,
    key: Tensor,
    config: FlexPrefillConfig,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[int, int, BlockSelection]:
    """(heads, heads that a near-tie may decide, the selection); every other head must be equal, block for block."""
    selection = select_blocks(query, key, config, starts=starts, lengths=lengths, scale=scale)
    oracle = ask_oracle(query, key, config, starts, lengths, scale)
    clear = torch.from_numpy(oracle.margin) >= NEAR_TIE  # [B, Hq]
    expected = torch.from_numpy(oracle.keep)
    different = (selection.to_dense() != expected).flatten(2).any(-1)
    assert not (different & clear).any(), (
        f"heads {(different & clear).nonzero().tolist()} differ from the oracle, margins {oracle.margin.tolist()}: "
        f"{config}, query {tuple(query.shape)}, key {tuple(key.shape)}, {starts=}, {lengths=}, {scale=}"
    )
    distance = torch.from_numpy(oracle.js_distance).float()
    measured = clear & (distance != 0)  # 0: a short element has no pattern
    aware = selection.js_distance < config.tau
    assert torch.equal(aware[measured], torch.from_numpy(oracle.query_aware)[measured])
    both = ~(distance.isnan() | selection.js_distance.isnan())
    torch.testing.assert_close(selection.js_distance[both], distance[both], atol=2e-3, rtol=0)
    return clear.numel(), int((~clear).sum()), selection
