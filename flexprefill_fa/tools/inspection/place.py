"""What `flexprefill inspect --why` asks about."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexprefill_fa.tools.loading import UsageError


@dataclass(frozen=True)
class Place:
    """A query block of a head, and one key block or, with None, all that are kept; each counted from 0."""

    layer: int
    head: int
    query_block: int
    key_block: int | None = None


def parse_place(text: str) -> Place:
    """The place that LAYER,HEAD,QUERY_BLOCK[,KEY_BLOCK] names.

    Raises:
        UsageError: for anything else.
    """
    if not re.fullmatch(r"[0-9]+(,[0-9]+){2,3}", text):
        raise UsageError(f"why must be LAYER,HEAD,QUERY_BLOCK or LAYER,HEAD,QUERY_BLOCK,KEY_BLOCK, got {text!r}")
    return Place(*map(int, text.split(",")))
