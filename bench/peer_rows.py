"""Other implementations beside this one, on the same inputs: checked, then timed."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.attention import LengthBenchmark
from bench.check import Reference, no_better_than_zeros, relative_error
from bench.peers import (
    SELECTORS,
    Call,
    Peer,
    density_of_ratio,
    find_peers,
    foreign_code,
    identity,
    load,
)
from bench.planning import Plan
from bench.speed_tables import OURS
from flexprefill_fa import sparse_prefill_attention
from flexprefill_fa.tools.loading import first_line
from flexprefill_fa.tools.rows import Row


class PeerBenchmark(LengthBenchmark):
    """All rows of one length: dense kernels and this package's selectors, then each peer of the same method.

    This package's rows are those of `LengthBenchmark`, checked against fp64 attention over the kept blocks. A peer's
    blocks are not known, so its output is held against dense attention (`dense_error`, which this package's sparse
    rows have too), and must be better than zeros. It gets the same values in its own layout `[B, L, H, D]`, copied
    before the clock starts. A peer may leave threads, default dtypes or torch itself changed: take `peer_rows` when
    `rows` of every length are through.

    Args:
        plan, length, note: as for `LengthBenchmark`.
    """

    def __init__(self, plan: Plan, length: int, note: Callable[[str], None]) -> None:
        super().__init__(plan, length, note)
        self.conditions["kind"] = "peers"

    def selector_rows(self, config: Any, dense: Reference) -> Iterator[Row]:
        """As before, with `dense_error`."""
        for row in super().selector_rows(config, dense):
            row["implementation"] = OURS
            if row["path"] == "sparse" and "error" not in row:
                out = sparse_prefill_attention(*self.tensors, config, dense="never", backend=row["backend"])
                row["dense_error"] = relative_error(out[:, :, dense.positions], dense.dense)
            yield row

    def peer_rows(self, folder: Path, peers: list[Peer]) -> Iterator[Row]:
        """The rows of the peers found in a folder, after `rows`; one that failed has `error` and no times."""
        with torch.no_grad(), self.on_device():
            for peer in peers:
                for config in self.plan.configs:
                    if config.name == SELECTORS[peer.function]:
                        yield self._peer(peer, config, folder)

    def _peer(self, peer: Peer, config: Any, folder: Path) -> Row:
        row: Row = {**self.conditions, "path": "peer", "selector": config.name, "settings": dataclasses.asdict(config)}
        row |= {"backend": None, "kernel": None, **identity(peer, folder)}
        try:
            with foreign_code(peer):
                load(peer)
                version = getattr(sys.modules.get(peer.implementation), "__version__", None)
                row["peer_version"] = None if version is None else str(version)
                call = Call(peer, self.inputs, config)
                row["peer_settings"] = call.settings
                out, ratio = call.checked()
                expected = self.references[config]
                row["dense_error"] = relative_error(out[:, :, expected.positions], expected.dense)
                if problem := no_better_than_zeros(out, expected):
                    return {**row, "error": problem}
                del out
                found: Row = {}
                if ratio is not None:
                    found["density"] = density_of_ratio(ratio, self.length, config.block_size)
                    found["computational_ratio"] = round(ratio, 5)
                found |= self.times({"total_ms": call})
            return row | found | self.speedups(found)
        except (Exception, SystemExit) as error:  # somebody else's code may raise anything
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}


def look_for_peers(
    package: Path | None, modules: Sequence[str], selectors: Sequence[str], note: Callable[[str], None]
) -> list[Peer]:
    """The peers of these selectors under a folder; says what was found, and what is missing."""
    alone = "this package and dense attention are measured alone"
    if package is None:
        note(f"no --package folder with another implementation: {alone}")
        return []
    if not package.is_dir():
        note(f"error: there is no folder {package}: {alone}")
        return []
    wanted = [function for function, selector in SELECTORS.items() if selector in selectors]
    found = [peer for peer in find_peers(package, modules) if peer.function in wanted]
    if not wanted:
        note(f"error: {' and '.join(SELECTORS.values())} alone have published functions: {alone}")
    elif not found:
        note(f"error: no module in {package} defines {' or '.join(wanted)}: {alone}")
    for peer in found:
        others = f"; also in {', '.join(str(file) for file in peer.also)}" if peer.also else ""
        note(f"{peer.function}: {peer.module} ({peer.file}){others}")
        wanted.remove(peer.function)
    if found and wanted:
        note(f"no module in {package} defines {wanted[0]}: {SELECTORS[wanted[0]]} is measured without it")
    return found
