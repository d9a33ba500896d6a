"""Rows of `python -m bench ttft` as text: tables for the README and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from bench.report import number
from bench.tables import KERNEL_NAMES, VERSIONS, distinct, markdown_table
from flexprefill_fa.evaluation import ACCURACY_KIND
from flexprefill_fa.reporting import changed_settings
from flexprefill_fa.rows import Row, latest

_GROUP = ("gpu", "shape", "layers", "dtype", "ranks")
_WHAT = ("length", "chunk", "kernel", "selector", "settings", "synthetic_density", "backend")


def ttft_tables(rows: Iterable[Row], accuracy: Iterable[Row]) -> str:
    """One table for each GPU, model and number of ranks; empty without rows.

    Args:
        rows: of `python -m bench ttft`.
        accuracy: of `flexprefill eval`, for the densities that selectors come to in a trained model.
    """
    groups: dict[str, list[Row]] = {}
    for row in latest((row for row in rows if row["kind"] == "ttft"), _measured):
        groups.setdefault(_key(row, _GROUP), []).append(row)
    true = _true_densities(accuracy)
    return "\n\n".join(_table(group, true) for group in groups.values())


def ttft_line(row: Row) -> str:
    """A row for a log."""
    who = f"{row['length']} tokens, {_who(row)}{', compiled' if row['compiled'] else ''}"
    if "error" in row:
        return f"{who}: ERROR: {row['error']}"
    peak = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    return f"{who}: {row['ttft_ms']:.1f} ms{peak}"


def _key(row: Row, names: Sequence[str]) -> str:
    return json.dumps([row.get(name) for name in names])


def _measured(row: Row) -> str:
    """What tells one measurement from another; a later row of the same takes an earlier one's place."""
    return _key(row, (*_GROUP, *_WHAT, "compiled"))


def _true_densities(rows: Iterable[Row]) -> dict[str, list[float]]:
    """By selector, settings and length: the densities that the tasks of a trained model came to."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == ACCURACY_KIND and not row["mean_correction"] and row["density"] is not None:
            found.setdefault(_key(row, ("selector", "settings", "length")), []).append(row["density"])
    return found


def _table(rows: Sequence[Row], true: dict[str, list[float]]) -> str:
    header = ["tokens", "prefill", "density", "needle model's density", "first token, ms", "compiled, ms"]
    flash = any(row["kernel"] == "sdpa_flash" for row in rows)
    header += ["x SDPA", *(["x SDPA flash"] if flash else []), "x best dense", "attention", "selection", "peak GiB"]
    lines = []
    for length, chunk in sorted({(row["length"], row["chunk"]) for row in rows}, key=lambda key: (key[0], key[1] or 0)):
        here = [row for row in rows if (row["length"], row["chunk"]) == (length, chunk)]
        whole = [row for row in rows if row["length"] == length and row["selector"] is None and "error" not in row]
        others = [_uncompiled(whole, "sdpa"), *([_uncompiled(whole, "sdpa_flash")] if flash else [])]
        others.append(min((row["ttft_ms"] for row in whole), default=None))
        for name in dict.fromkeys(_key(row, _WHAT) for row in here):
            lines.append(_line([row for row in here if _key(row, _WHAT) == name], others, true))
    return f"{_caption(rows)}\n\n{markdown_table(header, lines)}"


def _uncompiled(rows: Sequence[Row], kernel: str) -> float | None:
    return next((row["ttft_ms"] for row in rows if row["kernel"] == kernel and not row["compiled"]), None)


def _line(rows: Sequence[Row], others: Sequence[float | None], true: dict[str, list[float]]) -> list[str]:
    row = rows[0]
    eager = next((row for row in rows if not row["compiled"]), {})
    compiled = next((row for row in rows if row["compiled"]), {})
    times = [found["ttft_ms"] for found in (eager, compiled) if "ttft_ms" in found]
    tokens = f"{row['length']:,}" + (f" in chunks of {row['chunk']:,}" if row["chunk"] else "")
    cells = [tokens, _who(row), number(eager.get("density", compiled.get("density")), ".3f")]
    cells.append(_range(true.get(_key(row, ("selector", "settings", "length")), [])))
    cells += [_ms(eager), _ms(compiled)]
    cells += [f"{other / min(times):.2f}x" if other and times else "-" for other in others]
    cells += [_share(eager, "attention_ms"), _share(eager, "select_ms"), number(eager.get("peak_gib"), ".1f")]
    return cells


def _who(row: Row) -> str:
    if row["selector"] is None:
        return f"dense {KERNEL_NAMES[row['kernel']]}"
    told = [f"{name} {value}" for name, value in changed_settings(row["selector"], row["settings"]).items()]
    told += ["its own choice"] if row["synthetic_density"] is None else []
    told += [row["backend"]] if row.get("backend") else []
    return ", ".join([row["selector"], *told])


def _ms(row: Row) -> str:
    if "error" in row:
        return row["error"]
    once = "" if row.get("warm_up", True) else " (one pass)"
    return f"{row['ttft_ms']:,.0f}{once}" if "ttft_ms" in row else "-"


def _share(row: Row, part: str) -> str:
    return f"{row[part] / row['ttft_ms']:.0%}" if part in row and "ttft_ms" in row else "-"


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _caption(rows: Sequence[Row]) -> str:
    row = rows[0]
    versions = ", ".join(f"{title} {distinct(rows, name)}" for name, title in VERSIONS if distinct(rows, name))
    densities = sorted({row["synthetic_density"] for row in rows if row["synthetic_density"] is not None})
    stand_in = " and ".join(f"{density:.0%}" for density in densities)
    shared = "" if row["ranks"] == 1 else f", shared by {row['ranks']} ranks (tensor parallel)"
    replaced = (
        f" Random weights have no attention pattern: each selector runs in full, and attention is then over seeded "
        f"random blocks of {stand_in} density, or what every row keeps where that is more, unless it says 'its own "
        "choice'."
        if densities
        else ""
    )
    return (
        f"**{row['shape']}, random weights**, {row['layers']} layers, {row['heads']}/{row['kv_heads']} heads, head_dim "
        f"{row['head_dim']}, {row['dtype']}{shared}; `generate` of one token.{replaced} Speed-ups by the faster of "
        "uncompiled and compiled, over uncompiled SDPA (PyTorch's choice of kernel, and its flash kernel) and over the "
        "fastest dense one; shares of the uncompiled time. "
        f"{row['gpu']}, {versions}, transformers {distinct(rows, 'transformers')}, commit {distinct(rows, 'commit')}, "
        f"{distinct(rows, 'date')}; median of {_repeats(rows)} by wall clock."
    )


def _repeats(rows: Sequence[Row]) -> str:
    counts = sorted({row["repeats"] for row in rows if "repeats" in row})
    if not counts:
        return "no passes"
    return f"{counts[0]} passes" if counts[0] == counts[-1] else f"{counts[0]} (longest prompts) to {counts[-1]} passes"
