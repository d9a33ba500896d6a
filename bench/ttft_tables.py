"""Rows of `python -m bench ttft` as text: tables for the documents and lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from bench.report import number
from bench.tables import KERNEL_NAMES, VERSIONS, distinct, markdown_table
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row, latest

_GROUP = ("gpu", "shape", "layers", "dtype", "ranks")
_WHAT = ("length", "chunk", "kernel", "selector", "settings", "synthetic_density", "backend")


def ttft_tables(rows: Iterable[Row], accuracy: Iterable[Row]) -> str:
    """One table for each GPU, model and number of ranks; empty without rows.

    Args:
        rows: of `python -m bench ttft`.
        accuracy: of `flexprefill eval`, for the densities that selectors come to in the needle model.
    """
    groups: dict[str, list[Row]] = {}
    last = latest((row for row in rows if row["kind"] == "ttft"), _measured)
    for row in last:
        groups.setdefault(_key(row, _GROUP), []).append(row)
    true = _true_densities(accuracy)
    alone = {_measured(row): row for row in last if row["ranks"] == 1}
    return "\n\n".join(_table(group, true, alone) for group in groups.values())


def first_tokens(rows: Iterable[Row], selector: str, settings: Row) -> dict[int, tuple[Row, Row]]:
    """By length: the fastest dense row, and the selector's fastest over random blocks; uncompiled, whole, on one rank.

    Of the first model and density measured; lengths without either are left out.
    """
    last = latest((row for row in rows if row["kind"] == "ttft"), _measured)
    plain = [row for row in last if row["ranks"] == 1 and not row["chunk"] and not row["compiled"]]
    plain = [row for row in plain if "error" not in row and _key(row, _GROUP) == _key(plain[0], _GROUP)]
    dense = [row for row in plain if row["selector"] is None]
    sparse = [row for row in plain if (row["selector"], row["settings"]) == (selector, settings)]
    sparse = [row for row in sparse if row["synthetic_density"] is not None]
    sparse = [row for row in sparse if row["synthetic_density"] == sparse[0]["synthetic_density"]]
    found = {}
    for length in dict.fromkeys(row["length"] for row in sparse):
        here = [[row for row in each if row["length"] == length] for each in (dense, sparse)]
        if all(here):
            found[length] = tuple(min(each, key=lambda row: row["ttft_ms"]) for each in here)
    return found


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
    """By selector, settings and length: the densities that the tasks of this checkout's needle model came to."""
    found: dict[str, list[float]] = {}
    needle = model_sha256(MODEL_DIR)
    for row in rows:
        if row["kind"] != ACCURACY_KIND or row["model_sha256"] != needle:
            continue
        if row["density"] is not None and not row["mean_correction"] and not row["dense_layers"]:
            found.setdefault(_key(row, ("selector", "settings", "length")), []).append(row["density"])
    return found


def _table(rows: Sequence[Row], true: dict[str, list[float]], alone: dict[str, Row]) -> str:
    yardsticks = _yardsticks(rows)
    shared = rows[0]["ranks"] > 1
    header = ["tokens", "prefill", "density", "needle model's density", "first token, ms", *yardsticks]
    header += [*(["x one rank"] if shared else []), "compiled, ms", "x best dense, compiled"]
    header += ["attention", "selection", "peak GiB"]
    lines = []
    for length, chunk in sorted({(row["length"], row["chunk"]) for row in rows}, key=lambda key: (key[0], key[1] or 0)):
        here = [row for row in rows if (row["length"], row["chunk"]) == (length, chunk)]
        dense = [row for row in rows if row["length"] == length and row["selector"] is None and "error" not in row]
        for name in dict.fromkeys(_key(row, _WHAT) for row in here):
            lines.append(_line([row for row in here if _key(row, _WHAT) == name], dense, yardsticks, true, alone))
    return f"{_caption(rows)}\n\n{markdown_table(header, lines)}"


def _yardsticks(rows: Sequence[Row]) -> dict[str, set[str]]:
    """By the title of their column: the dense kernels whose fastest is compared with, uncompiled."""
    kernels = {row["kernel"] for row in rows if row["selector"] is None}
    found = {"x SDPA": {"sdpa"}}
    if "sdpa_flash" in kernels:
        found["x SDPA flash"] = {"sdpa_flash"}
    if kernels - {"sdpa"}:  # else the best one is SDPA, which has its column
        found["x best dense"] = kernels
    return found


def _line(
    rows: Sequence[Row],
    dense: Sequence[Row],
    yardsticks: dict[str, set[str]],
    true: dict[str, list[float]],
    alone: dict[str, Row],
) -> list[str]:
    """One attention at one length; speed-ups are over dense rows of the same mode, and over itself on one rank."""
    row = rows[0]
    eager = next((row for row in rows if not row["compiled"]), {})
    compiled = next((row for row in rows if row["compiled"]), {})
    tokens = f"{row['length']:,}" + (f" in chunks of {row['chunk']:,}" if row["chunk"] else "")
    cells = [tokens, _who(row), number(eager.get("density", compiled.get("density")), ".3f")]
    cells.append(_range(true.get(_key(row, ("selector", "settings", "length")), [])))
    plain = [row for row in dense if not row["compiled"]]
    cells.append(_ms(eager))
    cells += [_speed_up(eager, [row for row in plain if row["kernel"] in kernels]) for kernels in yardsticks.values()]
    if row["ranks"] > 1:
        before = alone.get(_measured({**eager, "ranks": 1}))
        cells.append(_speed_up(eager, [before] if before and "error" not in before else []))
    cells += [_ms(compiled), _speed_up(compiled, [row for row in dense if row["compiled"]])]
    cells += [_share(eager, "attention_ms"), _share(eager, "select_ms")]
    return [*cells, number(eager.get("peak_gib", compiled.get("peak_gib")), ".1f")]


def _speed_up(row: Row, others: Sequence[Row]) -> str:
    """Over the fastest of other rows."""
    if not others or "error" in row or "ttft_ms" not in row:
        return "-"
    return f"{min(other['ttft_ms'] for other in others) / row['ttft_ms']:.2f}x"


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
    if "ttft_ms" not in row:
        return "-"
    cold = "" if row.get("warm_up", True) else ", not warmed up"
    return f"{row['ttft_ms']:,.0f}{f' (one pass{cold})' if row['repeats'] == 1 else ''}"


def _share(row: Row, part: str) -> str:
    return f"{row[part] / row['ttft_ms']:.0%}" if part in row and "error" not in row else "-"


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
    over_one = "" if row["ranks"] == 1 else ", and over the same uncompiled on one rank"
    yardsticks = _yardsticks(rows)
    choices = "PyTorch's choice of kernel" + (", and its flash kernel" if "x SDPA flash" in yardsticks else "")
    best = " and over the fastest dense kernel in the table" if "x best dense" in yardsticks else ""
    replaced = (
        f" Random weights have no attention pattern: each selector runs in full, and attention is then over seeded "
        f"random blocks of {stand_in} density, or what every row keeps where that is more, unless it says 'its own "
        "choice'."
        if densities
        else ""
    )
    return (
        f"**{row['shape']}, random weights**, {row['layers']} layers, {row['heads']}/{row['kv_heads']} heads, head_dim "
        f"{row['head_dim']}, {row['dtype']}{shared}; `generate` of one token.{replaced} What a selector keeps in the "
        "small needle model, which is trained, is another number: the times hold at the stated density. Speed-ups over "
        f"uncompiled SDPA ({choices}){best}, uncompiled over uncompiled, compiled over compiled{over_one}. Shares are "
        "of the uncompiled time, gaps between launches included, and selection is part of attention; the peak is what "
        "PyTorch allocated, weights included. "
        f"{row['gpu']}, {versions}, transformers {distinct(rows, 'transformers')}, commit {distinct(rows, 'commit')}, "
        f"{distinct(rows, 'date')}; medians of up to {max(row.get('repeats', 1) for row in rows)} passes by wall clock."
    )
