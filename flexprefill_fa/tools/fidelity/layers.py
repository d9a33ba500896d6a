"""Which few layers are worth keeping dense, at the same density of the whole model.

What a layer costs is measured with that layer alone sparse: the KL that it makes on exact inputs, divided by the share
of blocks that it leaves out. The other way round, one layer dense and all others sparse, measures small differences
between large numbers. On SmolLM2-135M (1,280 tokens, fp32, FlashPrefill, KL 0.12) both ways put the same layers first,
18 and 20 of 30, and these two dense take 71 % off the KL at equal density; but five others seemed to do harm when
dense, one of them by 0.007. Rounding is in every KL: in bf16 it hides layers that cost little.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexprefill_fa.choice import Choice
from flexprefill_fa.tools.fidelity.search import bracket
from flexprefill_fa.tools.fidelity.trial import Trial
from flexprefill_fa.tools.loading import UsageError

_COUNTS = (1, 2, 4)
_NEAR = 0.98  # of the density without dense layers


@dataclass(frozen=True)
class LayerSearch:
    """What a search came to.

    Attributes:
        whole: the setting without more dense layers.
        alone: layer -> the KL that it makes alone.
        order: layers, those first that are worth most per block.
        kept: for each number of layers, the setting with so many dense and no more density than `whole`; a number is
            missing where no setting of the knob is sparse enough to pay for them.
    """

    whole: Trial
    alone: dict[int, float]
    order: tuple[int, ...]
    kept: dict[int, Trial]

    @property
    def best(self) -> Trial:
        """The lowest KL; `whole` where no dense layers bring any."""
        return min((self.whole, *self.kept.values()), key=lambda trial: trial.kl)


def search_layers(
    choice: Choice,
    length: int,
    measure: Callable[[Choice], Trial],
    densities: Callable[[Choice], Mapping[int, float]],
) -> LayerSearch:
    """Find layers to keep dense, and the setting of the knob that pays for them.

    Args:
        choice: the setting to compare with.
        length: of the texts, in tokens.
        measure: what a setting comes to.
        densities: of a setting's layers, those that are dense as asked included.

    Raises:
        UsageError: for a model of which only one layer runs sparse, or a selector without a knob.
    """
    whole = measure(choice)
    density = densities(choice)
    last = max(density)
    asked = {layer % (last + 1) for layer in choice.dense_layers}
    layers = [layer for layer in density if layer not in asked]
    if len(layers) < 2:
        raise UsageError(f"dense layers can be searched among at least 2 sparse layers, got {len(layers)}")
    alone = {layer: measure(_with_dense(choice, {*density} - {layer})).kl for layer in layers}
    order = sorted(layers, key=lambda layer: alone[layer] / max(1 - density[layer], 1e-6), reverse=True)
    kept = {}
    for count in _COUNTS:
        if count >= len(layers) or whole.density >= 1:
            break
        some = _with_dense(choice, asked | {*order[:count]})
        aim = _NEAR * whole.density

        def excess(trial: Trial, aim: float = aim) -> float:
            return math.log(aim / trial.density)

        tried = bracket(some, length, measure, excess, math.log(_NEAR))
        fitting = [trial for trial in tried if trial.density <= whole.density]
        if fitting:
            kept[count] = max(fitting, key=lambda trial: trial.density)
    return LayerSearch(whole, alone, tuple(order), kept)


def _with_dense(choice: Choice, layers: set[int]) -> Choice:
    return dataclasses.replace(choice, dense_layers=tuple(sorted(layers)))
