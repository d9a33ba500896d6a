"""Public implementations, of the same methods and of others: one adapter each says how it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.peers import flashinfer, flashprefill, flashprefill_v2, flexprefill, minference, spargeattn, xattention
from bench.peers.base import Peer
from flexprefill_fa.tools.loading import UsageError

PEERS: dict[str, Peer] = {
    "flexprefill": flexprefill.PEER,
    "flashprefill": flashprefill.PEER,
    "flashprefill-v2": flashprefill_v2.PEER,
    "xattention": xattention.PEER,
    "spargeattn": spargeattn.PEER,
    "minference": minference.PEER,
    "flashinfer": flashinfer.PEER,
}
"""By the name that `--peer` takes."""


def parse_peers(texts: Sequence[str]) -> list[tuple[Peer, Path]]:
    """Peers and their folders from NAME=FOLDER; nothing is imported.

    Raises:
        UsageError: for a name that has no adapter, or a folder without its module.
    """
    found = []
    for text in texts:
        name, given, folder = text.partition("=")
        if not given or name not in PEERS:
            raise UsageError(f"peer must be NAME=FOLDER with a name of {', '.join(PEERS)}, got {text!r}")
        peer = PEERS[name]
        if not (Path(folder) / peer.file).is_file():
            raise UsageError(f"peer {name} needs a folder that holds {peer.file}, got {folder}")
        found.append((peer, Path(folder)))
    return found
