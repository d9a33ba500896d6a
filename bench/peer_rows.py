"""Other implementations beside this one, on the same inputs: checked, then timed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.attention import LengthBenchmark, Plan
from bench.check import Reference, reference, relative_error
from bench.peers import SELECTORS, Call, Peer, density_of_ratio, identity, load, loaded_version
from flexprefill_fa import sparse_prefill_attention
from flexprefill_fa.loading import first_line
from flexprefill_fa.rows import Row

OURS = "flexprefill_fa"


class PeerBenchmark(LengthBenchmark):
    """All rows of one length: dense kernels, this package's selectors, then each peer of the same method.

    This package's rows are those of `LengthBenchmark`, checked against fp64 attention over the kept blocks. A peer's
    blocks are not known, so its output is held against dense attention (`dense_error`, which this package's sparse
    rows have too). It gets the same values in its own layout `[B, L, H, D]`, copied before the clock starts. Peers come
    last: one that breaks the CUDA context takes none of this package's rows of that length with it.

    Args:
        plan, length, note: as for `LengthBenchmark`.
        folder: where the peers are, None without.
        peers: what was found there; inside `importable`.
    """

    def __init__(
        self, plan: Plan, length: int, note: Callable[[str], None], folder: Path | None, peers: Sequence[Peer]
    ) -> None:
        super().__init__(plan, length, note)
        self.folder = folder
        self.peers = peers
        self.conditions["kind"] = "peers"

    def rows(self) -> Iterator[Row]:
        """The rows; one whose call or check failed has `error` and no times."""
        for row in super().rows():
            yield row if row["selector"] is None else {**row, "implementation": OURS}
        with torch.no_grad(), self._on_device():
            dense = reference(self.inputs, None)
            for peer in self.peers:
                for config in self.plan.configs:
                    if config.name == SELECTORS[peer.function]:
                        yield self._peer(peer, config, dense)

    def _on_device(self) -> Any:
        return torch.cuda.device(self.plan.device) if self.plan.device.type == "cuda" else nullcontext()

    def _selector(self, config: Any, dense: Reference) -> Iterator[Row]:
        for row in super()._selector(config, dense):
            if row["path"] == "sparse" and "error" not in row:
                out = sparse_prefill_attention(*self._tensors, config, backend=row["backend"])
                row["dense_error"] = relative_error(out[:, :, dense.positions], dense.dense)
            yield row

    def _peer(self, peer: Peer, config: Any, dense: Reference) -> Row:
        assert self.folder is not None
        row: Row = {**self.conditions, "path": "peer", "selector": config.name, "backend": None, "kernel": None}
        row |= identity(peer, self.folder)
        try:
            function = load(peer)
            row["peer_version"] = loaded_version(peer)
            call = Call(peer, function, self.inputs, config)
            row["settings"] = dict(call.settings)
            out, ratio = call.checked()
            found: Row = {"dense_error": relative_error(out[:, :, dense.positions], dense.dense)}
            del out
            if ratio is not None:
                found["computational_ratio"] = round(ratio, 5)
                found["density"] = round(density_of_ratio(ratio, self.length, config.block_size), 5)
            found |= self._peak(call)
            times = {"total_ms": self.watch.graph(call), **self._eager(call)}
            return row | found | self._timed(**times) | self._speedups(times["total_ms"])
        except (Exception, SystemExit) as error:  # somebody else's code may raise anything
            self.note(traceback.format_exc())
            return {**row, "error": f"{type(error).__name__}: {first_line(error)}"}
