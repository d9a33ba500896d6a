"""Quality rows as text: tables for the documents and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.table import Table

from bench.quality_points import Family, at_density, families, labels, quality_groups
from bench.report import number
from bench.tables import conditions, markdown_table
from flexprefill_fa import get_selector
from flexprefill_fa.tools.reporting import changed_settings
from flexprefill_fa.tools.rows import Row

DENSITIES = (0.05, 0.1, 0.2, 0.4)
CORRECTED_ALPHAS = (0.05, 0.1, 0.2)
"""Of flashprefill, in the table about mean correction."""

_DIGITS = ".3f"


def selector_tables(rows: Iterable[Row]) -> str:
    """Recall and output error of every selector at equal densities, one table per group, and who beats FlexPrefill."""
    return "\n\n".join(_selector_table(group) for group in quality_groups(rows))


def correction_tables(rows: Iterable[Row]) -> str:
    """What mean correction does to flashprefill's output error, one table per group; empty without such rows."""
    return "\n\n".join(filter(None, (_correction_table(group) for group in quality_groups(rows))))


def _selector_table(group: Sequence[Row]) -> str:
    header = ["tokens", "selector"]
    header += [f"recall at {density:.0%}" for density in DENSITIES]
    header += [f"error at {density:.0%}" for density in DENSITIES]
    lines, verdicts = [], []
    for length in _lengths(group):
        found = families(group, length)
        recall, error, corrected = (_columns(found, field) for field in ("recall", "error", "corrected"))
        best = [_bold(recall, max), _bold(error, min), _bold(corrected, min)]
        for row, name in enumerate(labels(found)):
            pairs = zip(best[1][row], best[2][row], strict=True)
            errors = ["-" if pair == ("-", "-") else " / ".join(pair) for pair in pairs]
            lines.append([f"{length:,}", name, *best[0][row], *errors])
        verdicts += [_verdict(found, length, "recall"), _verdict(found, length, "error")]
    what = (
        f"{_caption(group)} Recall and relative output error (without / with mean correction) at equal densities, "
        "between the two nearest settings of each sweep; '-' where a sweep does not reach; the best in bold."
    )
    listed = "\n".join(f"- {verdict}" for verdict in verdicts if verdict)
    return "\n\n".join(filter(None, (what, markdown_table(header, lines), listed)))


def _correction_table(group: Sequence[Row]) -> str:
    lines = []
    for length in _lengths(group):
        found = families(group, length)
        for family, label in zip(found, labels(found), strict=True):
            for point in family.points[::-1]:
                if family.selector != "flashprefill" or point.settings["alpha"] not in CORRECTED_ALPHAS:
                    continue
                ratio = point.corrected / point.error if point.corrected is not None and point.error else None
                values = (point.density, point.recall, point.error, point.corrected, ratio)
                values += (point.worst, point.corrected_worst)
                name = f"{label} alpha={point.settings['alpha']:g}"
                lines.append([f"{length:,}", name, *(number(value, _DIGITS) for value in values)])
    if not lines:
        return ""
    header = ["tokens", "selector", "density", "recall", "error without", "error with", "with / without"]
    header += ["worst head without", "worst head with"]
    return f"{_caption(group)} Output error without and with mean correction.\n\n{markdown_table(header, lines)}"


def _lengths(group: Sequence[Row]) -> list[int]:
    return sorted({row["length"] for row in group})


def _columns(found: Sequence[Family], field: str) -> list[list[float | None]]:
    """One row for each family, one column for each density, rounded as it is shown."""
    values = [[at_density(family, field, density) for density in DENSITIES] for family in found]
    return [[None if value is None else round(value, 3) for value in row] for row in values]


def _bold(values: Sequence[Sequence[float | None]], choose: Callable[[list[float]], float]) -> list[list[str]]:
    """The values as text, the best of each column in bold; ties are all bold."""
    measured = [[value for value in column if value is not None] for column in zip(*values, strict=True)]
    best = [choose(column) if column else None for column in measured]

    def cell(value: float | None, column: int) -> str:
        text = number(value, _DIGITS)
        return f"**{text}**" if value is not None and value == best[column] else text

    return [[cell(value, column) for column, value in enumerate(row)] for row in values]


def _verdict(found: Sequence[Family], length: int, field: str) -> str:
    """Whether a simpler rule beats FlexPrefill's published one in "recall" or "error", density by density."""
    values = list(zip(found, labels(found), _columns(found, field), strict=True))
    published = [column for family, _, column in values if _is_published(family)]
    if not published:
        return ""
    higher_is_better = field == "recall"
    parts = []
    for index, own in enumerate(published[0]):
        others = [(column[index], name) for family, name, column in values if _is_simpler(family)]
        reached = [(value, name) for value, name in others if value is not None]
        if own is None:
            verdict = "outside its sweep"
        elif not reached:
            verdict = f"no simpler rule reaches this density ({own:{_DIGITS}})"
        elif better := sorted(
            ((value, name) for value, name in reached if (value > own if higher_is_better else value < own)),
            reverse=higher_is_better,
        ):
            listed = ", ".join(f"{name} ({value:{_DIGITS}})" for value, name in better)
            verdict = f"**beaten** ({own:{_DIGITS}}) by {listed}"
        else:
            verdict = f"not beaten ({own:{_DIGITS}})"
        parts.append(f"at {DENSITIES[index]:.0%} {verdict}")
    what = "recall" if higher_is_better else "output error without mean correction"
    return f"{length:,} tokens, {what}, FlexPrefill's published rule against simpler ones: {'; '.join(parts)}."


def _is_published(family: Family) -> bool:
    fixed = family.fixed
    return family.selector == "flexprefill" and fixed["variant"] == "published" and fixed["tau"] > 0


def _is_simpler(family: Family) -> bool:
    """Another selector, or the published rule without its test for query-aware heads."""
    fixed = family.fixed
    return family.selector != "flexprefill" or (fixed["variant"] == "published" and fixed["tau"] == 0)


def _caption(group: Sequence[Row]) -> str:
    layers = sorted({row["layer"] for row in group})
    prompts = len({row["seed"] for row in group})
    shown = ", ".join(map(str, layers))
    plural = "prompt" if prompts == 1 else "prompts"
    rounding = max(row["dense_error"] for row in group)
    return (
        f"**The needle model (SHA-256 {group[0]['model_sha256'][:10]}) on {prompts} needle {plural}**, layers {shown}; "
        f"means over heads and layers. {conditions(group)}; rounding alone gives dense attention an error of up to "
        f"{rounding:.2g}."
    )


def quality_line(row: Row) -> str:
    """A row for a log."""
    told = changed_settings(row["selector"], row["settings"])
    told |= {name: row["settings"][name] for name in get_selector(row["selector"]).sweep}
    who = f"{row['length']} tokens, layer {row['layer']}, {row['selector']} {_assignments(told)}"
    corrected = ", mean-corrected" if row["mean_correction"] else ""
    found = ", ".join(f"{name} {row[name]:{_DIGITS}}" for name in ("density", "recall", "error"))
    return f"{who}{corrected}: {found}"


def _assignments(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def quality_summary(rows: Sequence[Row]) -> Table:
    """All settings of a run, means over layers and heads."""
    table = Table(title=f"{conditions(rows)}; means over heads and layers", title_justify="left")
    for name in ("tokens", "selector", "setting", "density", "recall", "error", "mean-corrected"):
        table.add_column(name, justify="left" if name in ("selector", "setting") else "right")
    for length in _lengths(rows):
        found = families(rows, length)
        for name, family in zip(labels(found), found, strict=True):
            for point in family.points:
                swept = {name: value for name, value in point.settings.items() if name not in family.fixed}
                values = (point.density, point.recall, point.error, point.corrected)
                table.add_row(str(length), name, _assignments(swept), *(number(value, _DIGITS) for value in values))
    return table
