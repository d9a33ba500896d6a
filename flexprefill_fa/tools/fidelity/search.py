"""The sparsest setting of a selector that stays within a KL from dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from flexprefill_fa.choice import Choice
from flexprefill_fa.tools.fidelity.knobs import find_knob
from flexprefill_fa.tools.fidelity.trial import Trial

_NEAR = 0.93  # of the target: near enough to stop
_MOST_TRIALS = 14
_FIRST_STEP = 0.2  # of the knob's way
_FLOOR = 1e-12  # of a KL, which rounding makes zero or less


@dataclass(frozen=True)
class Search:
    """What a search came to.

    Attributes:
        found: the sparsest setting that was tried and is within the target; None where none is.
        best: the setting with the lowest KL that was tried.
    """

    found: Trial | None
    best: Trial


def search_target(choice: Choice, length: int, target: float, measure: Callable[[Choice], Trial]) -> Search:
    """Turn a selector's knob until the KL is just within a target.

    The choice's own setting comes first: dense ones are slow. From there steps go outward, each twice as long, until
    one place is within and one is not; where even the densest is not, none is. Then the interval between them shrinks,
    by a line through the logarithms of their KLs, or by half.

    Args:
        choice: the selector and where its knob stands; all other settings stay.
        length: of the texts, in tokens.
        target: the largest KL, in nats.
        measure: what a setting comes to.

    Raises:
        UsageError: for a selector without a knob.
    """
    trials = bracket(choice, length, measure, lambda trial: math.log(max(trial.kl, _FLOOR) / target), math.log(_NEAR))
    within = [trial for trial in trials if trial.kl <= target]
    best = min(trials, key=lambda trial: trial.kl)
    return Search(min(within, key=lambda trial: trial.density) if within else None, best)


def bracket(
    choice: Choice,
    length: int,
    measure: Callable[[Choice], Trial],
    excess: Callable[[Trial], float],
    near: float,
) -> list[Trial]:
    """Try settings of a knob until one's excess is in [near, 0], or two neighbours have it between them.

    Args:
        choice, length, measure: as for `search_target`.
        excess: of a trial; falls from the sparsest to the densest setting.
        near: the excess, below 0, that is near enough.

    Returns:
        What was tried.
    """
    knob = find_knob(choice.config, length)
    trials: dict[object, Trial] = {}

    def at(place: float) -> float:
        turned = knob.turn(choice.config, place)
        if turned not in trials:
            trials[turned] = measure(dataclasses.replace(choice, config=turned))
        return excess(trials[turned])

    def new(place: float) -> bool:
        return knob.turn(choice.config, place) not in trials

    low, above, high, below = 0.0, None, 1.0, None  # places, and the excess there where it is known
    place, step = knob.place(choice.config), _FIRST_STEP
    while len(trials) < _MOST_TRIALS:
        value = at(place)
        if near <= value <= 0:
            break
        if value > 0:
            low, above = place, value
        else:
            high, below = place, value
        if above is None or below is None:
            end = 1.0 if below is None else 0.0
            if place == end:
                break
            place = end if abs(end - place) <= step else place + math.copysign(step, end - place)
            step *= 2
            continue
        if high - low <= 1e-3:
            break
        share = (above - near / 2) / (above - below)  # aim at the middle of what is near enough
        place = low + min(0.9, max(0.1, share)) * (high - low)
        place = place if new(place) else (low + high) / 2
        if not new(place):  # a knob of whole numbers has no place between
            break
    return list(trials.values())
