"""PrefillStatistics: exact values, one copy per device, tables, rows and heat maps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from flexprefill_fa import FlexPrefillConfig, select_blocks, share_heads
from flexprefill_fa.integrations.hf_statistics import PrefillStatistics
from flexprefill_fa.integrations.transformers import LayerStatistics

NAN = math.nan


def layer(density: Any, distance: Any, recall: list[Any] | None = None) -> LayerStatistics:
    kept = torch.tensor(density)
    given = None if recall is None else torch.tensor(recall)
    return LayerStatistics(kept, torch.tensor(distance), given, (kept * 64).long())


# Batch 2. Layers 2 and 5 run FlexPrefill with 4 and 2 heads, layer 7 another selector. Values are exact in fp32.
LATEST = {
    5: layer([[0.5, 0.25], [1.0, 1.0]], [[0.0, NAN], [0.0, 0.0]], [[0.75, 0.5], [1.0, 1.0]]),
    2: layer(
        [[0.25, 0.5, 0.125, 1.0], [0.5, 0.5, 0.5, 0.5]],
        [[0.0625, 0.5, 0.125, 0.25], [0.25, 0.125, 0.0, 0.5]],
        [[0.5, 0.75, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]],
    ),
    7: layer([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]], [[0.0] * 4] * 2),
}
TAU = {2: 0.25, 5: 0.125, 7: None, 9: 0.5}
SELECTORS = {2: "flexprefill", 5: "flexprefill", 7: "flashprefill", 9: "flexprefill"}


@pytest.fixture
def statistics() -> PrefillStatistics:
    return PrefillStatistics.gather(LATEST, TAU, SELECTORS)


def uniform(layers: int, heads: int, recall: bool = False) -> PrefillStatistics:
    """Random statistics of a FlexPrefill model, batch 1."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, layers, 1, heads, generator=generator)
    latest = {
        index: LayerStatistics(
            values[0, index] ** 3, values[1, index], values[2, index] if recall else None, values[0, index].long()
        )
        for index in range(layers)
    }
    return PrefillStatistics.gather(latest, dict.fromkeys(latest, 0.2), dict.fromkeys(latest, "flexprefill"))


def cells(statistics: PrefillStatistics) -> tuple[list[Any], list[list[Any]]]:
    """Headers and rows of the table."""
    _, *lines = statistics.table().splitlines()
    assert len({len(line) for line in lines}) == 1, "columns that do not stand below each other"
    headers, *rows = [re.split(" {2,}", line.strip()) for line in lines]
    return headers, rows


def same(got: Tensor | None, expected: list[Any]) -> None:
    assert got is not None and got.dtype == torch.float32 and got.device.type == "cpu"
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_gathered_values(statistics: PrefillStatistics) -> None:
    assert statistics.layers == (2, 5, 7)
    assert statistics.selectors == ("flexprefill", "flexprefill", "flashprefill")
    pad = [NAN, NAN]
    same(
        statistics.density,
        [
            [[0.25, 0.5, 0.125, 1.0], [0.5, 0.5, 0.5, 0.5]],
            [[0.5, 0.25, *pad], [1.0, 1.0, *pad]],
            [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.75, 0.75]],
        ],
    )
    same(
        statistics.js_distance,
        [
            [[0.0625, 0.5, 0.125, 0.25], [0.25, 0.125, 0.0, 0.5]],
            [[0.0, NAN, *pad], [0.0, 0.0, *pad]],
            [[0.0] * 4, [0.0] * 4],
        ],
    )
    same(
        statistics.recall,
        [
            [[0.5, 0.75, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5]],
            [[0.75, 0.5, *pad], [1.0, 1.0, *pad]],
            [[NAN] * 4, [NAN] * 4],
        ],
    )
    # A distance of tau is not below it, NaN is below nothing, and element 1 of layer 5 is dense because it is short.
    assert statistics.query_aware.tolist() == [
        [[True, False, True, False], [False, True, True, False]],
        [[True, False, False, False], [False] * 4],
        [[False] * 4, [False] * 4],
    ]
    assert [statistics.heads(index) for index in statistics.layers] == [4, 2, 4]
    assert repr(statistics) == (
        "PrefillStatistics(flexprefill/flashprefill, layers=3, batch=2, heads=4, density=0.531)"
    )


def test_frozen(statistics: PrefillStatistics) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.layers = ()  # type: ignore[misc]


def test_without_recall() -> None:
    assert PrefillStatistics.gather({7: LATEST[7]}, TAU, SELECTORS).recall is None


def test_tau_is_compared_in_fp32() -> None:
    """As the selector does: the nearest fp32 to 0.1 is above 0.1."""
    distance = torch.tensor([[0.1, 0.0999999]])
    latest = {0: LayerStatistics(torch.full((1, 2), 0.5), distance, None, torch.ones(1, 2).long())}
    got = PrefillStatistics.gather(latest, {0: 0.1}, {0: "flexprefill"})
    assert got.query_aware[0].tolist() == (distance < 0.1).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("density", "distance", "aware"),
    [
        ([1.0, 1.0], [0.0, 0.0], [False, False]),  # dense because it is short
        ([0.0, 0.0], [0.0, 0.0], [False, False]),  # no real token
        ([1.0, 1.0], [0.0, 0.01], [True, True]),  # tested: a short element has no distance at all
        ([1.0, 0.5], [0.0, 0.0], [True, True]),  # tested: a short element keeps everything
    ],
)
def test_elements_that_were_not_tested(density: list[float], distance: list[float], aware: list[bool]) -> None:
    latest = {0: layer([density], [distance]), 1: layer([[0.5] * 3], [[0.5] * 3])}
    got = PrefillStatistics.gather(latest, dict.fromkeys(latest, 0.1), dict.fromkeys(latest, "flexprefill"))
    assert got.query_aware[0].tolist() == [[*aware, False]]


class Calls(TorchFunctionMode):
    """Counts what can bring a tensor's values to the host, by the device of the tensor."""

    READS = ("cpu", "to", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero", "copy_")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS:
            self.counts[name, str(args[0].device)] += 1
        return func(*args, **(kwargs or {}))


def test_one_copy() -> None:
    with Calls() as calls:
        PrefillStatistics.gather(LATEST, TAU, SELECTORS)
    assert calls.counts == {("cpu", "cpu"): 1}


def test_one_copy_per_device() -> None:
    """On two fake GPUs, where reading a value fails: shapes are all that gather knows before its copies."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        latest = {
            index: LayerStatistics(*(torch.empty(2, heads, device=f"cuda:{gpu}") for _ in range(4)))
            for index, (heads, gpu) in enumerate([(4, 0), (4, 0), (2, 1), (4, 1)])
        }
        with Calls() as calls:
            got = PrefillStatistics.gather(latest, dict.fromkeys(latest, 0.1), dict.fromkeys(latest, "flexprefill"))
    assert calls.counts == {("cpu", "cuda:0"): 1, ("cpu", "cuda:1"): 1}
    assert got.density.shape == got.query_aware.shape == (4, 2, 4)
    assert {tensor.device.type for tensor in (got.density, got.js_distance, got.query_aware)} == {"cpu"}


def test_patterns(statistics: PrefillStatistics) -> None:
    assert [statistics.pattern(2, head) for head in range(4)] == ["query_aware", "vertical_slash"] * 2
    assert statistics.pattern(2, 1, batch=1) == "query_aware"
    assert statistics.pattern(5, 1) == "vertical_slash", "NaN"
    assert statistics.pattern(5, 0, 1) == "vertical_slash", "dense because it is short"
    assert statistics.pattern(7, 3) == "flashprefill"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0), r"layer must be one of \(2, 5, 7\), got 3"),
        ((5, 2), "head must be below 2 in layer 5, got 2"),
        ((5, -1), "head must be at least 0, got -1"),
        ((5, 0, 2), "batch must be below 2 in layer 5, got 2"),
    ],
)
def test_heads_that_are_not_there(statistics: PrefillStatistics, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistics.pattern(*arguments)


def test_rows(statistics: PrefillStatistics) -> None:
    rows = json.loads(json.dumps(statistics.rows(), allow_nan=False))
    assert [(row["layer"], row["head"]) for row in rows] == [
        *((2, head) for head in range(4)),
        *((5, head) for head in range(2)),
        *((7, head) for head in range(4)),
    ]
    assert rows[0] == {
        "layer": 2,
        "head": 0,
        "selector": "flexprefill",
        "density": [0.25, 0.5],
        "pattern": ["query_aware", "vertical_slash"],
        "js_distance": [0.0625, 0.25],
        "recall": [0.5, 0.5],
    }
    assert rows[4]["js_distance"] == [0.0, None] and rows[5]["js_distance"] == [None, None]
    assert rows[6]["js_distance"] == rows[6]["recall"] == [None, None]
    assert rows[6]["pattern"] == ["flashprefill"] * 2
    assert "recall" not in uniform(1, 2).rows()[0]


def test_table(statistics: PrefillStatistics) -> None:
    assert cells(statistics) == (
        ["layer", "selector", "density", "lowest", "highest", "query-aware heads", "JS distance", "recall"],
        [
            ["2", "flexprefill", "0.484", "0.125", "1.000", "4 of 8", "0.227", "0.562"],
            ["5", "flexprefill", "0.688", "0.250", "1.000", "1 of 4", "0.000", "0.812"],
            ["7", "flashprefill", "0.500", "0.250", "0.750", "-", "-", "-"],
        ],
    )
    headers, rows = cells(PrefillStatistics.gather({2: LATEST[2]}, TAU, SELECTORS))
    assert "selector" not in headers and headers[-1] == "recall"
    assert rows == [["2", "0.484", "0.125", "1.000", "4 of 8", "0.227", "0.562"]]
    headers, _ = cells(uniform(2, 2))
    assert "recall" not in headers
    assert statistics.table().startswith("Per layer, batch 2\n")


@pytest.mark.parametrize(
    ("latest", "tau", "selectors", "message"),
    [
        (
            {},
            TAU,
            SELECTORS,
            "no sparse prefill has run since .* expected the statistics of at least one layer, got none",
        ),
        (LATEST, {2: 0.1, 5: 0.1}, SELECTORS, r"tau must have every layer of latest: expected layer 7, got \[2, 5\]"),
        (LATEST, TAU, {}, r"selectors must have every layer of latest: expected layer 2, got \[\]"),
        (LATEST, TAU | {5: None}, SELECTORS, "layer 5: tau must be a number for 'flexprefill' .* got None for"),
        (LATEST, TAU | {7: 0.1}, SELECTORS, "layer 7: tau must be .* and None .* got 0.1 for 'flashprefill'"),
        (LATEST, TAU | {2: 1.5}, SELECTORS, r"tau of layer 2 must be in \[0, 1\], got 1.5"),
        (
            LATEST | {5: layer([[0.5, 0.5]], [[0.5, 0.5]])},
            TAU,
            SELECTORS,
            "same batch: expected batch 2 of layer 2, got 1 of layer 5",
        ),
        ({2: layer([0.5], [0.5])}, TAU, SELECTORS, r"layer 2: density must have shape \[batch, heads\], got \(1,\)"),
        ({2: layer(0.5, 0.5)}, TAU, SELECTORS, r"layer 2: density must have shape \[batch, heads\], got \(\)"),
        ({2: layer([[]], [[]])}, TAU, SELECTORS, r"layer 2: density must have shape \[batch, heads\], got \(1, 0\)"),
        (
            {2: layer([[0.5]], [[0.5, 0.5]])},
            TAU,
            SELECTORS,
            r"layer 2: js_distance must have the shape of density \(1, 1\), got \(1, 2\)",
        ),
        (
            {2: layer([[0.5]], [[0.5]], [0.5])},
            TAU,
            SELECTORS,
            r"layer 2: recall must have the shape of density \(1, 1\), got \(1,\)",
        ),
    ],
)
def test_what_cannot_be_gathered(
    latest: dict[int, LayerStatistics], tau: dict[int, float | None], selectors: dict[int, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PrefillStatistics.gather(latest, tau, selectors)


def pixels(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (8, 8), (80, 64)])
def test_heat_map_sizes(tmp_path: Path, layers: int, heads: int) -> None:
    """Every cell has at least 20 pixels, and no picture is huge."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    assert uniform(layers, heads).save_heat_map(path) == path
    width, height = pixels(path)
    assert 20 * heads < width < 2500 and 20 * layers < height < 2500


@pytest.mark.parametrize("field", ["density", "js_distance", "recall"])
def test_heat_map_values(statistics: PrefillStatistics, tmp_path: Path, monkeypatch: Any, field: str) -> None:
    """The mean over the batch, without elements that have no value; dots on heads query-aware in any element."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

    drawn: dict[str, Any] = {}
    imshow, scatter = Axes.imshow, Axes.scatter

    def record_image(self: Any, values: Any, **settings: Any) -> Any:
        drawn.update(values=values, limits=(settings["vmin"], settings["vmax"]))
        return imshow(self, values, **settings)

    def record_dots(self: Any, x: Any, y: Any, **settings: Any) -> Any:
        drawn["dots"] = set(zip(y, x, strict=True))
        return scatter(self, x, y, **settings)

    monkeypatch.setattr(Axes, "imshow", record_image)
    monkeypatch.setattr(Axes, "scatter", record_dots)
    pixels(statistics.save_heat_map(str(tmp_path / "map"), field))
    values, limits = {
        "density": (
            [[0.375, 0.5, 0.3125, 0.75], [0.75, 0.625, NAN, NAN], [0.375, 0.375, 0.625, 0.625]],
            (0, 0.75),
        ),
        "js_distance": ([[0.15625, 0.3125, 0.0625, 0.375], [0.0, NAN, NAN, NAN], [NAN] * 4], (0, 0.375)),
        "recall": ([[0.5, 0.625, 0.375, 0.75], [0.875, 0.75, NAN, NAN], [NAN] * 4], (0.375, 1)),
    }[field]
    same(torch.from_numpy(drawn["values"]), values)
    assert drawn["limits"] == limits
    assert drawn["dots"] == {(0, 0), (0, 1), (0, 2), (1, 0)}


def test_heat_maps_that_are_refused(statistics: PrefillStatistics, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    with pytest.raises(ValueError, match=r"field must be one of \('density', 'js_distance', 'recall'\), got 'kept'"):
        statistics.save_heat_map(path, "kept")
    other = PrefillStatistics.gather({7: LATEST[7]}, TAU, SELECTORS)
    with pytest.raises(ValueError, match=r"'recall' needs a prefill with statistics='recall', got one .* no recall"):
        other.save_heat_map(path, "recall")
    with pytest.raises(ValueError, match=r"'js_distance' needs a value .* got none: layers ran flashprefill"):
        other.save_heat_map(path, "js_distance")
    assert not path.exists()


def test_heat_map_without_matplotlib(
    statistics: PrefillStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'flexprefill-fa\[bench\]'"):
        statistics.save_heat_map(tmp_path / "map.png")


def test_against_the_selector() -> None:
    """A selection's own distances and densities; the short element of the batch is not called query-aware."""
    config = FlexPrefillConfig(gamma=0.5, tau=1.0, min_budget=1, variant="paper")
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 600, 32, generator=generator), torch.randn(2, 2, 600, 32, generator=generator)
    selection = select_blocks(query, key, config, lengths=[600, 200])
    kept = LayerStatistics(selection.density(), selection.js_distance, None, selection.kept_blocks())
    for name in (config.name, share_heads(config).name):
        got = PrefillStatistics.gather({0: kept}, {0: config.tau}, {0: name})
        assert got.query_aware.tolist() == [[[True] * 4, [False] * 4]]
        assert got.pattern(0, 0) == "query_aware"
