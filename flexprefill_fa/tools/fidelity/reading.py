"""One forward pass over a text: the hidden states of all positions, and logits of some of them afterwards.

Logits of all positions at once would not fit: 32K tokens of a vocabulary of 152K are 20 GB in fp32.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexprefill_fa.tools.loading import UsageError

_TOLERANCE = 0.05  # of the largest logit; what rounding does in bf16 is far below, a head that misses a step far above


@dataclass(frozen=True)
class Reading:
    """What a text came to.

    Attributes:
        hidden: `[n, d]`, what the model's head gets, in the model's dtype, on the device of its last layer.
        seconds: of the forward pass, which gave the last position's logits too.
    """

    hidden: Tensor
    seconds: float


class Reader:
    """Reads texts with a model, whatever attention is on.

    Args:
        model: a causal language model of transformers.
        chunk: tokens of a forward pass, with a cache between them; None: all at once.

    Raises:
        UsageError: for a model without a head.
    """

    def __init__(self, model: Any, chunk: int | None = None) -> None:
        self._model, self._head, self._chunk = model, model.get_output_embeddings(), chunk
        if self._head is None:
            raise UsageError(f"{type(model).__name__} has no language model head: fidelity cannot be measured")
        devices = {parameter.device for parameter in model.parameters()}
        self._gpus = [device for device in devices if device.type == "cuda"]
        named = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in named else "past_key_values"  # as transformers once called it
        self._checked = False

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return self._head.weight.shape[0]

    def read(self, ids: Tensor) -> Reading:
        """Read int64 `[1, n]`.

        Raises:
            UsageError: for a model whose logits are not a function of its hidden states alone.
        """
        parts: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            parts.append(hidden[0])
            return hidden[:, -1:]

        chunks = [ids] if self._chunk is None else ids.split(self._chunk, dim=1)
        options: dict[str, Any] = {"use_cache": False}
        if len(chunks) > 1:
            options = {"use_cache": True, self._cache_argument: self._new_cache()}
        self._synchronize()
        start = time.perf_counter()
        logits = [self._run(part, keep, **options) for part in chunks][-1]
        self._synchronize()
        seconds = time.perf_counter() - start
        hidden = torch.cat(parts)
        if not self._checked:
            self._check_head(hidden[-1:], logits)
            self._checked = True
        return Reading(hidden, seconds)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[m, V]` of hidden states `[m, d]`, all that the model does to them included, such as a cap.

        The model runs on one token, whose hidden state these take the place of.
        """
        one = torch.zeros(1, 1, dtype=torch.int64, device=self._model.device)
        return self._run(one, lambda instead: hidden[None].to(instead.device), use_cache=False)

    def _run(self, ids: Tensor, change: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        """Logits `[m, V]`, of what a function makes of the hidden states `[1, n, d]` before the head gets them."""
        handle = self._head.register_forward_pre_hook(lambda module, arguments: (change(arguments[0]), *arguments[1:]))
        try:
            with torch.no_grad():
                return self._model(ids, return_dict=True, **options).logits[0]
        finally:
            handle.remove()

    def _check_head(self, hidden: Tensor, expected: Tensor) -> None:
        got = self.logits(hidden)
        apart = (got - expected).abs().max() > _TOLERANCE * expected.abs().max()
        if got.shape != expected.shape or apart:  # NaN is told where logits are compared
            raise UsageError(
                f"{type(self._model).__name__} does not make its logits from its hidden states alone: fidelity cannot "
                "be measured"
            )

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _synchronize(self) -> None:
        for device in self._gpus:
            torch.cuda.synchronize(device)
