"""The README's table: what a length gains, in the attention of one layer and in the first token of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.report import number
from bench.tables import caption, distinct, groups, markdown_table, milliseconds, selector_of, times
from bench.ttft_tables import first_tokens
from flexprefill_fa.tools.rows import Row


def speed_summary(attention: Iterable[Row], ttft: Iterable[Row]) -> str:
    """One line for each length at which both were measured; empty where there is none.

    Args:
        attention: of `python -m bench attention`; its first table, which the plot shows.
        ttft: of `python -m bench ttft`; the same selector with the same settings.
    """
    found = groups(attention, "cuda", "sharpened", synthetic=False)
    if not found:
        return ""
    dense, selected = found[0]
    whole = first_tokens(ttft, selected[0]["selector"], selected[0]["settings"])
    chosen = [row for row in selected if row["backend"] == "auto" and "error" not in row and row["length"] in whole]
    if not chosen:
        return ""
    head = ["tokens", "blocks kept", "attention: dense", "sparse", "speed-up"]
    head.extend(("first token: dense", "sparse", "speed-up"))
    body = []
    for row in sorted(chosen, key=lambda row: row["length"]):
        dense_ms = [each["total_ms"] for each in dense if each["length"] == row["length"] and "total_ms" in each]
        best = min(dense_ms, default=None)
        cells = [f"{row['length']:,}", number(row.get("density") if row["path"] == "sparse" else 1, ".1%")]
        cells += [_ms(best), _ms(row["total_ms"]), times(best and best / row["total_ms"])]
        plain, sparse = (each["ttft_ms"] for each in whole[row["length"]])
        body.append([*cells, _ms(plain), _ms(sparse), times(plain / sparse)])
    used = [row for row in dense + selected if row["length"] in whole]
    first = [row for row in chosen for row in whole[row["length"]]]
    return f"{_caption(used, selected[0], first)}\n\n{markdown_table(head, body)}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{milliseconds(value)} ms"


def _caption(attention: Sequence[Row], selected: Row, first: Sequence[Row]) -> str:
    row = first[-1]
    return (
        f"{caption(attention, selector_of(selected))} Dense is the fastest kernel measured, and what sparse prefill "
        f"takes itself where it expects no gain. First token: {row['shape']}, random weights, {row['layers']} layers, "
        f"uncompiled; selection in full, then attention over random blocks of {row['synthetic_density']:.0%} density "
        f"or what every row keeps where that is more; transformers {distinct(first, 'transformers')}, commit "
        f"{distinct(first, 'commit')}, {distinct(first, 'date')}."
    )
