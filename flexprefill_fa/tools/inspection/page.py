"""The report of an inspection: one HTML file with its style, script and data inside, which loads nothing else."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from importlib.resources import files
from typing import Any

from flexprefill_fa.tools.inspection.collect import Inspection
from flexprefill_fa.tools.inspection.maps import DECADES, KINDS
from flexprefill_fa.tools.inspection.reasons import rule_words


def render(inspection: Inspection, about: dict[str, Any]) -> str:
    """The page.

    Args:
        inspection: what to show.
        about: conditions and settings for the header, by name, as strings, numbers or None.

    Returns:
        HTML with the data as JSON in the element `data`, and the maps of layer N, compressed by zlib and in base64, in
        the element `maps-N`, its reasons in `reasons-N`. At most `MAP_BYTES` of both and some 70 bytes for each head,
        beside 30 KB of page.
    """
    template, style = _asset("page.html"), _asset("page.css")
    script = _asset("heads.js") + _asset("overview.js")
    packed = {f"maps-{layer}": found.data for layer, found in inspection.maps.items()}
    packed |= {f"reasons-{layer}": found.data for layer, found in inspection.reasons.items()}
    maps = "\n".join(
        f'<script type="text/plain" id="{name}">{_packed(found)}</script>' for name, found in packed.items()
    )
    page = template.replace("/* style */", style).replace("/* script */", script)
    before, after = page.split("<!-- data -->")
    data = json.dumps(_data(inspection, about), ensure_ascii=True, allow_nan=False)
    # In a script element, "</script>" or "<!--" in a name would end the data.
    data = data.replace("<", "\\u003c")
    return f'{before}<script type="application/json" id="data">{data}</script>\n{maps}{after}'


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _data(inspection: Inspection, about: dict[str, Any]) -> dict[str, Any]:
    layers = []
    for layer in inspection.layers:
        entry = {"layer": layer.layer, "runs": layer.runs, "why": layer.why}
        if layer.layer is not None and (found := inspection.maps.get(layer.layer)):
            entry |= {"group": found.group, "cells": found.cells}
            if why := inspection.reasons.get(layer.layer):
                entry["reasons"] = {name: value for name, value in vars(why).items() if name != "data"}
        layers.append(entry)
    return {
        "about": about,
        "tokens": inspection.tokens,
        "block_size": inspection.config.block_size,
        "density": inspection.density,
        "recall": inspection.recall,
        "decades": DECADES,
        "kinds": KINDS,
        "rule": rule_words(inspection.config),
        "layers": layers,
        "heads": [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}
            for fields in map(dataclasses.asdict, inspection.heads)
        ],
    }


def _asset(name: str) -> str:
    return (files("flexprefill_fa.tools.inspection") / name).read_text(encoding="utf-8")
