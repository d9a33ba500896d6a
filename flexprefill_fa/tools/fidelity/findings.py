"""What a run searches beside its rows, a target or dense layers, and what it found: in words and as lines to paste."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexprefill_fa.choice import Choice
from flexprefill_fa.tools.fidelity.knobs import find_knob
from flexprefill_fa.tools.fidelity.layers import LayerSearch, search_layers
from flexprefill_fa.tools.fidelity.lines import python_lines, vllm_line
from flexprefill_fa.tools.fidelity.search import search_target
from flexprefill_fa.tools.fidelity.table import setting
from flexprefill_fa.tools.fidelity.trial import CellError, Trial
from flexprefill_fa.tools.loading import UsageError

if TYPE_CHECKING:
    from flexprefill_fa.tools.fidelity.cells import Fidelity

_SHOWN_LAYERS = 8


@dataclass(frozen=True)
class Aims:
    """What to search.

    Attributes:
        target: the largest KL in nats, None for no search.
        layers: whether to find layers that are worth keeping dense.
    """

    target: float | None
    layers: bool

    def check(self, choices: Sequence[Choice], lengths: Sequence[int]) -> None:
        """Raises `UsageError` for a target that is none, and selectors whose settings cannot be searched."""
        if self.target is not None and not 0 < self.target < math.inf:
            raise UsageError(f"target-kl must be a number of nats above 0, got {self.target}")
        if self.target is not None or self.layers:
            for choice in choices:
                find_knob(choice.config, lengths[0])


@dataclass(frozen=True)
class Advice:
    """A setting that was found, and why.

    Attributes:
        kind: "fidelity_target" or "fidelity_layers".
        why: in words.
        trial: the setting.
        length: of the texts, in tokens.
        model: the folder.
        more: further fields for JSON.
    """

    kind: str
    why: str
    trial: Trial
    length: int
    model: str
    more: dict[str, Any]

    def text(self) -> str:
        """For people: why, and the lines to paste."""
        serve = vllm_line(self.trial.choice, self.model)
        if serve is None:
            serve = "(vLLM's backend has neither mean correction nor dense layers)"
        return f"\n{self.why}\n\n{python_lines(self.trial.choice)}\n\n{serve}\n"

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        lines = {"python": python_lines(self.trial.choice), "vllm": vllm_line(self.trial.choice, self.model)}
        return {"kind": self.kind, "length": self.length, **_fields(self.trial), **self.more, **lines}


class Findings:
    """Measures settings and searches from them.

    Args:
        runner: measures.
        aims: what to search.
        model: the folder, for the lines to paste.

    Attributes:
        advice: what was found.
        failures: a line for each target that was not reached and each setting that could not be measured.
    """

    def __init__(self, runner: Fidelity, aims: Aims, model: str) -> None:
        self._runner, self._aims, self._model = runner, aims, model
        self.advice: list[Advice] = []
        self.failures: list[str] = []

    def add(self, choice: Choice, length: int) -> None:
        """Measure a setting at one length, and search from it."""
        try:
            target = self._aims.target
            found = choice if target is None else self._target(choice, length, target)
            if self._aims.layers and found is not None:
                self._layers(found, length)
            elif target is None:
                self._runner.measure(choice, length)
        except CellError as error:
            self.failures.append(str(error))

    def _target(self, choice: Choice, length: int, target: float) -> Choice | None:
        search = search_target(choice, length, target, lambda tried: self._runner.measure(tried, length))
        if search.found is None:
            rounds = search.best.density > 0.9 and self._runner.dtype != "float32"
            hint = "; what is left there may be rounding: try --dtype float32" if rounds else ""
            self.failures.append(
                f"no setting of {choice.name} stays within a KL of {target:g} at {length} tokens: the best that was "
                f"reached is {_words(search.best)}{hint}"
            )
            return None
        why = f"{length} tokens, the sparsest setting within a KL of {target:g}: {_words(search.found)}"
        more = {"target_kl": target}
        self.advice.append(Advice("fidelity_target", why, search.found, length, self._model, more))
        return search.found.choice

    def _layers(self, choice: Choice, length: int) -> None:
        search = search_layers(
            choice,
            length,
            lambda tried: self._runner.measure(tried, length),
            lambda measured: self._runner.layer_densities(measured, length),
        )
        more = {
            "whole": _fields(search.whole),
            "layer_kl": {str(layer): kl for layer, kl in search.alone.items()},
            "order": list(search.order),
            "tried": [_fields(trial) for trial in search.kept.values()],
        }
        why = layers_text(search, length)
        self.advice.append(Advice("fidelity_layers", why, search.best, length, self._model, more))


def layers_text(search: LayerSearch, length: int) -> str:
    """What a search for dense layers found, in a few lines."""
    first = ", ".join(f"{layer} ({search.alone[layer]:.3g})" for layer in search.order[:_SHOWN_LAYERS])
    tried = [f"  {_words(trial)}" for trial in search.kept.values()]
    best = search.best
    if best is search.whole:
        verdict = "No dense layers are worth it at this density."
    else:
        layers = ", ".join(map(str, best.choice.dense_layers))
        saved = 1 - best.kl / search.whole.kl
        verdict = f"Worth keeping dense at this density: layers {layers}, which take {saved:.0%} off the KL."
    return "\n".join(
        [
            f"{length} tokens, {_words(search.whole)}.",
            f"Layers by the KL that each makes alone, for the blocks it leaves out: {first}.",
            "The same density with the first of them dense:" if tried else "No sparser setting pays for a dense layer.",
            *tried,
            verdict,
        ]
    )


def _fields(trial: Trial) -> dict[str, Any]:
    choice = trial.choice
    return {
        "selector": choice.name,
        "settings": dataclasses.asdict(choice.config),
        "mean_correction": choice.mean_correction,
        "dense_layers": list(choice.dense_layers),
        "density": round(trial.density, 5),
        "kl": trial.kl,
    }


def _words(trial: Trial) -> str:
    return f"{setting(_fields(trial))}: KL {trial.kl:.4g} at density {trial.density:.3f}"
