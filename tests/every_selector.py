"""The selectors that the shared tests run over: all of the registry, and the one that the documentation makes."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flexprefill_fa import BlockSelection, Selector, get_selector, selector_names
from flexprefill_fa.block_mask import check_layout
from flexprefill_fa.grid import unmasked_blocks, visible_blocks

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding_a_selector.md"

# What leaves blocks out of a few hundred tokens; of every other selector its sparsest setting.
_SMALL: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.4, "tau": 0.1, "min_budget": 1},
    "flashprefill": {"alpha": 0.6, "sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 0},
    "streaming_llm": {"sink": 64, "window": 100},
    "vertical_slash": {"vertical_size": 64, "slash_size": 130},
}


def documented(number: int) -> str:
    """The code of one of the document's Python blocks."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[number]


@cache
def define_documented(folder: Path) -> None:
    """Make the document's selector, from a file of its own as its reader would."""
    if "pooled_top" in selector_names():  # put where the document says
        return
    path = folder / "pooled_top.py"
    path.write_text(documented(0))
    spec = importlib.util.spec_from_file_location("pooled_top", path)
    assert spec is not None and spec.loader is not None
    sys.modules["pooled_top"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def example(name: str, block_size: int = 64, **fields: Any) -> Any:
    """A setting that leaves blocks out of short prompts."""
    kind: Any = get_selector(name)
    sparsest = {field: values[0] for field, values in kind.sweep.items()}
    return kind(**{**sparsest, **_SMALL.get(name, {}), "block_size": block_size, **fields})


def names() -> list[str]:
    return [*(name for name in selector_names() if name != "pooled_top"), "pooled_top"]


def check_laws(selection: BlockSelection, config: Any) -> None:
    """Causal, in order, each block once and in the right list, and what its class always keeps."""
    grid, ranges = selection.grid, selection.ranges
    visible, unmasked = visible_blocks(grid, ranges)[:, None], unmasked_blocks(grid, ranges)[:, None]
    kept = selection.to_dense()
    assert not (kept & ~visible).any()
    partial, full = (
        selection.kv_num_blocks.sum() + selection.full_kv_num_blocks.sum() == kept.sum(),
        selection.full_kv_num_blocks.sum() == (kept & unmasked).sum(),
    )
    assert partial and full
    check_layout(selection)
    for count, indices in (selection.lists[:2], selection.lists[2:]):
        inside = torch.arange(1, indices.shape[-1]) < count[..., None]
        assert (indices.diff(dim=-1)[inside] > 0).all()
    kind = type(config)
    if kind.always is Selector.always and kind.clauses is Selector.clauses and kind.pattern is Selector.pattern:
        block = torch.arange(grid.kv_blocks)
        row = grid.offset + torch.arange(grid.q_blocks)[:, None] * grid.block_size
        last = (row + grid.block_size).clamp(max=grid.kv_len) - 1
        first = ranges[:, 0, None, None].long() // grid.block_size
        diagonal = (block == row // grid.block_size) | (block == last // grid.block_size)
        always = ((block == first) | diagonal)[:, None] & visible
        assert not (always & ~kept).any()
