"""Rows of `python -m bench peers` as text: tables for the documents and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from bench.attention import YARDSTICK
from bench.peer_rows import OURS
from bench.report import number
from bench.tables import GROUP_KEYS, KERNEL_NAMES, caption, markdown_table, measured, milliseconds, times
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row, latest


def peer_tables(rows: Iterable[Row]) -> str:
    """One table for each processor, shape and workload; empty without rows."""
    groups: dict[str, list[Row]] = {}
    for row in latest(rows, measured):
        groups.setdefault(json.dumps([row.get(key) for key in GROUP_KEYS]), []).append(row)
    return "\n\n".join(_table(group) for group in groups.values())


def peer_line(row: Row) -> str:
    """A row for a log."""
    who = f"{row['length']} tokens, {_who(row)}" + ("" if row["selector"] is None else f", {_method(row)}")
    return f"{who}: WRONG: {row['error']}" if "error" in row else f"{who}: {number(row.get('total_ms'), '.3f')} ms"


def _table(group: Sequence[Row]) -> str:
    yardstick = YARDSTICK[group[0]["device"]]
    header = ["tokens", "method", "implementation", "density", "error against dense", "total ms", "wall clock ms"]
    header += [f"x {KERNEL_NAMES[yardstick]}", "x best dense", "timed by"]
    named = {_place(row) for row in group if row["backend"] not in (None, "auto")}
    shown = [row for row in group if row["backend"] != "auto" or _place(row) not in named]
    order = {method: place for place, method in enumerate(dict.fromkeys(_method(row) for row in shown))}
    shown.sort(key=lambda row: (row["length"], order[_method(row)], row["path"] == "peer"))
    lines = [_line(row, yardstick) for row in shown]
    what = "each implementation on the same values, selection included"
    return f"{caption(shown, what)}\n\n{markdown_table(header, lines)}\n\n{_notes(shown)}".rstrip()


def _place(row: Row) -> tuple[int, str]:
    return row["length"], _method(row)


def _line(row: Row, yardstick: str) -> list[str]:
    cells = [f"{row['length']:,}", _method(row), _who(row)]
    if "error" in row:
        # A table cell holds one line without bars.
        return [*cells, "-", "-", f"error: {row['error']}".replace("|", "/"), "-", "-", "-", "-"]
    error = row["check_error"] if row["selector"] is None else row.get("dense_error")
    cells += [number(row.get("density"), ".3f"), number(error, ".2g")]
    cells += [milliseconds(row.get(name)) for name in ("total_ms", "total_eager_ms")]
    cells += [times(row.get(name)) for name in (f"speedup_{yardstick}", "speedup_best_dense")]
    return [*cells, row["timed_by"]["total_ms"]]


def _notes(rows: Sequence[Row]) -> str:
    """Settings and origin of what the table compares, each once."""
    notes = []
    for row in rows:
        if row["selector"] is None:
            continue
        settings = row["settings"]
        if row["path"] != "peer":
            who = f"{OURS}, {row['selector']}"
        else:
            settings = row.get("peer_settings")
            version = f" {row['peer_version']}" if row["peer_version"] else ""
            who = f"{row['implementation']}{version}, `{row['module']}.{row['function']}`"
            who += f", digest {row['peer_digest']}"
        notes.append(f"- {who}: {_settings(settings) if settings else 'not called'}")
    return "\n".join(dict.fromkeys(notes))


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _method(row: Row) -> str:
    """The selector and the settings that are not its usual ones."""
    if row["selector"] is None:
        return "dense"
    told = [f"{name} {value}" for name, value in changed_settings(row["selector"], row["settings"]).items()]
    return ", ".join([row["selector"], *told])


def _who(row: Row) -> str:
    if row["selector"] is None:
        return KERNEL_NAMES[row["kernel"]]
    if row["path"] == "peer":
        return str(row["implementation"])
    return f"{OURS} {row['backend']}" + (f" (dense {row['kernel']})" if row["path"] == "dense" else "")
