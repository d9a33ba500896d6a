"""Other implementations beside this one, on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.attention import Calls, LengthBenchmark
from bench.check import no_better_than_zeros, relative_error
from bench.peers.base import Peer, foreign_code
from bench.speed_tables import OURS
from bench.synthetic import chunk_selection
from flexprefill_fa import BlockSelection, sparse_prefill_attention
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row

_WORST_ERROR = 0.1  # over given blocks, in any arithmetic; other blocks are much further away


class PeerBenchmark(LengthBenchmark):
    """All rows of one length: dense kernels and this package, then each peer.

    This package's rows are those of `LengthBenchmark`, checked against fp64 attention over the kept blocks; its
    synthetic selections are the same for the query heads of a kv head, so that every peer can take them. What a peer
    selects is not known, so that its output is held against dense attention (`dense_error`, which this package's
    sparse rows have too), and must be better than zeros; over given blocks it is held against fp64 attention over
    those. A peer gets the same values in its own layout, copied before the clock starts. It may leave threads, default
    dtypes or torch itself changed: take `peer_rows` when `rows` of every length are through.
    """

    kind = "peers"

    def random_blocks(self, density: float) -> BlockSelection:
        """As before, one choice for the query heads of a kv head."""
        plan, groups = self.plan, self.plan.heads // self.plan.kv_heads
        one = chunk_selection(self.length, self.length, plan.kv_heads, density, device=plan.device, seed=plan.seed)
        count, indices, full_count, full_indices = (part.repeat_interleave(groups, 1) for part in one.lists)
        return BlockSelection(count, indices, full_count, full_indices, self.length, self.length, one.block_size)

    def selector_rows(self, config: Any) -> Iterator[Row]:
        """As before, with `dense_error`."""
        dense = self.references[None]
        for row in super().selector_rows(config):
            row["implementation"] = OURS
            if row["path"] == "sparse" and "error" not in row:
                out = sparse_prefill_attention(*self.inputs, config, dense="never", backend=row["backend"])
                row["dense_error"] = relative_error(out[:, :, dense.positions], dense.dense)
            yield row

    def peer_rows(self, folder: Path, peer: Peer) -> Iterator[Row]:
        """The rows of a peer, after `rows`; one that failed has `error` and no times."""
        with torch.no_grad(), self.plan.on_device():
            for density in self.plan.densities if peer.attend is not None else ():
                over = partial(self._over, density, peer, folder)
                yield self._row(peer, folder, "synthetic", {"density": density}, over)
            if peer.adapter and peer.selector is None and (self.plan.configs or not self.plan.densities):
                yield self._row(peer, folder, peer.name, None, partial(self._own, None, peer, folder))
            for config in self.plan.configs:
                if config.name == peer.selector:
                    own = partial(self._own, config, peer, folder)
                    yield self._row(peer, folder, config.name, dataclasses.asdict(config), own)

    def _row(
        self, peer: Peer, folder: Path, selector: str, settings: Any, measured: Callable[[], Iterator[Row]]
    ) -> Row:
        """What is `measured`, as one row; what was known before an error stays."""
        row: Row = {**self.conditions, "path": "peer", "selector": selector, "settings": settings}
        row |= {"backend": None, "kernel": None, **peer.identity(folder), "peer_version": None}
        self.watch.captures = peer.on_current_stream
        try:
            with foreign_code(folder):
                for found in measured():
                    row |= found
            return row | self.speedups(row)
        except (Exception, SystemExit) as error:  # somebody else's code may raise anything
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}

    def _own(self, config: Any, peer: Peer, folder: Path) -> Iterator[Row]:
        """Of a peer's own selection and attention."""
        assert peer.adapter is not None
        call = peer.adapter(peer.load(folder), *peer.tensors(self.inputs), config)
        yield {"peer_version": peer.version, "peer_settings": call.settings}
        if config is None:
            yield {"settings": call.settings}
        out, ratio = call.check()
        out = self._in_our_layout(out)
        expected = self.references[config]
        yield {"dense_error": relative_error(out[:, :, expected.positions], expected.dense)}
        if problem := no_better_than_zeros(out, expected):
            raise ValueError(problem)
        del out
        calls: Calls = {"total_ms": call.run} | ({} if call.select is None else {"select_ms": call.select})
        found: Row = {}
        if ratio is not None:
            short = config is not None and self.length <= config.dense_tokens  # a released function says 1 where dense
            size = 128 if config is None else config.block_size
            found["density"] = 1.0 if short else density_of_ratio(ratio, self.length, size)
            found["computational_ratio"] = round(ratio, 5)
        yield found | self.times(calls)

    def _over(self, density: float, peer: Peer, folder: Path) -> Iterator[Row]:
        """Of a peer's attention over the blocks that this package's rows of that density are over."""
        assert peer.attend is not None
        selection, expected = self.random_blocks(density), self.references[density]
        attend = peer.attend(peer.load(folder), *peer.tensors(self.inputs), selection.to_dense())
        yield {"peer_version": peer.version, "density": round(expected.density, 5)}
        out = self._in_our_layout(attend())
        error = relative_error(out[:, :, expected.positions], expected.expected)
        yield {"check_error": error, "check_allowed": _WORST_ERROR}
        if not error <= _WORST_ERROR:
            raise ValueError(f"relative error {error:.3g} of the sampled rows, allowed {_WORST_ERROR}")
        del out
        yield self.times({"attend_ms": attend})

    def _in_our_layout(self, out: Any) -> Tensor:
        """A peer's output as `[B, H, L, D]`."""
        expected = list(self.inputs.query.transpose(1, 2).shape)
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if got != expected:
            raise ValueError(f"its output must have shape [B, L, H, D] = {expected}, got {got}")
        if not bool(out.isfinite().all()):
            raise ValueError("its output is not finite")
        return out.transpose(1, 2)


def density_of_ratio(ratio: float, tokens: int, block_size: int) -> float:
    """Kept blocks / causal blocks from kept blocks / all blocks, of as many queries as keys, to five digits."""
    blocks = -(-tokens // block_size)
    density = round(ratio * 2 * blocks / (blocks + 1), 5)
    if not 0 < density <= 1:
        raise ValueError(f"its ratio {ratio:g} means a density of {density:g}, which must be in (0, 1]")
    return density
