"""The documents' plots: time and speed-up against length; KL against density."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # the bench extra alone brings it

from bench.tables import KERNEL_NAMES, conditions, group_rows, split, values
from flexprefill_fa.tools.fidelity.plot import save_panels
from flexprefill_fa.tools.rows import Row

_DENSE = {"sdpa_flash": ":", "sdpa_cudnn": "-.", "FLASH": "--"}
_SPARSE = {"FLASH": "C0o-", "TRITON": "C1s-", "auto": "kx"}


def draw_attention(rows: list[Row], path: Path) -> None:
    """Time and speed-up over the best dense kernel against the length."""
    dense, selected = split(rows)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(conditions(selected, "gpu dtype batch heads kv_heads head_dim selector"), size=10)
    time, speedup = figure.subplots(1, 2)

    def line(axes: Any, members: list[Row], field: str, style: str, **more: Any) -> None:
        points = sorted((row["length"], row[field]) for row in members if row.get(field) is not None)
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=5, **more)

    for kernel, style in _DENSE.items():
        members = [row for row in dense if row["kernel"] == kernel]
        line(time, members, "total_ms", style, color="grey", label=f"dense: {KERNEL_NAMES[kernel]}")
    for backend, style in _SPARSE.items():
        members = [row for row in selected if row["backend"] == backend]
        line(time, members, "total_ms", style, label=f"sparse, {backend}")
        line(speedup, members, "speedup_best_dense", style)
    lengths = values(selected, "length")
    for axes, name in ((time, "ms, selection included"), (speedup, "speed-up over the best dense kernel")):
        axes.set(xscale="log", yscale="log", xlabel="prompt length, tokens", ylabel=name)
        axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speedup.axhline(1, color="grey", linewidth=0.8)
    time.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_fidelity(groups: list[list[Row]], path: Path) -> None:
    """KL against density, axes for each model and length."""
    found = sorted(itertools.chain(*groups), key=lambda row: (row["model"], row["length"]))
    panels = {f"{rows[0]['model']}, {rows[0]['length']:,} tokens": rows for rows in group_rows(found, "model length")}
    save_panels(panels, f"Real models on the text '{found[0]['text']}', {conditions(found, 'gpu dtype')}", path)
