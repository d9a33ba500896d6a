"""What the latest sparse prefill kept, per layer and head: copied from the devices once, then shown or drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexprefill_fa.masks import FlexPrefillConfig
from flexprefill_fa.masks.selector import SHARED_HEADS
from flexprefill_fa.validation import check_integer, check_number

if TYPE_CHECKING:
    from .hf_plan import LayerStatistics

FIELDS = ("density", "js_distance", "recall")
"""What a heat map can show."""

_TITLES = {
    "density": "density, kept / causal blocks",
    "js_distance": "Jensen-Shannon distance",
    "recall": "recall",
}


@dataclass(frozen=True, repr=False, eq=False)
class PrefillStatistics:
    """What a prefill kept; float32 and bool `[layers, batch, heads]` on the CPU.

    `heads` is the largest number of query heads of any layer: where a layer has fewer, its last entries are NaN
    (False in `query_aware`).

    Attributes:
        layers: the model's layer index of each row, ascending.
        selectors: the name of each layer's selector.
        density: kept blocks / causal blocks.
        js_distance: FlexPrefill's Jensen-Shannon distance; NaN where it is not defined, 0 where no test was made
            (another selector, or a prompt that is dense because it is short).
        query_aware: whether FlexPrefill found the head query-aware; False where no test was made.
        recall: share of the exact attention probability in kept blocks, NaN for layers that did not collect it; None
            if none did.
    """

    layers: tuple[int, ...]
    selectors: tuple[str, ...]
    density: Tensor
    js_distance: Tensor
    query_aware: Tensor
    recall: Tensor | None

    @classmethod
    def gather(
        cls, latest: Mapping[int, LayerStatistics], tau: Mapping[int, float | None], selectors: Mapping[int, str]
    ) -> PrefillStatistics:
        """Bring the layers' statistics to the CPU, with one copy for each device that holds some.

        Args:
            latest: layer index -> statistics `[B, Hq]` of its latest sparse prefill; Hq may differ between layers.
            tau: layer index -> tau of its `FlexPrefillConfig`, None for other selectors; may hold more layers.
            selectors: layer index -> the name of its selector; may hold more layers.

        Raises:
            ValueError: if `latest` is empty, a layer is missing from `tau` or `selectors` or they contradict each
                other, shapes are not `[B, Hq]`, or layers differ in the batch size.
        """
        if not latest:
            raise ValueError(
                "no sparse prefill has run since statistics were switched on: expected the statistics of at least one "
                "layer, got none; prompts shorter than min_prompt_tokens run dense and leave none"
            )
        layers = tuple(sorted(latest))
        for layer in layers:
            _check_selector(layer, tau, selectors)
            _check_shapes(layer, latest[layer], batch=latest[layers[0]].density.shape[:1], first=layers[0])
        density, js_distance, recall = _to_cpu([latest[layer] for layer in layers])
        # In fp32, as the selector compares; no distance is below the -1 of other selectors, and NaN is below no tau.
        numbers = [-1.0 if (value := tau[layer]) is None else value for layer in layers]
        taus = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        return cls(
            layers,
            tuple(selectors[layer] for layer in layers),
            density,
            js_distance,
            (js_distance < taus[:, None, None]) & _tested(density, js_distance),
            None if all(latest[layer].recall is None for layer in layers) else recall,
        )

    def __repr__(self) -> str:
        layers, batch, heads = self.density.shape
        names = "/".join(dict.fromkeys(self.selectors))
        return (
            f"PrefillStatistics({names}, layers={layers}, batch={batch}, heads={heads}, "
            f"density={_mean(self.density):.3f})"
        )

    def heads(self, layer: int) -> int:
        """The number of query heads of a layer.

        Raises:
            TypeError, ValueError: for a layer that is not in `layers`.
        """
        return int((~self.density[self._row(layer), 0].isnan()).sum())

    def pattern(self, layer: int, head: int, batch: int = 0) -> str:
        """What selected a head's blocks.

        Args:
            layer: one of `layers`. head: query head. batch: element of the batch.

        Returns:
            "query_aware" or "vertical_slash" for FlexPrefill ("vertical_slash" too where no test was made because the
            prompt is short), the selector's name for other selectors.

        Raises:
            TypeError, ValueError: for a layer, head or element that is not there.
        """
        row = self._row(layer)
        for name, value, count in (("head", head, self.heads(layer)), ("batch", batch, self.density.shape[1])):
            check_integer(name, value, 0)
            if value >= count:
                raise ValueError(f"{name} must be below {count} in layer {layer}, got {value}")
        if not is_flexprefill(self.selectors[row]):
            return self.selectors[row]
        return "query_aware" if self.query_aware[row, batch, head] else "vertical_slash"

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per layer and head, ready for JSON.

        Returns:
            "layer", "head" and "selector"; and lists with one entry per element of the batch: "density", "pattern"
            (see `pattern`), "js_distance" (None where it is not defined or no test was made) and, if any layer
            collected it, "recall" (None for a layer that did not).
        """
        distances = self._values("js_distance", self.js_distance)
        return [
            {
                "layer": layer,
                "head": head,
                "selector": self.selectors[row],
                "density": self.density[row, :, head].tolist(),
                "pattern": [self.pattern(layer, head, batch) for batch in range(self.density.shape[1])],
                "js_distance": _json(distances[row, :, head]),
                **({} if self.recall is None else {"recall": _json(self.recall[row, :, head])}),
            }
            for row, layer in enumerate(self.layers)
            for head in range(self.heads(layer))
        ]

    def table(self) -> str:
        """Text to print: one row per layer, over its heads and the batch; "-" where there is nothing to show.

        Density has its mean, lowest and highest value; the JS distance and the recall, which has a column if any layer
        collected it, their means. Query-aware heads are counted in every element of the batch. Selectors have a column
        if the layers differ in them.
        """
        mixed = len(set(self.selectors)) > 1
        names = ["layer", *(["selector"] if mixed else [])]
        names += ["density", "lowest", "highest", "query-aware heads", "JS distance"]
        lines = [names + ([] if self.recall is None else ["recall"])]
        distances = self._values("js_distance", self.js_distance)
        for row, (layer, selector) in enumerate(zip(self.layers, self.selectors, strict=True)):
            kept = self.density[row, :, : self.heads(layer)]
            aware = f"{int(self.query_aware[row].sum())} of {kept.numel()}"
            cells = [str(layer), *([selector] if mixed else [])]
            cells += [f"{value:.3f}" for value in (_mean(kept), kept.min().item(), kept.max().item())]
            cells += [aware if is_flexprefill(selector) else "-", _number(_mean(distances[row]))]
            if self.recall is not None:
                cells.append(_number(_mean(self.recall[row])))
            lines.append(cells)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.rjust, cells, widths)) for cells in lines]
        return "\n".join([f"Per layer, batch {self.density.shape[1]}", *rows])

    def save_heat_map(self, path: str | PathLike[str], field: str = "density") -> Path:
        """Draw one field as a PNG, heads on x and layers on y, the mean over the batch in each cell.

        A dot marks a head that is query-aware in any element of the batch; cells without a value are grey. The figure
        grows with the number of layers and heads. Density and JS distance are drawn from 0 to the highest value,
        recall from the lowest value to 1.

        Args:
            path: of the file, whatever its suffix.
            field: one of `FIELDS`.

        Returns:
            The path.

        Raises:
            ValueError: for an unknown field, or one without any value in this prefill.
            ImportError: without matplotlib, which the extra `bench` brings.
        """
        if field not in FIELDS:
            raise ValueError(f"field must be one of {FIELDS}, got {field!r}")
        values = getattr(self, field)
        if values is None:
            raise ValueError(
                "field 'recall' needs a prefill with statistics='recall', got one that collected no recall"
            )
        values = self._values(field, values).nanmean(1)
        if values.isnan().all():
            raise ValueError(
                f"field {field!r} needs a value in at least one head, got none: layers ran "
                f"{', '.join(dict.fromkeys(self.selectors))}"
            )
        return _draw(Path(path), values, self.query_aware.any(1), self.layers, _TITLES[field], _limits(field, values))

    def _row(self, layer: int) -> int:
        check_integer("layer", layer, 0)
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {self.layers}, got {layer}")
        return self.layers.index(layer)

    def _values(self, field: str, values: Tensor) -> Tensor:
        """A field's values, NaN where a JS distance stands for no test."""
        if field != "js_distance":
            return values
        flex = torch.tensor([is_flexprefill(selector) for selector in self.selectors], device="cpu")
        tested = _tested(self.density, values) & flex[:, None, None]
        return values.masked_fill(~tested, math.nan)


def is_flexprefill(selector: str) -> bool:
    """Whether a selector of this name tests heads as FlexPrefill does, each alone or those of a key head together."""
    return selector.removesuffix(SHARED_HEADS) == FlexPrefillConfig.name


def _check_selector(layer: int, tau: Mapping[int, float | None], selectors: Mapping[int, str]) -> None:
    for name, given in (("tau", tau), ("selectors", selectors)):
        if layer not in given:
            raise ValueError(f"{name} must have every layer of latest: expected layer {layer}, got {sorted(given)}")
    value, selector = tau[layer], selectors[layer]
    if (value is not None) != is_flexprefill(selector):
        raise ValueError(
            f"layer {layer}: tau must be a number for {FlexPrefillConfig.name!r} and None for other selectors, "
            f"got {value!r} for {selector!r}"
        )
    if value is not None:
        check_number(f"tau of layer {layer}", value, 0, 1)


def _check_shapes(layer: int, kept: LayerStatistics, *, batch: tuple[int, ...], first: int) -> None:
    shape = tuple(kept.density.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"layer {layer}: density must have shape [batch, heads], got {shape}")
    for name, values in (("js_distance", kept.js_distance), ("recall", kept.recall)):
        if values is not None and values.shape != kept.density.shape:
            raise ValueError(f"layer {layer}: {name} must have the shape of density {shape}, got {tuple(values.shape)}")
    if shape[:1] != batch:
        raise ValueError(
            f"layers must have run the same batch: expected batch {batch[0]} of layer {first}, got {shape[0]} of "
            f"layer {layer}"
        )


def _to_cpu(kept: list[LayerStatistics]) -> Tensor:
    """The `FIELDS` as float32 `[3, layers, batch, heads]` on the CPU, NaN where there is none."""
    batch, heads = kept[0].density.shape[0], max(layer.density.shape[1] for layer in kept)
    parts: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
    for row, layer in enumerate(kept):
        for number, name in enumerate(FIELDS):
            values: Tensor | None = getattr(layer, name)
            if values is not None:
                parts.setdefault(values.device, []).append((number, row, values))
    result = torch.full((len(FIELDS), len(kept), batch, heads), math.nan, dtype=torch.float32, device="cpu")
    for found in parts.values():
        together = torch.cat([values.flatten() for _, _, values in found]).cpu()
        pieces = together.split([values.numel() for _, _, values in found])
        for (number, row, values), piece in zip(found, pieces, strict=True):
            result[number, row, :, : values.shape[1]] = piece.view(values.shape)
    return result


def _tested(density: Tensor, js_distance: Tensor) -> Tensor:
    """bool `[layers, batch, 1]`: whether heads were tested for their pattern.

    They were not where every head has a distance of 0 and either every block (the element is dense because it is short)
    or none (it has no real token). NaN are heads that a layer does not have, or distances that are not defined.
    """
    all_or_nothing = (js_distance == 0) & ((density == 1) | (density == 0))
    return ~(all_or_nothing | density.isnan()).all(-1, keepdim=True)


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _json(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _limits(field: str, values: Tensor) -> tuple[float, float]:
    """The ends of the colour bar; never the same number."""
    known = values[~values.isnan()]
    if field == "recall":
        return min(known.min().item(), 0.99), max(known.max().item(), 1.0)
    return 0.0, known.max().item() or 1.0


def _draw(
    path: Path, values: Tensor, marked: Tensor, layers: tuple[int, ...], title: str, limits: tuple[float, float]
) -> Path:
    """Write the heat map of values `[layers, heads]`, with a dot where marked."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it
    except ImportError as error:
        raise ImportError("save_heat_map needs matplotlib: pip install 'flexprefill-fa[bench]'") from error
    rows, heads = values.shape
    cell = min(max(8 / max(rows, heads), 0.16), 0.4)  # inches
    # Without pyplot there is no window, and the caller's backend stays as it is. The map fills the figure, and saving
    # with a tight box adds the room for what stands around it.
    figure = Figure(figsize=(cell * heads, cell * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values.numpy(), vmin=limits[0], vmax=limits[1], interpolation="nearest")
    row, head = marked.nonzero().T.tolist()
    axes.scatter(head, row, s=(26 * cell) ** 2, color="white", edgecolors="black", linewidths=0.6)
    step = math.ceil(0.3 / cell)  # room for a number
    axes.set_xticks(range(0, heads, step))
    axes.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]])
    axes.tick_params(labelsize=8)
    axes.set_title(title, size=10, loc="left")
    axes.set(xlabel="head (dot: query-aware)" if head else "head", ylabel="layer")
    inch = 1 / (cell * heads)  # of the map's width
    figure.colorbar(image, cax=axes.inset_axes((1 + 0.15 * inch, 0, 0.15 * inch, 1)))
    figure.savefig(path, format="png", dpi=130, bbox_inches="tight")
    return path
