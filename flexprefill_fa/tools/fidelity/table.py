"""Fidelity rows for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from flexprefill_fa.tools.fidelity.knobs import knob_fields
from flexprefill_fa.tools.reporting import settings_text
from flexprefill_fa.tools.rows import Row

_COLUMNS = (
    "text",
    "tokens",
    "selector",
    "settings",
    "density",
    "recall",
    "KL",
    "99 %",
    "loss +",
    "same top",
    "s",
    "dense s",
)
_LEFT = ("text", "selector", "settings")


def setting(row: Row) -> str:
    """The selector with its knob, and the settings that are not its usual ones."""
    usual = settings_text(row)
    knob = {f"{name}={row['settings'][name]}": None for name in knob_fields(row["selector"])}
    return " ".join([row["selector"], *dict.fromkeys([*knob, *usual.split()])])


def row_line(row: Row) -> str:
    """A row for a log."""
    return (
        f"{row['text']}, {row['length']} tokens, {setting(row)}: density {row['density']:.3f}, KL {row['kl']:.4g}, "
        f"same top token {row['same_top']:.3f}"
    )


def table(rows: Sequence[Row]) -> Table:
    """All rows of a run, for one model."""
    first = rows[0]
    found = Table(title=f"{first['model']}, {first['gpu']}, {first['dtype']}", title_justify="left")
    for name in _COLUMNS:
        found.add_column(name, justify="left" if name in _LEFT else "right")
    for row in rows:
        selector, _, settings = setting(row).partition(" ")
        recall = "-" if row["recall"] is None else f"{row['recall']:.3f}"
        numbers = [f"{row['density']:.3f}", recall, f"{row['kl']:.4g}", f"{row['kl_99']:.3g}"]
        numbers += [f"{row['loss_difference']:+.4f}", f"{row['same_top']:.3f}"]
        seconds = [f"{row['timing'][name]:.2f}" for name in ("prefill_s", "dense_prefill_s")]
        found.add_row(row["text"], str(row["length"]), selector, settings, *numbers, *seconds)
    return found
