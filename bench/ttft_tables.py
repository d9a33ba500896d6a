"""The tables of a model's first token, and the README's summary of that and of the attention alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from bench.speed_tables import best_dense, by_length, selector_caption, shown_first
from bench.tables import (
    KERNEL_NAMES,
    Column,
    Table,
    column,
    commits,
    distinct,
    ends,
    group_rows,
    key,
    markdown_table,
    method,
    number,
    pivot,
    split,
    versions,
)
from flexprefill_fa.tools.digests import model_sha256
from flexprefill_fa.tools.evaluation import ACCURACY_KIND
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.rows import Row

_GROUP = ("gpu", "shape", "layers", "dtype", "ranks")
_ATTENTION = ("length", "chunk", "kernel", "selector", "settings", "synthetic_density", "backend")
_TRUE = ("selector", "settings", "length")


def _who(row: Row) -> str:
    if row["selector"] is None:
        return f"dense {KERNEL_NAMES[row['kernel']]}"
    told = [method(row), "its own choice" if row["synthetic_density"] is None else "", row.get("backend") or ""]
    return ", ".join(filter(None, told))


def _pass_ms(row: Row) -> str:
    if "error" in row or "ttft_ms" not in row:
        return row.get("error", "-")
    cold = "" if row.get("warm_up", True) else ", not warmed up"
    return f"{row['ttft_ms']:,.0f}{f' (one pass{cold})' if row['repeats'] == 1 else ''}"


def _share(row: Row, part: str) -> str:
    return f"{row[part] / row['ttft_ms']:.0%}" if part in row and "error" not in row else "-"


def _over(row: Row, others: Iterable[Row]) -> str:
    """A speed-up over the fastest of other rows."""
    found = [other["ttft_ms"] for other in others if "error" not in other]
    return "-" if not found or "error" in row or "ttft_ms" not in row else number(min(found) / row["ttft_ms"], "x")


def _yardsticks(rows: Iterable[Row]) -> dict[str, set[str]]:
    """By the title of their column: the dense kernels whose fastest is compared with, uncompiled."""
    kernels = {row["kernel"] for row in rows if row["selector"] is None}
    found = {"x SDPA": {"sdpa"}, "x SDPA flash": kernels & {"sdpa_flash"}}
    if kernels - {"sdpa"}:  # else the best one is SDPA, which has its column
        found["x best dense"] = kernels
    return {title: names for title, names in found.items() if names}


def _prefills(rows: list[Row]) -> Iterable[dict[bool, Row]]:
    """A line for each attention at a length: its rows by whether they are compiled."""
    ordered = sorted(rows, key=lambda row: (row["length"], row["chunk"] or 0))
    return pivot(ordered, lambda row: key(row, _ATTENTION), lambda row: row["compiled"]).values()


def _columns(rows: list[Row], true: dict[str, list[float]], alone: Sequence[Row]) -> list[Column]:
    """Of `_prefills`.

    `true` are the densities that the needle model's tasks came to, by `_TRUE`; `alone` rows of models on one rank.
    """
    dense = split(rows)[0]

    def of(title: str, cell: Callable[[Row], str], *modes: bool) -> Column:
        """Of the first mode that was measured, uncompiled before compiled unless one is named."""
        return title, lambda line: cell(next((line[mode] for mode in modes or (False, True) if mode in line), {}))

    def over(row: Row, compiled: bool, names: set[str] | None = None) -> str:
        others = [other for other in dense if other["compiled"] == compiled and other["length"] == row.get("length")]
        return _over(row, [other for other in others if names is None or other["kernel"] in names])

    def over_one_rank(row: Row) -> str:
        names = (*_GROUP, *_ATTENTION, "compiled")
        return _over(row, [other for other in alone if key(other, names) == key({**row, "ranks": 1}, names)])

    return [
        of("tokens", lambda row: f"{row['length']:,}" + (f" in chunks of {row['chunk']:,}" if row["chunk"] else "")),
        of("prefill", _who),
        of(*column("density", "density", ".3f")),
        of("needle model's density", lambda row: ends(true.get(key(row, _TRUE), ()), ".2f")),
        of("first token, ms", _pass_ms, False),
        *(of(title, partial(over, compiled=False, names=names), False) for title, names in _yardsticks(rows).items()),
        *([of("x one rank", over_one_rank, False)] if rows[0]["ranks"] > 1 else []),
        of("compiled, ms", _pass_ms, True),
        of("x best dense, compiled", partial(over, compiled=True), True),
        of("attention", partial(_share, part="attention_ms"), False),
        of("selection", partial(_share, part="select_ms"), False),
        of(*column("peak GiB", "peak_gib", ".1f")),
    ]


def _caption(rows: Sequence[Row]) -> str:
    row, yardsticks = rows[0], _yardsticks(rows)
    densities = sorted({row["synthetic_density"] for row in rows if row["synthetic_density"] is not None})
    ranks = row["ranks"]
    shared = "" if ranks == 1 else f", shared by {ranks} ranks (tensor parallel)"
    over_one = "" if ranks == 1 else ", and over the same uncompiled on one rank"
    choices = "PyTorch's choice of kernel" + (", and its flash kernel" if "x SDPA flash" in yardsticks else "")
    best = " and over the fastest dense kernel in the table" if "x best dense" in yardsticks else ""
    replaced = (
        f" Random weights have no attention pattern: each selector runs in full, and attention is then over seeded "
        f"random blocks of {' and '.join(f'{density:.0%}' for density in densities)} density, or what every row keeps "
        "where that is more, unless it says 'its own choice'."
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
        f"{row['gpu']}, {versions(rows)}, transformers {distinct(rows, 'transformers')}, {commits(rows)}; medians of "
        f"up to {max(row.get('repeats', 1) for row in rows)} passes by wall clock."
    )


FIRST_TOKEN = Table(
    group_by=_GROUP,
    identity=(*_ATTENTION, "compiled"),
    where=lambda row: row["kind"] == "ttft",
    lines=_prefills,
    columns=partial(_columns, true={}, alone=()),
    caption=_caption,
)
"""The first token of a model, on a number of ranks, with each attention."""


def ttft_tables(rows: Sequence[Row], accuracy: Iterable[Row]) -> str:
    """One table for each GPU, model and number of ranks, with densities in the needle model by rows of accuracy."""
    true: dict[str, list[float]] = {}
    needle = model_sha256(MODEL_DIR)
    for row in accuracy:
        plain = row["kind"] == ACCURACY_KIND and not row["mean_correction"] and not row["dense_layers"]
        if plain and row["model_sha256"] == needle and row["density"] is not None:
            true.setdefault(key(row, _TRUE), []).append(row["density"])
    alone = [row for group in FIRST_TOKEN.groups(rows) for row in group if row["ranks"] == 1]
    return dataclasses.replace(FIRST_TOKEN, columns=partial(_columns, true=true, alone=alone)).markdown(rows)


def first_tokens(rows: Iterable[Row], selector: str, settings: Row) -> dict[int, tuple[Row, Row]]:
    """By length: the fastest dense row, and the selector's fastest over random blocks; uncompiled, whole, on one rank.

    Of the first model and density measured with the selector; lengths without either are left out.
    """
    plain = [row for group in FIRST_TOKEN.groups(rows) for row in group if "error" not in row]
    plain = [row for row in plain if row["ranks"] == 1 and not row["chunk"] and not row["compiled"]]
    asked = (selector, settings)
    sparse = [row for row in plain if (row["selector"], row["settings"]) == asked and row["synthetic_density"]]
    sparse = group_rows(sparse, [*_GROUP, "synthetic_density"])[0] if sparse else []
    beside = [row for row in split(plain)[0] if sparse and key(row, _GROUP) == key(sparse[0], _GROUP)]
    dense, own = (
        {row["length"]: row for row in sorted(part, key=lambda row: -row["ttft_ms"])}  # the last one is the fastest
        for part in (beside, sparse)
    )
    return {length: (dense[length], row) for length, row in own.items() if length in dense}


def speed_summary(attention: Iterable[Row], ttft: Iterable[Row]) -> str:
    """The README's table, of the lengths at which both were measured: one layer's attention, a model's first token.

    Of the selector and settings that the plot shows.
    """
    rows = shown_first(attention)
    if not rows:
        return ""
    selected = split(rows)[1][0]
    whole = first_tokens(ttft, selected["selector"], selected["settings"])
    body, first = [], []
    for length, line in by_length(rows).items():
        row, best = line.get("auto", {"error": "not measured"}), best_dense(line.values())
        if length not in whole or "error" in row or best is None:
            continue
        first += whole[length]
        cells = [f"{length:,}", number(row.get("density") if row["path"] == "sparse" else 1, ".1%")]
        for dense, sparse in ((best[0], row["total_ms"]), [each["ttft_ms"] for each in whole[length]]):
            cells += [f"{number(dense, 'ms')} ms", f"{number(sparse, 'ms')} ms", number(dense / sparse, "x")]
        body.append(cells)
    if not body:
        return ""
    head = ["tokens", "blocks kept", "attention: dense", "sparse", "speed-up"]
    head += ["first token: dense", "sparse", "speed-up"]
    row = first[-1]
    return (
        f"{selector_caption([row for row in rows if row['length'] in whole])} Dense is the fastest kernel measured, "
        f"and what sparse prefill takes itself where it expects no gain. First token: {row['shape']}, random weights, "
        f"{row['layers']} layers, uncompiled; selection in full, then attention over random blocks of "
        f"{row['synthetic_density']:.0%} density or what every row keeps where that is more; transformers "
        f"{distinct(first, 'transformers')}, {commits(first)}.\n\n{markdown_table(head, body)}"
    )
