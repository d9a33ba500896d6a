"""Searches over a selector's knob against costs that are known, and the lines that say what was found."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from typing import Any

import needs
import pytest
import torch
from hf_models import tiny_model

from flexprefill_fa import FlashPrefillConfig, FlexPrefillConfig, StreamingLLMConfig
from flexprefill_fa.choice import Choice, parse_choice
from flexprefill_fa.integrations.vllm_config import read_settings
from flexprefill_fa.masks import get_selector
from flexprefill_fa.tools.fidelity import knobs
from flexprefill_fa.tools.fidelity.findings import Aims, layers_text
from flexprefill_fa.tools.fidelity.knobs import find_knob
from flexprefill_fa.tools.fidelity.layers import search_layers
from flexprefill_fa.tools.fidelity.lines import python_lines, vllm_line
from flexprefill_fa.tools.fidelity.search import search_target
from flexprefill_fa.tools.fidelity.trial import Trial
from flexprefill_fa.tools.loading import UsageError

LENGTH = 16384
PLACES = [place / 20 for place in range(21)]


@pytest.mark.parametrize("name", ["flexprefill", "flashprefill", "streaming_llm", "vertical_slash"])
def test_knobs_go_from_sparse_to_dense(name: str) -> None:
    config: Any = get_selector(name)()
    knob = find_knob(config, LENGTH)
    turned = [knob.turn(config, place) for place in PLACES]
    values = [getattr(each, knob.fields[0]) for each in turned]
    assert values == sorted(values, reverse=name == "flashprefill") and len(set(values)) > 15
    densities = [each.expected_density(LENGTH) for each in turned]
    if name in ("streaming_llm", "vertical_slash"):  # known from geometry
        assert densities == sorted(densities) and densities[0] < 0.05 and densities[-1] == 1
    for each in turned:
        assert dataclasses.replace(each, **{field: getattr(config, field) for field in knob.fields}) == config
        assert len({getattr(each, field) for field in knob.fields}) == 1
        assert eval(repr(values[-1])) == values[-1]


def test_a_selector_names_its_own_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peak:
        name, block_size, sweep = "peak", 128, {"peak": (0.3, 0.1)}

    kinds = {"peak": Peak}
    monkeypatch.setattr(knobs, "get_selector", lambda name: kinds[name])
    assert find_knob(Peak(), LENGTH).fields == ("peak",)
    assert find_knob(Peak(), LENGTH).value(0.5) == 0.01
    monkeypatch.setattr(Peak, "sweep", {"count": (2, 8, 32)})
    assert [find_knob(Peak(), LENGTH).value(place) for place in (0, 0.25, 0.5, 1)] == [2, 4, 8, 32]
    monkeypatch.setattr(Peak, "sweep", {"colour": (0.5, 0.1)})
    assert [find_knob(Peak(), LENGTH).value(place) for place in (0, 1)] == [0.5, 0.1]
    monkeypatch.setattr(Peak, "sweep", {})
    with pytest.raises(UsageError, match="selector peak has no setting"):
        Aims(0.1, False).check([Choice(Peak())], [LENGTH])
    Aims(None, False).check([Choice(Peak())], [LENGTH])


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_targets_that_are_none(target: float) -> None:
    with pytest.raises(UsageError, match="target-kl must be a number of nats above 0, got"):
        Aims(target, False).check([], [LENGTH])


class Model:
    """Stands for one: KL and density are functions of the setting."""

    def __init__(self, kl: Callable[[Choice], float], density: Callable[[Choice], float]) -> None:
        self.kl, self.density = kl, density
        self.tried: list[Choice] = []

    def measure(self, choice: Choice) -> Trial:
        assert choice not in self.tried, "measured twice"
        self.tried.append(choice)
        return Trial(choice, self.density(choice), self.kl(choice))


def alpha_of(choice: Choice) -> float:
    config = choice.config
    assert isinstance(config, FlashPrefillConfig)
    return config.alpha


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [0.3, 0.03, 0.003])
def test_the_setting_is_just_within_the_target(target: float, power: float) -> None:
    model = Model(lambda choice: 0.8 * alpha_of(choice) ** power, lambda choice: alpha_of(choice) ** -0.1 / 3)
    start = parse_choice("flashprefill:sink_blocks=1+mean_correction=true+dense_layers=0/3")
    search = search_target(start, LENGTH, target, model.measure)
    assert model.tried[0] == start
    if 0.8 * 1e-4**power > target:
        assert search.found is None and len(model.tried) == 4
        assert alpha_of(search.best.choice) == 1e-4
        assert search.best.kl == pytest.approx(0.8 * 1e-4**power)
        return
    found = search.found
    assert found is not None and 0.92 * target < found.kl <= target
    assert found.choice == dataclasses.replace(
        start, config=dataclasses.replace(start.config, alpha=alpha_of(found.choice))
    )
    assert len(model.tried) <= 5, "a line through logarithms is exact for a power"
    assert found.density == min(model.density(choice) for choice in model.tried if model.kl(choice) <= target)


# Power and target of the test below -> cells asked and the sum of their densities where the densest comes first.
DENSEST_FIRST = {
    (0.5, 0.3): (5, 1.88), (0.5, 0.03): (3, 1.94), (1.0, 0.3): (6, 1.97), (1.0, 0.03): (4, 1.80),
    (1.0, 0.003): (3, 1.80), (2.0, 0.3): (7, 2.07), (2.0, 0.03): (5, 1.87), (2.0, 0.003): (4, 1.77),
}  # fmt: skip


def test_a_search_from_the_usual_setting_asks_less_than_one_from_the_densest() -> None:
    asked = []
    for (power, target), (_, dense_cost) in DENSEST_FIRST.items():
        model = Model(
            lambda choice, power=power: 0.8 * alpha_of(choice) ** power,
            lambda choice: min(1.0, alpha_of(choice) ** -0.25 / 9),
        )
        search = search_target(parse_choice("flashprefill"), LENGTH, target, model.measure)
        assert search.found is not None and 0.92 * target < search.found.kl <= target
        asked.append(len(model.tried))
        assert sum(map(model.density, model.tried)) < dense_cost
    assert sum(asked) <= 27 < sum(cells for cells, _ in DENSEST_FIRST.values())


@pytest.mark.parametrize("name", ["flexprefill", "flashprefill", "peakprefill", "streaming_llm", "vertical_slash"])
def test_where_a_knob_stands(name: str) -> None:
    config: Any = get_selector(name)()
    knob = find_knob(config, LENGTH)
    assert knob.turn(config, knob.place(config)) == config
    for place in PLACES:
        turned = knob.turn(config, place)
        assert knob.turn(config, knob.place(turned)) == turned and knob.place(turned) <= place + 1e-9
    short = find_knob(config, 256)
    if name in ("streaming_llm", "vertical_slash"):
        assert short.place(config) == 1.0 and getattr(short.turn(config, 1.0), short.fields[0]) == 256


def test_a_search_that_begins_beyond_the_knob() -> None:
    """A window longer than the text: its densest setting, then sparser ones."""
    model = Model(lambda choice: 1.0 if choice.config.window < 512 else 0.001, lambda choice: choice.config.window)
    search = search_target(parse_choice("streaming_llm"), 1024, 0.03, model.measure)
    assert search.found is not None and search.found.choice.config.window == 512
    assert model.tried[0].config.window == 1024


def test_the_sparsest_setting_may_be_within_the_target() -> None:
    model = Model(lambda choice: 0.01 * alpha_of(choice), lambda choice: 1 - alpha_of(choice) / 2)
    search = search_target(parse_choice("flashprefill"), LENGTH, 0.03, model.measure)
    assert search.found is not None and alpha_of(search.found.choice) == 1.0
    assert len(model.tried) <= 3


def test_knobs_of_whole_blocks_end_at_neighbours() -> None:
    def window(choice: Choice) -> int:
        config = choice.config
        assert isinstance(config, StreamingLLMConfig)
        return config.window

    model = Model(lambda choice: 1.0 if window(choice) < 1280 else 0.001, lambda choice: window(choice) / LENGTH)
    search = search_target(parse_choice("streaming_llm"), LENGTH, 0.03, model.measure)
    assert search.found is not None and window(search.found.choice) == 1280
    assert {window(choice) % 128 for choice in model.tried} == {0}


def test_costs_that_are_not_monotone_give_the_sparsest_of_what_was_tried() -> None:
    def kl(choice: Choice) -> float:
        return 0.8 * alpha_of(choice) * (1 + 0.5 * math.sin(40 * math.log(alpha_of(choice))))

    model = Model(kl, lambda choice: 1 / (1 + alpha_of(choice)))
    search = search_target(parse_choice("flashprefill"), LENGTH, 0.03, model.measure)
    assert search.found is not None and search.found.kl <= 0.03
    assert alpha_of(search.found.choice) == max(alpha_of(choice) for choice in model.tried if kl(choice) <= 0.03)


def test_exact_zeros_and_negative_roundings_are_no_trouble() -> None:
    model = Model(lambda choice: -1e-9 if alpha_of(choice) < 0.02 else 1.0, lambda choice: 1 - alpha_of(choice) / 2)
    search = search_target(parse_choice("flashprefill"), LENGTH, 0.03, model.measure)
    assert search.found is not None and 0.01 < alpha_of(search.found.choice) < 0.02


LAYERS = 6


def dense_of(choice: Choice) -> set[int]:
    return {layer % LAYERS for layer in choice.dense_layers}


def layered(costs: list[float], price: float = 1.0) -> Model:
    """KL is the sum over sparse layers; each keeps alpha ** -0.25 / 4 of its blocks."""

    def density(choice: Choice) -> float:
        return min(1.0, alpha_of(choice) ** -0.25 / 4)

    def sparse(choice: Choice) -> list[int]:
        return [layer for layer in range(LAYERS) if layer not in dense_of(choice)]

    return Model(
        lambda choice: sum(costs[layer] for layer in sparse(choice)) * alpha_of(choice) ** price,
        lambda choice: 1 - len(sparse(choice)) * (1 - density(choice)) / LAYERS,
    )


def searched(model: Model, choice: Choice) -> Any:
    def densities(measured: Choice) -> dict[int, float]:
        assert measured in model.tried
        own = min(1.0, alpha_of(measured) ** -0.25 / 4)
        return {layer: 1.0 if layer in dense_of(measured) else own for layer in range(LAYERS)}

    return search_layers(choice, LENGTH, model.measure, densities)


def test_one_costly_layer_is_found_and_paid_for() -> None:
    model = layered([0.01, 0.01, 0.01, 4.0, 0.01, 0.01])
    start = parse_choice("flashprefill:alpha=0.05")
    search = searched(model, start)
    assert search.order[0] == 3 and search.alone[3] == pytest.approx(0.2) and search.alone[0] == pytest.approx(0.0005)
    assert search.whole.kl == pytest.approx(4.05 * 0.05)
    assert search.best.choice.dense_layers == (3,) and search.best.kl < search.whole.kl / 4
    for count, trial in search.kept.items():
        assert len(trial.choice.dense_layers) == count and 3 in trial.choice.dense_layers
        assert 0.95 * search.whole.density < trial.density <= search.whole.density
        assert alpha_of(trial.choice) > 0.05, "the others pay for it"
    said = layers_text(search, LENGTH)
    assert "Worth keeping dense at this density: layers 3, which take" in said and "3 (0.2)" in said


def test_equal_layers_are_not_worth_it() -> None:
    search = searched(layered([1.0] * LAYERS, price=3.0), parse_choice("flashprefill:alpha=0.05"))
    assert search.kept and search.best is search.whole
    assert "No dense layers are worth it at this density." in layers_text(search, LENGTH)


def test_layers_that_are_dense_already_stay_so() -> None:
    start = parse_choice("flashprefill:alpha=0.05+dense_layers=0/-1")
    search = searched(layered([9.0, 0.01, 4.0, 0.01, 0.01, 9.0]), start)
    assert search.order[0] == 2 and set(search.order) == {1, 2, 3, 4}
    assert search.kept[1].choice.dense_layers == (0, 2, 5)
    with pytest.raises(UsageError, match="at least 2 sparse layers, got 1"):
        searched(layered([1.0] * LAYERS), parse_choice("flashprefill:dense_layers=0/1/2/3/4"))


def test_too_little_to_save_is_said() -> None:
    """With alpha 1 there is no sparser setting to pay with."""
    search = searched(layered([0.01, 0.01, 0.01, 4.0, 0.01, 0.01]), parse_choice("flashprefill:alpha=1"))
    assert search.kept == {} and "No sparser setting pays for a dense layer." in layers_text(search, LENGTH)


SPECS = [
    "flexprefill",
    "flexprefill:gamma=0.925+variant=paper+max_budget=4096",
    "flashprefill:alpha=0.0412+mean_correction=true",
    "streaming_llm:window=1280+dense_layers=0/1",
    "vertical_slash:vertical_size=512+slash_size=512",
]


@pytest.mark.parametrize("spec", SPECS)
@needs.mean_correction
def test_python_lines_do_what_they_say(spec: str) -> None:
    choice = parse_choice(spec)
    model = tiny_model("llama")
    given: dict[str, Any] = {"model": model}
    exec(python_lines(choice), given)
    import flexprefill_fa.integrations.transformers as integration

    (handle,) = integration.SparsePrefill.all_of(model)
    for index, plan in handle._plans.items():
        assert plan.config == (None if index in choice.dense_layers else choice.config)
        assert plan.mean_correction == choice.mean_correction
    assert python_lines(Choice(FlexPrefillConfig())).endswith(
        "\nenable_sparse_prefill(model, FlexPrefillConfig(gamma=0.95))"
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_vllm_line_is_read_back_as_the_same_setting(spec: str) -> None:
    choice = parse_choice(spec)
    line = vllm_line(choice, "/models/it's here")
    if choice.mean_correction or choice.dense_layers:
        assert line is None
        return
    assert line is not None
    words = shlex.split(line)
    assert words[:5] == ["vllm", "serve", "/models/it's here", "--attention-backend", "CUSTOM"]
    assert words[5] == "--additional-config" and len(words) == 7
    assert read_settings(json.loads(words[6])).selector == choice.config


def test_floats_are_printed_as_they_were_measured() -> None:
    knob = find_knob(FlexPrefillConfig(), LENGTH)
    for place in torch.rand(50).tolist():
        config = knob.turn(FlexPrefillConfig(), place)
        assert eval(repr(config), {"FlexPrefillConfig": FlexPrefillConfig}) == config
        assert len(repr(config.gamma)) <= 10
