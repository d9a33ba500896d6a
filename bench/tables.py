"""Tables of result rows: each is described once, and rendered as Markdown under a line that says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexprefill_fa.tools.fidelity.knobs import knob_fields
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row, latest

Column = tuple[str, Callable[[Any], str]]
"""A title, and the cell of a line."""
KERNEL_NAMES = {"sdpa": "SDPA", "sdpa_flash": "SDPA flash", "sdpa_cudnn": "SDPA cuDNN", "flash_attn_4": "flash-attn-4"}
KERNEL_NAMES |= {name: f"FlexAttention {name}" for name in ("FLASH", "TRITON", "CPU")}


@dataclass(frozen=True)
class Table:
    """Which rows stand in one table, and what is said of them.

    Attributes:
        group_by: fields that all rows of a table share.
        identity: fields that, with those, tell one measurement from another; a later row takes an earlier one's place.
            A "kernel" tells rows of dense attention apart, not those of a selector.
        columns: those of a table, from its rows; titles alone where a line is its cells already.
        caption: what stands above it, from its rows. notes: what stands below.
        lines: what a table has a line for, from its rows: the rows themselves, or what `columns` makes of them. A table
            without lines is left out.
        each: fields for each of whose values there is a table of its own; dense rows stand in all of them.
        where: whether a row belongs into such a table at all.
    """

    group_by: Sequence[str]
    identity: Sequence[str]
    columns: Callable[[list[Row]], Sequence[Column | str]]
    caption: Callable[[list[Row]], str]
    lines: Callable[[list[Row]], Iterable[Any]] = list
    notes: Callable[[list[Row]], str] = lambda rows: ""
    each: Sequence[str] = ()
    where: Callable[[Row], bool] = lambda row: True

    def groups(self, rows: Iterable[Row]) -> list[list[Row]]:
        """The latest rows of each table."""
        wanted = latest(filter(self.where, rows), lambda row: key(row, (*self.group_by, *self.identity)))
        groups = group_rows(wanted, self.group_by)
        if not self.each:
            return groups
        return [[*dense, *part] for dense, sparse in map(split, groups) for part in group_rows(sparse, self.each)]

    def markdown(self, rows: Iterable[Row]) -> str:
        """All of them; empty without rows."""
        return paragraphs(map(self.one, self.groups(rows)))

    def one(self, group: list[Row]) -> str:
        """The table of one group; empty without lines."""
        grid = self.grid(group)
        return paragraphs([self.caption(group), grid, self.notes(group)]) if grid else ""

    def grid(self, group: list[Row]) -> str:
        """The same without caption and notes."""
        columns = [found if isinstance(found, tuple) else (found, None) for found in self.columns(group)]
        body = [
            [cell(line) if cell else line[index] for index, (_, cell) in enumerate(columns)]
            for line in self.lines(group)
        ]
        return markdown_table([title for title, _ in columns], body) if body else ""


def key(row: Row, names: Iterable[str]) -> str:
    """The values of fields, in a form that can be compared."""
    dense = row.get("selector") is None
    return json.dumps([row.get(name) if dense or name != "kernel" else None for name in names], sort_keys=True)


def group_rows(rows: Iterable[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows that share fields together, in the order in which they came first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row, names), []).append(row)
    return list(found.values())


def pivot(rows: Iterable[Row], line: Callable[[Row], Any], column: Callable[[Row], Any]) -> dict[Any, dict[Any, Row]]:
    """Rows by their line and then by their column, each in the order in which it came first."""
    found: dict[Any, dict[Any, Row]] = {}
    for row in rows:
        found.setdefault(line(row), {})[column(row)] = row
    return found


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """(rows of dense attention, rows of selectors)."""
    parts: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        parts[row["selector"] is not None].append(row)
    return parts


def values(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a field, each once, ascending; None first."""
    return sorted({row[name] for row in rows}, key=lambda value: (value is not None, value))


def paragraphs(parts: Iterable[str]) -> str:
    """Those that are not empty."""
    return "\n\n".join(filter(None, parts))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def column(title: str, name: str, spec: str = "") -> Column:
    """A number of the row, or a dash."""
    return title, lambda row: number(row.get(name), spec)


def across(titles: Mapping[Any, str], cell: Callable[[Row], str]) -> list[Column]:
    """Columns of lines that are rows by such keys, under these titles; a dash where a line has no such row."""
    return [(title, lambda line, at=at: cell(line[at]) if at in line else "-") for at, title in titles.items()]


def number(value: float | None, spec: str) -> str:
    """A number, or a dash where there is none; "ms" are milliseconds, "x" a speed-up."""
    if value is None:
        return "-"
    if spec == "x":
        return f"{value:.2f}x"
    return format(value, (",.0f" if value >= 100 else ".3g") if spec == "ms" else spec)


def ends(found: Sequence[float], spec: str, unit: str = "") -> str:
    """The least and the greatest of some numbers, once where they look alike; a dash without any."""
    return " to ".join(dict.fromkeys(format(f(found), spec) + unit for f in (min, max))) if found else "-"


def bold(text: str, best: bool) -> str:
    """The text, in bold where it is the best."""
    return f"**{text}**" if best else text


def method(row: Row) -> str:
    """A selector and what is not usual about it: settings, mean correction, dense layers."""
    if row["selector"] is None:
        return "dense"
    if row["selector"] == "synthetic":
        return f"density {row['settings']['density']:g}"
    if row["selector"] == row.get("implementation"):  # a method that is not here
        return row["selector"]
    told = [f"{name} {value}" for name, value in changed_settings(row["selector"], row["settings"]).items()]
    if correction := row.get("mean_correction"):
        told.append("mean correction" if correction is True else f"{correction} means")
    if dense := row.get("dense_layers"):
        told.append(f"layer{'s' if len(dense) > 1 else ''} {', '.join(map(str, dense))} dense")
    return ", ".join([row["selector"], *told])


def has_usual_knob(row: Row) -> bool:
    """Whether the setting that trades density for fidelity is the selector's usual one; of dense attention, yes."""
    changed = changed_settings(row["selector"], row["settings"])
    return not changed or changed.keys().isdisjoint(knob_fields(row["selector"]))


def settings_of(settings: dict[str, Any]) -> str:
    """All settings that have a value."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def conditions(rows: Sequence[Row]) -> str:
    """Processor, versions, commit, date and shapes; where versions, commits or dates differ, each is named."""
    row = rows[0]
    shape = f"batch {row['batch']}, {row['heads']}/{row['kv_heads']} heads, head_dim {row['head_dim']}, {row['dtype']}"
    return f"{row['gpu']}, {versions(rows)}, {commits(rows)}; {shape}"


def versions(rows: Sequence[Row], *more: str) -> str:
    """Of torch, triton and flash-attn-4, or of `more` and those."""
    names = (*more, "torch", "triton", "flash_attn_4")
    titles = {"flash_attn_4": "flash-attn-4", "vllm": "vLLM", "sglang": "SGLang"}
    return ", ".join(f"{titles.get(name, name)} {found}" for name in names if (found := distinct(rows, name)))


def commits(rows: Sequence[Row]) -> str:
    """Commit and date."""
    return f"commit {distinct(rows, 'commit')}, {distinct(rows, 'date')}"


def model_of(row: Row) -> str:
    """The model, by its name and its weights."""
    return f"{row['model']} (SHA-256 {row['model_sha256'][:10]})"


def distinct(rows: Sequence[Row], name: str) -> str:
    """The values of a field, each once."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))


def line_of(row: Row) -> str:
    """A row for a log: what was measured, and the first of its times."""
    who = [f"{row['length']} tokens", f"layer {row['layer']}" if row.get("layer") is not None else ""]
    if "measure" in row:  # of a serving engine
        who.append(f"{row['backend']}, {row['measure']}")
    elif "tile" in row or "case" in row:
        who.append(row["case"] if "case" in row else f"head_dim {row['head_dim']}, tile {row['tile']}")
    elif row["selector"] is None:
        who.append(f"dense {row['kernel']}")
    else:
        ran = {"dense": f"(dense {row.get('kernel')})", "peer": f"of {row.get('implementation')}"}
        who.append(" ".join(filter(None, (method(row), row.get("backend"), ran.get(row.get("path", ""))))))
    told = ", ".join(filter(None, (*who, "compiled" if row.get("compiled") else "")))
    if isinstance(row.get("error"), str):
        return f"{told}: WRONG: {row['error']}"
    found = [f"{value:.3f} {name[-2:]}" for name, value in row.items() if name.endswith(("_ms", "_us"))][:1]
    found += [f"{value:,.0f} tokens/s" for name, value in row.items() if name.endswith("tokens_per_s")]
    found += [f"{name} {row[name]:.3f}" for name in ("density", "recall", "error") if row.get(name) is not None]
    found += [f"peak {row['peak_gib']:.1f} GiB"] if "peak_gib" in row else []
    return f"{told}: {', '.join(found)}"
