"""Checkpoints of a training run: weights and AdamW's averages, exactly, in files small enough to copy about."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexprefill_fa.tools.loading import UsageError

_FACTS = "state.json"
_AVERAGES = ("exp_avg", "exp_avg_sq")
_FILE_BYTES = 15 * 2**20


def save(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Write a checkpoint in place of the one that is there; a stop in between leaves one or the other.

    Args:
        folder: of the checkpoint.
        network, optimizer: a network, and an AdamW over its parameters.
        facts: JSON values to find again; "step" is the number of steps made.
    """
    from safetensors.torch import save_file

    fresh, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = dict(_tensors(network, optimizer))
    for number, names in enumerate(_parts(tensors)):
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(part, fresh / f"part-{number}.safetensors")
    (fresh / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, expected: dict[str, Any]) -> int:
    """Put a checkpoint into a network and its AdamW.

    Args:
        folder: of the checkpoint.
        network, optimizer: as for `save`; changed in place.
        expected: facts that the checkpoint must agree with.

    Returns:
        The steps that were made; 0 where there is no checkpoint.

    Raises:
        UsageError: for a checkpoint of another run, or a broken one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not folder.exists() and (old := folder.with_name(f"{folder.name}.old")).exists():
        old.rename(folder)
    if not folder.exists():
        return 0
    elsewhere = "remove it, or name another folder with --out"
    found: dict[str, Tensor] = {}
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        for file in sorted(folder.glob("part-*.safetensors")):
            found |= load_file(file)
        step = int(facts["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"the checkpoint in {folder} cannot be read ({error}): {elsewhere}") from error
    for name, value in expected.items():
        if facts.get(name) != value:
            raise UsageError(
                f"the checkpoint in {folder} is of another run ({name} is {facts.get(name)!r}, not {value!r}): "
                f"{elsewhere}"
            )
    if step > 0:
        for parameter in network.parameters():
            averages = {name: torch.zeros_like(parameter) for name in _AVERAGES}
            # The fused kernel reads the count on its device.
            optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **averages}
    wanted = dict(_tensors(network, optimizer))
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())[0]
        raise UsageError(f"the checkpoint in {folder} is not whole or not of this model ({odd}): {elsewhere}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    return step


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in network.named_parameters():
        yield f"weights.{name}", parameter
        for average in _AVERAGES:
            if average in optimizer.state[parameter]:
                yield f"{average}.{name}", optimizer.state[parameter][average]


def _parts(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names in groups that fit a file."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        added = tensor.numel() * tensor.element_size()
        if names and size + added > _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += added
    yield names
