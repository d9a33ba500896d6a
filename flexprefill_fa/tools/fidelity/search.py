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

    The densest setting comes first: where even that is too far, no other is tried. Then the interval between a place
    that is within and one that is not shrinks, by a line through the logarithms of their KLs, or by half.

    Args:
        choice: the selector; all settings but the knob stay.
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
    densest: float | None = None,
) -> list[Trial]:
    """Try settings of a knob until one's excess is in [near, 0], or two neighbours have it between them.

    Args:
        choice, length, measure: as for `search_target`.
        excess: of a trial; falls from the sparsest to the densest setting.
        near: the excess, below 0, that is near enough.
        densest: the excess of the densest setting where it is known; it is then not tried.

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

    high, below = 1.0, at(1.0) if densest is None else densest
    low, above = 0.0, None  # nothing is known of the sparsest setting
    if below >= near:
        return list(trials.values())
    while len(trials) < _MOST_TRIALS and high - low > 1e-3:
        middle = (low + high) / 2
        place = middle
        if above is not None:  # aim at the middle of what is near enough
            share = (above - near / 2) / (above - below)
            place = low + min(0.9, max(0.1, share)) * (high - low)
        place = place if new(place) else middle
        if not new(place):  # a knob of whole numbers has no place between
            break
        value = at(place)
        if near <= value <= 0:
            return list(trials.values())
        if value > 0:
            low, above = place, value
        else:
            high, below = place, value
    if above is None:
        at(0.0)
    return list(trials.values())
