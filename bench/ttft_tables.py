"""The table of a model's first token, and the README's summary of that and of the attention alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from bench.speed_tables import ATTENTION, shown_first
from bench.tables import Line, Table, cells, conditions, group_rows, kernel_name, key, markdown, method, number, split
from flexprefill_fa.tools.rows import Row

_METHOD = "selector settings"
_SAME = "shape gpu layers heads kv_heads head_dim dtype"
_ONE = "length chunk kernel selector settings synthetic_density backend compiled"


def _who(row: Row) -> str:
    own = "its own choice" if row["selector"] and row["synthetic_density"] is None else ""
    told = f"dense {kernel_name(row)}" if row["selector"] is None else method(row)
    ranks = f"{row['ranks']} ranks" if row["ranks"] > 1 else ""
    return ", ".join(filter(None, (told, own, row.get("backend"), "compiled" if row["compiled"] else "", ranks)))


def _tokens(row: Row) -> str:
    return f"{row['length']:,}" + (f" in chunks of {row['chunk']:,}" if row["chunk"] else "")


def _pass_ms(row: Row) -> str:
    if "error" in row or "ttft_ms" not in row:
        return row.get("error", "-")
    cold = "" if row.get("warm_up", True) else ", not warmed up"
    return f"{row['ttft_ms']:,.0f}{f' (one pass{cold})' if row['repeats'] == 1 else ''}"


def _share(part: str, row: Row) -> str:
    return f"{row[part] / row['ttft_ms']:.0%}" if part in row and "error" not in row else "-"


def _lines(rows: list[Row]) -> list[Line]:
    """A line for each row."""

    def over(names: str, chosen: Callable[[Row], bool], row: Row) -> str:
        """The speed-up over the fastest of the chosen rows that share these fields."""
        same = [other for other in rows if chosen(other) and key(other, names) == key(row, names)]
        found = [other["ttft_ms"] for other in same if "error" not in other]
        return number(min(found) / row["ttft_ms"], "x") if found and "error" not in row and "ttft_ms" in row else "-"

    like = "length compiled ranks"
    columns = {
        "tokens": _tokens,
        "prefill": _who,
        "density": "density:.3f",
        "first token, ms": _pass_ms,
        "x SDPA": partial(over, like, lambda other: other["kernel"] == "sdpa"),
        "x SDPA flash": partial(over, like, lambda other: other["kernel"] == "sdpa_flash"),
        "x best dense": partial(over, like, lambda other: other["selector"] is None),
        "x one rank": lambda row: over(_ONE, lambda other: other["ranks"] == 1, row) if row["ranks"] > 1 else "-",
        "attention": partial(_share, "attention_ms"),
        "selection": partial(_share, "select_ms"),
        "peak GiB": "peak_gib:.1f",
    }
    ordered = sorted(rows, key=lambda row: (row["ranks"], row["length"], row["chunk"] or 0, row["compiled"]))
    return [cells(row, columns) for row in ordered]


FIRST_TOKEN = Table(
    group_by=_SAME,
    identity=f"ranks {_ONE}",
    caption="**{shape}, random weights**: `generate` of one token. Selection in full, then attention over seeded "
    "random blocks of the stated density, unless it says 'its own choice'. Shares of the time include gaps between "
    "launches, attention includes selection, and the peak is what PyTorch allocated, weights included",
    lines=_lines,
    where=lambda row: row["kind"] == "ttft",
)


def speed_summary(attention: Iterable[Row], ttft: Iterable[Row]) -> str:
    """The README's table, of the lengths at which both were measured: one layer's attention, a model's first token.

    Of the selector and settings that the plot shows, by "auto" beside the fastest dense kernel; first tokens
    uncompiled, whole, on one rank, of the first model and density measured with it, by the fastest kernels.
    """
    dense, selected = split(shown_first(attention))
    auto = [row for row in selected if row["backend"] == "auto" and "error" not in row]
    plain = [row for row in FIRST_TOKEN.latest(ttft) if "error" not in row and row["ranks"] == 1]
    plain = [row for row in plain if not row["chunk"] and not row["compiled"]]
    asked = [row for row in plain if selected and key(row, _METHOD) == key(selected[0], _METHOD)]
    first = next(iter(group_rows((row for row in asked if row["synthetic_density"]), f"{_SAME} synthetic_density")), [])
    beside = [row for row in split(plain)[0] if first and key(row, _SAME) == key(first[0], _SAME)]
    lines, shown = [], []
    for row in sorted(auto, key=lambda row: row["length"]):
        kept = row["density"] if row["path"] == "sparse" else 1
        line = {"tokens": f"{row['length']:,}", "blocks kept": f"{kept:.1%}"}
        times = {"attention": (dense, [row], "total_ms"), "first token": (beside, first, "ttft_ms")}
        for title, (before, after, name) in times.items():
            slow, fast = (_least(part, row["length"], name) for part in (before, after))
            if slow is None or fast is None:
                break
            line[f"{title}: dense"], line[f"{title}: sparse"] = f"{number(slow, 'ms')} ms", f"{number(fast, 'ms')} ms"
            line[f"{title}: speed-up"] = number(slow / fast, "x")
        else:
            lines.append(line)
            shown += [row, *(other for other in dense if other["length"] == row["length"])]
    if not lines:
        return ""
    head = ATTENTION.head(sorted(shown, key=lambda row: row["selector"] is None))
    return (
        f"{head} Dense is the fastest kernel measured, and what sparse prefill takes itself where it expects no gain. "
        f"First token: {conditions(first, 'shape layers')}, random weights, uncompiled, "
        f"{conditions([*beside, *first], 'repeats')}; selection in full, then attention over "
        f"{conditions(first, 'synthetic_density transformers commit date')}.\n\n{markdown(lines)}"
    )


def _least(rows: Iterable[Row], length: int, name: str) -> float | None:
    """Of a field, among rows of a length."""
    return min((row[name] for row in rows if row["length"] == length and name in row), default=None)
