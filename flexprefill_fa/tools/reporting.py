"""Measurements as tables for people and as plain dictionaries for `--json`."""

from __future__ import annotations

import dataclasses
import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexprefill_fa import __version__
from flexprefill_fa.masks import get_selector
from flexprefill_fa.mean_correction import MeanCorrection

if TYPE_CHECKING:
    from flexprefill_fa.tools.generation import Measurement


_LOG_WIDTH = 140  # of the table where there is no terminal


def open_console(*, stderr: bool) -> Console:
    """A console on stdout or stderr."""
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else _LOG_WIDTH
    return Console(stderr=stderr, highlight=False, width=wide)


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    processor = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": str(device),
        "processor": processor,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "flexprefill_fa": __version__,
    }


def selector_settings(config: Any) -> dict[str, Any]:
    """The name of a selector and its config's fields."""
    return {"selector": config.name, **dataclasses.asdict(config)}


def selector_text(config: Any, correction: MeanCorrection) -> str:
    """A selector, and what is not usual about it."""
    row = {"selector": config.name, "settings": dataclasses.asdict(config), "dense_layers": []}
    return f"{config.name} {settings_text(row | {'mean_correction': correction})}".strip()


def inspection_facts(model: str, prompt_file: str, config: Any, conditions: dict[str, Any]) -> dict[str, str]:
    """What the head of an inspection's page says about its origin, by name."""
    settings = selector_settings(config)
    selector = settings.pop("selector")
    return {
        "model": model,
        "prompt": "standard input" if prompt_file == "-" else prompt_file,
        "selector": selector,
        **{name: "none" if value is None else str(value) for name, value in settings.items()},
        "device": conditions["processor"],
        "dtype": conditions["dtype"],
        **{name: conditions[name] for name in ("torch", "transformers", "flexprefill_fa")},
    }


def changed_settings(selector: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a row's settings that are not the selector's usual ones."""
    usual = dataclasses.asdict(get_selector(selector)()) if settings else {}
    return {name: value for name, value in settings.items() if value != usual[name]}


def settings_text(row: dict[str, Any]) -> str:
    """Those of a row's settings that are not the selector's usual ones, with mean correction and dense layers."""
    shown = [f"{name}={value}" for name, value in changed_settings(row["selector"], row["settings"]).items()]
    if correction := row["mean_correction"]:
        shown.append("mean_correction" if correction is True else f"mean_correction={correction}")
    shown += [f"dense_layers={'/'.join(map(str, row['dense_layers']))}"] if row["dense_layers"] else []
    return " ".join(shown)


def measurement_fields(measurement: Measurement) -> dict[str, Any]:
    """The numbers of a measurement; those that only sparse prefill has are left out for dense."""
    fields: dict[str, Any] = {"token_ids": measurement.token_ids, "prefill_seconds": measurement.prefill_seconds}
    if measurement.compile_seconds is not None:
        fields["compile_seconds"] = measurement.compile_seconds
        fields["density"] = measurement.density
        fields["layers"] = [dataclasses.asdict(layer) for layer in measurement.layers]
    return fields


def speedup(dense: Measurement, sparse: Measurement) -> float:
    """Dense prefill time / sparse prefill time."""
    return dense.prefill_seconds / sparse.prefill_seconds


def result_table(
    title: str, sparse: Measurement, dense: Measurement | None = None, answers: dict[str, Text] | None = None
) -> Table:
    """One row per way of answering.

    Args:
        title: of the table.
        sparse, dense: the measurements; the speed-up column is there when both are.
        answers: short answers by "dense" and "sparse", for a column of their own.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("prefill")
    if answers:
        table.add_column("answer")
    for name in ("seconds", "compile s", "density", *(("speed-up",) if dense else ())):
        table.add_column(name, justify="right")
    for name, measurement in (("dense", dense), ("sparse", sparse)):
        if measurement is None:
            continue
        cells: list[str | Text] = [name, *([answers[name]] if answers else [])]
        cells += [f"{measurement.prefill_seconds:.2f}", _number(measurement.compile_seconds, ".1f")]
        cells.append(_number(measurement.density, ".3f"))
        if dense:
            cells.append(f"{speedup(dense, measurement):.2f}x")
        table.add_row(*cells)
    return table


def layer_table(measurement: Measurement) -> Table:
    """Density and, where it was measured, recall of each layer."""
    table = Table(title="Per layer", title_justify="left")
    for name in ("layer", "density", "recall", "recall of the worst head"):
        table.add_column(name, justify="right")
    for layer in measurement.layers:
        table.add_row(
            str(layer.layer), f"{layer.density:.3f}", _number(layer.recall, ".3f"), _number(layer.lowest_recall, ".3f")
        )
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
