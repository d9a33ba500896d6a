"""Launch every Triton kernel of the package on small, odd shapes: what `scripts/sanitize.sh` puts under the sanitizer.

    python scripts/every_kernel.py [PART ...]    all parts by default, each a shape, a dtype and a block size
    python scripts/every_kernel.py --parts       their numbers and names, a line each

A test holds that none is left out. Results are not looked at here: the tests with `-m gpu` do that.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flexprefill_fa import (
    FlashPrefillConfig,
    FlexPrefillConfig,
    PeakPrefillConfig,
    VerticalSlashConfig,
    select_blocks,
    share_heads,
)
from flexprefill_fa.kernels import coverage
from flexprefill_fa.kernels.mean_correction import correct
from flexprefill_fa.masks.selector import Selector, kernels_of

HEADS, KV_HEADS = 4, 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Queries, keys, head dim, (starts, lengths): partial blocks, a chunk, padding on both sides, a head dim between powers.
SHAPES: tuple[tuple[int, int, int, tuple[Any, Any]], ...] = (
    (321, 321, 64, (None, None)),
    (130, 400, 80, (None, None)),
    (330, 330, 128, ([0, 70], [300, 233])),
    (200, 200, 256, (None, None)),
)


def configs(block_size: int) -> Iterator[Selector]:
    """Settings whose choices go through different kernels; tau 1 makes every head query-aware, tau 0 none."""
    for variant, tau in itertools.product(("published", "paper"), (0.0, 1.0)):
        yield FlexPrefillConfig(
            gamma=0.6, tau=tau, min_budget=1, max_budget=4 * block_size, block_size=block_size, variant=variant
        )
    yield FlashPrefillConfig(0.5, 1, 1, 0, block_size)
    for kind in ("clusters", "outliers"):
        yield PeakPrefillConfig(peak=0.2, representatives=kind, block_size=block_size)
    yield VerticalSlashConfig(64, 130, block_size)
    yield share_heads(FlashPrefillConfig(0.5, 1, 1, 0, block_size))


Part = tuple[tuple[int, int, int, tuple[Any, Any]], torch.dtype, int]
PARTS: tuple[Part, ...] = tuple(itertools.product(SHAPES, DTYPES, (64, 128)))


def name_of(part: Part) -> str:
    """Queries x keys, head dim, dtype and block size of a part."""
    (q_len, kv_len, dim, place), dtype, size = part
    padded = "" if place == (None, None) else " padded"
    return f"{q_len}x{kv_len}{padded} head_dim {dim} {str(dtype).removeprefix('torch.')} blocks of {size}"


def launch_every_kernel(device: torch.device, parts: Sequence[Part] = PARTS) -> None:
    """All selections and mean correction, of every part; and FlexPrefill's coverage by many programs."""
    for (q_len, kv_len, dim, place), dtype, size in parts:
        batch = 1 if place == (None, None) else 2
        query = torch.randn(batch, HEADS, q_len, dim, device=device).to(dtype)
        key, value = (torch.randn(batch, KV_HEADS, kv_len, dim, device=device).to(dtype) for _ in range(2))
        padding = [None if x is None else torch.tensor(x, dtype=torch.int32, device=device) for x in place]
        for config in configs(size):
            for all_partial in (False, True):
                kernels_of(config.name)(query, key, *padding, config, None, all_partial, True)
        with mock.patch.multiple(coverage, SHORT=0, LINE=64, TILE=64):
            for config in itertools.islice(configs(size), 4):
                kernels_of(config.name)(query, key, *padding, config, None, False, True)
        selection = select_blocks(query, key, FlashPrefillConfig(0.9, 0, 1, 0, size), starts=place[0], lengths=place[1])
        for norm, tilted in ((0.0, True), (-300.0, False)):  # -300: dropped blocks outweigh the kept ones
            attended = (*_attended(query, norm), selection.lists, *padding)
            correct(query, key, value, *attended, 0.1, size, tilted)


def _attended(query: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Some attention over kept blocks, and its log-sum-exp."""
    return torch.randn_like(query), torch.full(query.shape[:3], norm, device=query.device)


def main(arguments: Sequence[str]) -> None:
    if arguments == ["--parts"]:
        print("\n".join(f"{number} {name_of(part)}" for number, part in enumerate(PARTS)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("every_kernel.py needs a CUDA GPU")
    torch.manual_seed(0)
    launch_every_kernel(torch.device("cuda"), [PARTS[int(number)] for number in arguments] or PARTS)
    torch.cuda.synchronize()
    print("every kernel was launched")


if __name__ == "__main__":
    main(sys.argv[1:])
