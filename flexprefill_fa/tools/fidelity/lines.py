"""A setting as lines to paste: into Python, and into a shell for vLLM."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

import flexprefill_fa
from flexprefill_fa.choice import Choice
from flexprefill_fa.integrations.vllm_config import SECTION
from flexprefill_fa.tools.fidelity.knobs import knob_fields


def python_lines(choice: Choice) -> str:
    """Imports, and the call that switches the setting on for a `model`."""
    config: Any = choice.config
    kind = type(config).__name__
    home = "flexprefill_fa" if hasattr(flexprefill_fa, kind) else "flexprefill_fa.masks"
    fields = ", ".join(f"{name}={value!r}" for name, value in _changed(config).items())
    options = {"dense_layers": choice.dense_layers, "mean_correction": choice.mean_correction}
    more = "".join(f", {name}={value!r}" for name, value in options.items() if value)
    return (
        f"from {home} import {kind}\n"
        "from flexprefill_fa.integrations.transformers import enable_sparse_prefill\n"
        f"enable_sparse_prefill(model, {kind}({fields}){more})"
    )


def vllm_line(choice: Choice, model: str) -> str | None:
    """The command that serves a model with the setting; None where vLLM's backend does not have what it needs."""
    if choice.dense_layers or choice.mean_correction:
        return None
    config: Any = choice.config
    settings = json.dumps({SECTION: {"selector": config.name, **_changed(config)}})
    return f"vllm serve {shlex.quote(model)} --attention-backend CUSTOM --additional-config {shlex.quote(settings)}"


def _changed(config: Any) -> dict[str, Any]:
    """The knob, and the fields that are not the selector's usual ones."""
    usual, knob = dataclasses.asdict(type(config)()), knob_fields(config.name)
    return {name: value for name, value in dataclasses.asdict(config).items() if name in knob or value != usual[name]}
