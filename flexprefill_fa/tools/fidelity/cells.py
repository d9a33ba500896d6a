"""Cells of a fidelity table: one text, length and setting each, read from earlier rows or measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.choice import Choice
from flexprefill_fa.integrations.hf_check import check_some_sparse
from flexprefill_fa.integrations.transformers import (
    describe_sparse_prefill,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.tools.fidelity import FIDELITY_KIND
from flexprefill_fa.tools.fidelity.divergence import NotFiniteError, diverge
from flexprefill_fa.tools.fidelity.kept import KeptBlocks, LayerKept, causal_blocks
from flexprefill_fa.tools.fidelity.reading import Reader, Reading
from flexprefill_fa.tools.fidelity.texts import Tokens
from flexprefill_fa.tools.fidelity.trial import CellError, Trial
from flexprefill_fa.tools.generation import WARM_UP_TOKENS, refusal_in_one_line
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.rows import Row, model_conditions

_OUTCOMES = (
    *("model", "text", "positions", "density", "recall", "kl", "kl_99", "dense_loss", "loss", "loss_difference"),
    *("same_top", "layers", "layer_density", "layer_recall", "timing"),
)
"""The fields of a row that are found out, and names; all others say whether a cell is done already."""

_AFFORDABLE_SCORES = {"cpu": 2**32, "cuda": 2**38}
"""Causal scores of all layers and heads up to which recall is measured unless asked otherwise: a minute or less."""


@dataclass(frozen=True)
class Conditions:
    """How everything is measured.

    Attributes:
        skip: first positions of a text that do not count.
        chunk: tokens of a forward pass, None for all.
        recall: whether to measure recall; None: where it is affordable.
    """

    skip: int
    chunk: int | None
    recall: bool | None


class Fidelity:
    """Measures settings on texts, each once.

    Args:
        model: a causal language model.
        folder: where it was read from. name: what rows call it.
        texts: what it reads.
        conditions: how.
        before: rows of earlier runs.
        finished: called with every new row.

    Attributes:
        dtype: of the model.
        rows: of this run, those that were there before included.
    """

    def __init__(
        self,
        model: Any,
        folder: str | Path,
        name: str,
        texts: Sequence[Tokens],
        conditions: Conditions,
        before: Sequence[Row],
        finished: Callable[[Row], None],
    ) -> None:
        self._model, self._name, self._texts, self._conditions = model, name, texts, conditions
        self._reader = Reader(model, conditions.chunk)
        self._finished = finished
        self._known = [row for row in before if row["kind"] == FIDELITY_KIND]
        self._dense: dict[tuple[int, str], Reading] = {}  # of one length and each text
        self._warm: set[Any] = set()
        devices = {parameter.device for parameter in model.parameters()}
        self._described: Row = {
            "kind": FIDELITY_KIND,
            **model_conditions(model, folder),
            "devices": len(devices),
            "skip": conditions.skip,
            "chunk": conditions.chunk,
        }
        self.dtype: str = self._described["dtype"]
        self.rows: list[Row] = []

    def check(self, choice: Choice) -> None:
        """Check that the model can run a choice.

        Raises:
            UsageError: saying why not.
        """
        with self._sparse(choice):
            pass

    def measure(self, choice: Choice, length: int) -> Trial:
        """A row for every text, from the earlier ones where they are there.

        Raises:
            CellError: for logits that are not finite with this setting.
            UsageError: for logits of the dense model that are not.
        """
        rows = [self._row(choice, text, length) for text in self._texts]
        for row in rows:
            if row not in self.rows:
                self.rows.append(row)
        return Trial(choice, statistics.fmean(row["density"] for row in rows), max(row["kl"] for row in rows))

    def layer_densities(self, choice: Choice, length: int) -> dict[int, float]:
        """Layer -> density of the layers of a measured setting that a selector decided about, mean over texts."""
        rows = [self._row(choice, text, length) for text in self._texts]
        columns = zip(*(row["layer_density"] for row in rows), strict=True)
        return dict(zip(rows[0]["layers"], map(statistics.fmean, columns), strict=True))

    def _row(self, choice: Choice, text: Tokens, length: int) -> Row:
        known = self._identity(choice, text, length)
        recall = self._wants_recall(length)
        for row in self._known:
            same = {key: value for key, value in row.items() if key not in _OUTCOMES} == known
            if same and not (recall and row["recall"] is None):
                return row
        row = {"model": self._name, "text": text.name, **known, **self._measured(choice, text, length, recall)}
        self._known.append(row)
        self._finished(row)
        return row

    def _identity(self, choice: Choice, text: Tokens, length: int) -> Row:
        row = {
            **self._described,
            "text_sha256": text.sha256(length),
            "length": length,
            "selector": choice.name,
            "settings": dataclasses.asdict(choice.config),
            "mean_correction": choice.mean_correction,
            "dense_layers": list(choice.dense_layers),
        }
        return json.loads(json.dumps(row))  # as a row that was read back

    def _wants_recall(self, length: int) -> bool:
        if self._conditions.recall is not None:
            return self._conditions.recall
        config = self._model.config.get_text_config(decoder=True)
        scores = config.num_hidden_layers * config.num_attention_heads * length * (length + 1) // 2
        return scores <= _AFFORDABLE_SCORES.get(self._model.device.type, 0)

    def _measured(self, choice: Choice, text: Tokens, length: int, recall: bool) -> Row:
        start = time.perf_counter()
        ids = torch.tensor([text.first(length)], device=self._model.device)
        dense = self._dense_reading(text, ids)
        causal = causal_blocks(length, self._conditions.chunk, choice.config.block_size)
        with self._sparse(choice):
            described = describe_sparse_prefill(self._model)
            self._warm_up((choice.name, choice.config.block_size, choice.mean_correction), ids, choice)
            kept = KeptBlocks(length, recall=False)
            with observe_sparse_prefill(self._model, kept):
                sparse = self._reader.read(ids)
            if recall:  # another pass, because exact attention would count as prefill time
                kept = KeptBlocks(length, recall=True)
                with observe_sparse_prefill(self._model, kept):
                    self._reader.read(ids)
        layers = kept.layers(described, causal)
        try:
            found = diverge(self._reader, dense.hidden, sparse.hidden, ids, self._conditions.skip)
        except NotFiniteError as error:
            where = f"position {error.position} of the text {text.name} in {self.dtype}"
            if error.dense:
                raise UsageError(f"the dense model gives NaN at {where}: try another --dtype") from error
            raise CellError(f"{choice.name} gives NaN at {where}, {length} tokens; dense does not") from error
        return {
            "positions": found.positions,
            "density": round(statistics.fmean(layer.density for layer in layers), 5),
            "recall": _mean_recall(layers),
            "kl": _digits(found.kl),
            "kl_99": _digits(found.kl_99),
            "dense_loss": round(found.dense_loss, 5),
            "loss": round(found.loss, 5),
            "loss_difference": round(found.loss - found.dense_loss, 5),
            "same_top": round(found.same_top, 5),
            "layers": [layer.layer for layer in layers],
            "layer_density": [round(layer.density, 4) for layer in layers],
            "layer_recall": [round(layer.recall, 4) for layer in layers if layer.recall is not None],
            "timing": {
                "prefill_s": round(sparse.seconds, 4),
                "dense_prefill_s": round(dense.seconds, 4),
                "seconds": round(time.perf_counter() - start, 1),
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            },
        }

    def _dense_reading(self, text: Tokens, ids: Tensor) -> Reading:
        length = ids.shape[1]
        key = length, text.sha256(length)
        if key not in self._dense:
            self._dense = {other: kept for other, kept in self._dense.items() if other[0] == length}
            self._warm_up(None, ids, None)
            reading = self._reader.read(ids)
            self._dense[key] = dataclasses.replace(reading, hidden=reading.hidden.cpu())
        return self._dense[key]

    def _warm_up(self, kind: Any, ids: Tensor, choice: Choice | None) -> None:
        """Compile before the clock runs. On a GPU, kernels are made for lengths too."""
        gpu = self._model.device.type == "cuda"
        key = (kind, ids.shape[1]) if gpu else kind
        if key in self._warm:
            return
        tokens = WARM_UP_TOKENS if choice is None else max(WARM_UP_TOKENS, 2 * choice.config.dense_tokens)
        self._reader.read(ids if gpu else ids[:, :tokens])
        self._warm.add(key)

    def _sparse(self, choice: Choice) -> Any:
        """The model with sparse prefill on, until the context ends.

        Raises:
            UsageError: where the model refuses it.
        """
        with refusal_in_one_line():
            handle = enable_sparse_prefill(self._model, choice.config, **choice.options)
            try:
                check_some_sparse(self._model)
            except ValueError:
                handle.disable()
                raise
        return handle


def _mean_recall(layers: Sequence[LayerKept]) -> float | None:
    known = [layer.recall for layer in layers if layer.recall is not None]
    return round(statistics.fmean(known), 5) if known else None


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
