"""What a setting comes to, as the searches see it."""

from __future__ import annotations

from dataclasses import dataclass

from flexprefill_fa.choice import Choice
from flexprefill_fa.tools.loading import UsageError


class CellError(UsageError):
    """One setting cannot be measured; others can."""


@dataclass(frozen=True)
class Trial:
    """A setting at one length over all texts: KL of the text that it is worst on, mean density over them."""

    choice: Choice
    density: float
    kl: float
