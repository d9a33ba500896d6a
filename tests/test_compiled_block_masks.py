"""A BlockMask in the user's own `torch.compile(flex_attention, fullgraph=True)`, of one shape after another.

What a kernel cannot compile depends on the sizes that the calls before it made dynamic, so each list is a history.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_attention import masked_attention
from torch.nn.attention.flex_attention import flex_attention
from workloads import structured_qk

from flexprefill_fa import FlexPrefillConfig, create_flexprefill_block_mask, select_blocks

DIM = 32
WHOLE, LONGER, BATCH = (1, 4, 2, 512, 512), (1, 4, 2, 700, 700), (2, 4, 2, 512, 512)
PREFIX, HEADS = (1, 4, 2, 300, 900), (3, 6, 2, 401, 401)
PADDED, RIGHT = (2, 4, 2, 650, 650), (3, 4, 1, 300, 800)
PLACES: dict[tuple[int, ...], dict[str, Any]] = {
    PADDED: {"starts": [0, 130], "lengths": [650, 500]},
    RIGHT: {"lengths": [800, 640, 750]},
}


@pytest.mark.parametrize(
    ("block_size", "dynamic", "history"),
    [(128, None, (WHOLE, LONGER, BATCH, PADDED, PREFIX, HEADS)), (64, True, (PADDED, PREFIX, BATCH, WHOLE, RIGHT))],
)
def test_shapes_one_after_another(block_size: int, dynamic: bool | None, history: tuple[tuple[int, ...], ...]) -> None:
    torch._dynamo.reset()  # the history starts here
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)
    config = FlexPrefillConfig(gamma=0.3, tau=0.0, min_budget=1, block_size=block_size)
    for shape in history:
        batch, heads, kv_heads, q_len, kv_len = shape
        place = PLACES.get(shape, {})
        query, key = structured_qk(batch, heads, kv_heads, q_len, kv_len, DIM)
        value = torch.randn(key.shape)
        block_mask = create_flexprefill_block_mask(query, key, config=config, **place)
        with torch.no_grad():
            out = compiled(query, key, value, block_mask=block_mask, enable_gqa=True)
        keep = select_blocks(query, key, config, **place).to_dense()
        expected = masked_attention(query, key, value, keep, block_size, **place).float()
        dense = masked_attention(query, key, value, torch.ones_like(keep), block_size, **place).float()
        position = torch.arange(kv_len - q_len, kv_len)
        start = torch.tensor(place.get("starts", [0] * batch))[:, None]
        length = torch.tensor(place.get("lengths", [kv_len] * batch))[:, None]
        real = (position >= start) & (position < start + length)
        rows = real[:, None].expand(-1, heads, -1)
        torch.testing.assert_close(out[rows], expected[rows], atol=1e-5, rtol=1e-5)
        assert (out - dense)[rows].abs().max() > 0.05, "dense"
