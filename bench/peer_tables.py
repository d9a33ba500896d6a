"""Rows of `python -m bench peers` as text: tables for the README and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from bench.peer_rows import OURS
from bench.report import number
from bench.tables import KERNEL_NAMES, caption, markdown_table
from flexprefill_fa.rows import Row, latest

_GROUP_KEYS = ("device", "gpu", "batch", "heads", "kv_heads", "head_dim", "dtype", "workload", "layer")
_YARDSTICK = {"cuda": "sdpa_flash", "cpu": "sdpa"}


def peer_tables(rows: Iterable[Row]) -> str:
    """One table for each processor, shape and workload; empty without rows."""
    groups: dict[str, list[Row]] = {}
    for row in latest(rows, _measured):
        groups.setdefault(json.dumps([row.get(key) for key in _GROUP_KEYS]), []).append(row)
    return "\n\n".join(_table(group) for group in groups.values())


def peer_line(row: Row) -> str:
    """A row for a log."""
    who = f"{row['length']} tokens, {_who(row)}"
    if row["selector"] is not None:
        who += f", {row['selector']}"
    return f"{who}: WRONG: {row['error']}" if "error" in row else f"{who}: {number(row.get('total_ms'), '.3f')} ms"


def _measured(row: Row) -> str:
    """What tells one measurement from another; a later row of the same takes an earlier one's place.

    A peer's settings are left out where it failed before it had any: the row that follows a repair replaces that one.
    """
    names = [*_GROUP_KEYS, "length", "selector", "backend", "implementation", "module", "function"]
    kernel = row["kernel"] if row["selector"] is None else None
    settings = row.get("settings") if row["path"] != "peer" else None
    return json.dumps([kernel, settings, *(row.get(name) for name in names)])


def _table(group: Sequence[Row]) -> str:
    yardstick = _YARDSTICK[group[0]["device"]]
    header = ["tokens", "method", "implementation", "density", "error against dense", "total ms", "wall clock ms"]
    header += [f"x {KERNEL_NAMES[yardstick]}", "x best dense", "timed by"]
    shown = [row for row in group if row["selector"] is None or row["path"] == "peer" or row["backend"] != "auto"]
    order = {name: place for place, name in enumerate(dict.fromkeys(row["selector"] for row in shown))}
    shown.sort(key=lambda row: (row["length"], order[row["selector"]]))
    lines = [_line(row, yardstick) for row in shown]
    what = "each implementation on the same values, selection included"
    return f"{caption(shown, what)}\n\n{markdown_table(header, lines)}\n\n{_notes(shown)}".rstrip()


def _line(row: Row, yardstick: str) -> list[str]:
    cells = [f"{row['length']:,}", row["selector"] or "dense", _who(row)]
    if "error" in row:
        # A table cell holds one line without bars.
        return [*cells, "-", "-", f"error: {row['error']}".replace("|", "/"), "-", "-", "-", "-"]
    error = row["check_error"] if row["selector"] is None else row.get("dense_error")
    cells += [number(row.get("density"), ".3f"), number(error, ".2g")]
    cells += [_milliseconds(row.get(name)) for name in ("total_ms", "total_eager_ms")]
    cells += [_times(row.get(name)) for name in (f"speedup_{yardstick}", "speedup_best_dense")]
    return [*cells, row["timed_by"]["total_ms"]]


def _notes(rows: Sequence[Row]) -> str:
    """Settings and origin of what the table compares, each once."""
    notes = []
    for row in rows:
        if row["selector"] is None:
            continue
        settings = row.get("settings")
        if row["path"] != "peer":
            who = f"{OURS}, {row['selector']}"
        else:
            version = f" {row['peer_version']}" if row["peer_version"] else ""
            who = f"{row['implementation']}{version}, `{row['module']}.{row['function']}`"
            who += f", digest {row['peer_digest']}"
        notes.append(f"- {who}: {_settings(settings) if settings else 'not called'}")
    return "\n".join(dict.fromkeys(notes))


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _who(row: Row) -> str:
    if row["selector"] is None:
        return KERNEL_NAMES[row["kernel"]]
    if row["path"] == "peer":
        return str(row["implementation"])
    return f"{OURS} {row['backend']}" + (f" (dense {row['kernel']})" if row["path"] == "dense" else "")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
