"""Tables of result rows: each is described once, and rendered as Markdown under a line that says what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexprefill_fa.tools.fidelity.knobs import knob_fields
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row, latest

Line = dict[str, str]
"""Cells by the titles of their columns."""
Cell = str | Callable[[Row], str]
"""A cell of a row: "field:format", see `number`, or what makes its text."""
KERNEL_NAMES = {"sdpa": "SDPA", "sdpa_flash": "SDPA flash", "sdpa_cudnn": "SDPA cuDNN", "flash_attn_4": "flash-attn-4"}
KERNEL_NAMES |= {name: f"FlexAttention {name}" for name in ("FLASH", "TRITON", "CPU")}
_TOLD: dict[str, str] = dict.fromkeys(("gpu", "model", "text", "dtype", "selector", "settings", "date"), "{}")
_TOLD |= {"flash_attn_4": "flash-attn-4 {}", "lm_eval": "lm-eval {}", "vllm": "vLLM {}", "sglang": "SGLang {}"}
_TOLD |= {"model_sha256": "SHA-256 {:.10}", "python": "Python {}", "dense_kernel": "default backend {}"}
_TOLD |= {"layers": "{} layers", "heads": "{} heads", "synthetic_density": "random blocks of density {}"}
_HIDDEN = ("kind", "device", "tokenizer_sha256", "asked_sha256")  # told by other fields, or of no use to a reader
_VERSIONS = "gpu torch triton flash_attn_4 transformers lm_eval vllm sglang repeats commit date"


@dataclass(frozen=True)
class Table:
    """Which rows stand in one table, and what is said of them.

    Attributes:
        group_by: the fields, in one string, that all rows of a table share.
        identity: those that, with them, tell one measurement from another; a later row takes an earlier one's place.
        caption: what stands above it, with fields of its rows in braces; behind it the other fields that they share,
            and the versions they were measured with.
        lines: of a table, from its rows. A table without lines is left out.
        where: whether a row belongs into such a table at all.
        notes: what stands below, from its rows.
        told: further fields to tell.
    """

    group_by: str
    identity: str
    caption: str
    lines: Callable[[list[Row]], list[Line]]
    where: Callable[[Row], Any] = lambda row: True
    notes: Callable[[list[Row]], str] = lambda rows: ""
    told: str = ""

    def latest(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that count."""
        return latest(filter(self.where, rows), lambda row: key(row, f"{self.group_by} {self.identity}"))

    def groups(self, rows: Iterable[Row]) -> list[list[Row]]:
        """The latest rows of each table."""
        return group_rows(self.latest(rows), self.group_by)

    def head(self, group: Sequence[Row]) -> str:
        """The caption of one group, and how its rows were measured."""
        names = dict.fromkeys(f"{self.group_by} {self.told} {_VERSIONS}".split())
        rest = " ".join(name for name in names if f"{{{name}" not in self.caption and name not in _HIDDEN)
        return f"{self.caption.format(**group[0])}. {conditions(group, rest)}."

    def markdown(self, rows: Iterable[Row]) -> str:
        """All of them; empty without rows."""
        shown = ((group, markdown(self.lines(group))) for group in self.groups(rows))
        return paragraphs(paragraphs([self.head(group), grid, self.notes(group)]) for group, grid in shown if grid)


def kernel_name(row: Row) -> str:
    """A row's kernel of dense attention, as it is written."""
    return str(KERNEL_NAMES.get(row["kernel"], row["kernel"]))


def key(row: Row, names: str) -> str:
    """The values of fields, in a form that can be compared; a selector's row is the same by whichever "kernel"."""
    hidden = "kernel" if row.get("selector") else None
    return json.dumps([row.get(name) if name != hidden else None for name in names.split()], sort_keys=True)


def group_rows(rows: Iterable[Row], names: str) -> list[list[Row]]:
    """Rows that share fields together, in the order in which they came first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row, names), []).append(row)
    return list(found.values())


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """(rows of dense attention, rows of selectors)."""
    found = list(rows)
    dense = [row for row in found if row["selector"] is None]
    return dense, [row for row in found if row["selector"] is not None]


def values(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a field, each once, ascending; None first."""
    return sorted({row[name] for row in rows}, key=lambda value: (value is not None, value))


def paragraphs(parts: Iterable[str]) -> str:
    """Those that are not empty."""
    return "\n\n".join(filter(None, parts))


def markdown(lines: Sequence[Line]) -> str:
    """A table with a column for each title that some line has a cell of; empty without lines."""
    found = dict.fromkeys(title for line in lines for title in line)
    titles = [title for title in found if any(line.get(title, "-") != "-" for line in lines)]
    rows = [titles, ["---"] * len(titles), *([line.get(title, "-") for title in titles] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) if lines else ""


def cells(row: Row, columns: Mapping[str, Cell]) -> Line:
    """A row's line."""
    return {title: cell(row) if callable(cell) else field(row, cell) for title, cell in columns.items()}


def field(row: Row, cell: str) -> str:
    """A number of a row by "field:format", or a dash."""
    name, _, spec = cell.partition(":")
    return number(row.get(name), spec)


def pivot(entries: Iterable[tuple[Line, Line]], columns: Iterable[str] = ()) -> list[Line]:
    """Lines of (how it begins, further cells): those that begin alike are one; `columns` are the order of the rest."""
    blank = dict.fromkeys(columns, "-")
    lines: dict[tuple[str, ...], Line] = {}
    for start, more in entries:
        lines.setdefault(tuple(start.values()), start | blank).update(more)
    return list(lines.values())


def number(value: Any, spec: str) -> str:
    """A number, or a dash where there is none; "ms" are milliseconds, "x" a speed-up."""
    if value is None:
        return "-"
    if spec == "ms":
        spec = ",.0f" if value >= 100 else ".3g"
    return f"{value:.2f}x" if spec == "x" else format(value, spec)


def mark(lines: Iterable[Line], title: str, choose: Callable[..., str | None]) -> None:
    """Make the best numbers of a column bold: the least or the greatest, by `choose`."""
    found = [line for line in lines if line.get(title, "-") != "-"]
    best = choose((line[title] for line in found), key=float, default=None)
    for line in found:
        line[title] = f"**{best}**" if line[title] == best else line[title]


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


def usual_knob(row: Row) -> bool:
    """Whether the setting that trades density for fidelity is the selector's usual one; of dense attention, yes."""
    changed = changed_settings(row["selector"], row["settings"])
    return not changed or changed.keys().isdisjoint(knob_fields(row["selector"]))


def settings_of(settings: Mapping[str, Any]) -> str:
    """All settings that have a value."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def conditions(rows: Sequence[Row], names: str) -> str:
    """Fields that say how rows were measured; where their values differ, each is named."""
    told = []
    for name in names.split():
        found = [row[name] for row in rows if row.get(name) not in (None, {})]
        if name == "repeats" and len(set(found)) > 1:
            found = [f"{min(found)} to {max(found)}"]
        texts = dict.fromkeys(settings_of(value) if isinstance(value, dict) else str(value) for value in found)
        told += [_TOLD.get(name, f"{name} {{}}").format(", ".join(texts))] if texts else []
    return ", ".join(told)


def line_of(row: Row) -> str:
    """A row for a log: what was measured, and the first of its times."""
    who = [f"{row['length']} tokens", f"layer {row['layer']}" if row.get("layer") is not None else ""]
    if "selector" not in row:  # of a serving engine, of calls on the CPU, of tiles
        who += [str(row[name]) for name in ("backend", "measure", "case") if name in row]
        who += [f"head_dim {row['head_dim']}, tile {row['tile']}"] if "tile" in row else []
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
