"""Time in a training run: how much is left, and how fast it goes."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch

_RESERVE = 20.0  # seconds that are kept for the last checkpoint


class OutOfTime(Exception):
    """The time that a command was given is nearly over."""


class Clock:
    """What is left of a command's time.

    Args:
        minutes: of the whole command, None without a limit.
    """

    def __init__(self, minutes: float | None):
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def require(self, seconds: float) -> None:
        """Go on only where something of so many seconds fits.

        Raises:
            OutOfTime: where it does not.
        """
        if time.monotonic() + seconds + _RESERVE > self._end:
            raise OutOfTime


class Pace:
    """How long steps take on a device that works while Python goes ahead.

    Args:
        device: of the steps.
        tokens: of one step.
    """

    def __init__(self, device: torch.device, tokens: int):
        self._device = device
        self._tokens = tokens
        self._times = [time.monotonic()]
        self._event: torch.cuda.Event | None = None
        self._shown = 0

    def step(self) -> None:
        """Note a step, and wait for the one before it, so that Python is never further ahead."""
        if self._device.type == "cuda":
            if self._event is not None:
                self._event.synchronize()
            self._event = torch.cuda.Event()
            self._event.record()
        self._times.append(time.monotonic())

    @property
    def longest(self) -> float:
        """Seconds of the longest of the last steps, the one that compiled included."""
        recent = self._times[-10:]
        return max((after - before for before, after in pairwise(recent)), default=0.0)

    def tokens_per_second(self) -> float:
        """Since this was asked last."""
        steps, seconds = len(self._times) - 1 - self._shown, self._times[-1] - self._times[self._shown]
        self._shown = len(self._times) - 1
        return steps * self._tokens / max(seconds, 1e-9)
