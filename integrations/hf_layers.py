"""Which modules of a model are its language layers, in whatever the model is wrapped, and which parts are others."""

from __future__ import annotations

from . import hf_version  # noqa: F401  # isort: skip

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .hf_config_view import original


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model itself, of a module that holds exactly one: an adapter's, a compiled or a parallel one's.

    Raises:
        TypeError: for what is none and holds none, or several.
    """
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        hint = f"; pass its .model, a {type(inner).__name__}" if isinstance(inner, nn.Module) else ""
        raise TypeError(f"model must be a transformers PreTrainedModel, got {kind}{hint}")
    found = _outermost(model)
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise TypeError(f"model must be a transformers PreTrainedModel, got {kind}, which holds none")
    names = ", ".join(f"{name} ({type(inner).__name__})" for name, inner in found.items())
    raise TypeError(
        f"model must be a transformers PreTrainedModel, got {kind}, which holds {len(found)}: pass one of them, {names}"
    )


def _outermost(root: nn.Module) -> dict[str, PreTrainedModel]:
    """The transformers models in a module by name, without those inside another of them."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in root.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


@dataclass(frozen=True)
class Part:
    """A part of a model that keeps its own attention, such as a vision tower or layers of cross attention.

    Attributes:
        name: within the model, with * for the numbers of layers.
        kind: its class.
        implementation: of its attention; None where its config does not say.
    """

    name: str
    kind: str
    implementation: str | None


@dataclass(frozen=True)
class Layout:
    """What a model is made of.

    Attributes:
        layers: the attention modules of the decoder, with the index of each. Several may have one index.
        hosts: the innermost transformers models that hold one of them.
        holders: the other modules by whose config these layers' attention and masks are chosen.
        parts: the rest of what attends.
    """

    layers: dict[nn.Module, int]
    hosts: tuple[PreTrainedModel, ...]
    holders: tuple[nn.Module, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layout:
        """Look at a model; one without a language layer has parts alone."""
        names = {module: name for name, module in model.named_modules()}
        scope = _decoder_modules(model)
        attending = [module for module in scope if _has_index(module) and not _is_cross(module)]
        text = model.config.get_text_config(decoder=True).__class__
        attending = [module for module in attending if module.config.__class__ is text] or attending
        # Layers that look both ways beside causal ones are an encoder's.
        attending = [module for module in attending if getattr(module, "is_causal", True)] or attending
        layers: dict[nn.Module, Any] = {module: module.layer_idx for module in attending}
        around = {name for module in layers for name in _enclosing(names[module])}
        configs = {id(original(module.config)) for module in layers}
        holders = tuple(
            module
            for module, name in names.items()
            if module not in layers
            and isinstance(config := vars(module).get("config"), PreTrainedConfig)
            and (name in around or (module in scope and id(original(config)) in configs and not _attends(module)))
        )
        inside = tuple(f"{names[module]}." for module in layers)
        others = [
            name
            for module, name in names.items()
            if _attends(module) and module not in layers and name not in around and not name.startswith(inside)
        ]
        parts: dict[str, Part] = {}
        for name in others:
            top = next((outer for outer in _enclosing(name) if outer not in around), name)
            kind, starred = type(model.get_submodule(top)).__name__, re.sub(r"\.\d+(?=\.|$)", ".*", top)
            parts.setdefault(starred, Part(starred, kind, _implementation(model, name)))
        hosts = {name: module for module, name in names.items() if isinstance(module, PreTrainedModel)}
        around_each = (reversed(_enclosing(names[module])) for module in layers)
        inner = (next(hosts[name] for name in enclosing if name in hosts) for enclosing in around_each)
        return cls(layers, tuple(dict.fromkeys(inner)), holders, tuple(parts.values()))


def _decoder_modules(model: PreTrainedModel) -> dict[nn.Module, None]:
    """The modules among which the language layers are, in order."""
    decoder: Any = model.get_decoder()
    if isinstance(decoder, nn.Module) and any(map(_has_index, decoder.modules())):
        return dict.fromkeys(decoder.modules())
    return dict.fromkeys(model.modules())


def _enclosing(name: str) -> list[str]:
    """The names of the modules around one, from the model itself ("") on."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "is_causal") or type(module).__name__.endswith("Attention")


def _has_index(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config") and _attends(module)


def _is_cross(module: nn.Module) -> bool:
    """Whether a layer's keys are not those of its own tokens, but an image's."""
    return "CrossAttention" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def _implementation(model: PreTrainedModel, name: str) -> str | None:
    """By the config of the module of that name, or of the next around it."""
    for outer in (name, *reversed(_enclosing(name))):
        config = vars(model.get_submodule(outer)).get("config")
        if isinstance(config, PreTrainedConfig):
            return config._attn_implementation
    return None
