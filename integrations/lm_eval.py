"""lm-evaluation-harness: a model whose prompts are read with sparse prefill.

Importing this registers the model class "flexprefill" with lm-eval, for `simple_evaluate(model="flexprefill", ...)`.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from flexprefill_fa.choice import Choice, parse_choice
from flexprefill_fa.masks import DEFAULT_SELECTOR, get_selector

from .hf_check import check_some_sparse
from .hf_plan import AS_ASKED
from .transformers import (
    SparsePrefill,
    collect_statistics,
    default_correction,
    describe_sparse_prefill,
    enable_sparse_prefill,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHED_PROMPTS = 1024  # of 4 bytes a token


def default_choice(model: PreTrainedModel) -> Choice:
    """What runs where nothing is chosen: PeakPrefill, with tilted means if all of the model's sparse layers can."""
    return Choice(get_selector(DEFAULT_SELECTOR)(), default_correction(model))


_Base: Any = HFLM  # its decorator hides its type


class FlexPrefillLM(_Base):
    """lm-eval's Hugging Face model with sparse prefill and dense decoding.

    Args:
        pretrained: a model folder, a name, or a `PreTrainedModel`, as for `HFLM`.
        selector: "dense", `name` or `name:field=value+field=value`; mean_correction=tilted (or true) and
            dense_layers=0/4 are fields of every selector. Default: `default_choice`.
        options: of `HFLM`.

    Attributes:
        made_dense: how many layers the present choice made dense.

    Raises:
        ValueError: for a selector that does not exist or a setting that it refuses.
        TypeError, ValueError: for a model that sparse prefill cannot serve.
    """

    def __init__(self, pretrained: str | PreTrainedModel, selector: str | None = None, **options: Any) -> None:
        asked = None if selector is None else parse_choice(selector)
        super().__init__(pretrained, **options)
        model: Any = self.model
        # Sorting requests by length encodes every prompt once more, and one run asks the same of several selectors.
        encode = super().tok_encode
        self._encoded = functools.lru_cache(_CACHED_PROMPTS)(lambda *text, **more: array("i", encode(*text, **more)))
        self._sparse: SparsePrefill | None = None
        self._densities: list[Tensor] = []
        self._masks_zeros = False
        self.use(default_choice(model) if asked is None else asked)

    def use(self, choice: Choice) -> None:
        """Read prompts in another way from now on. Forgets the densities.

        Raises:
            TypeError, ValueError: for a model that sparse prefill cannot serve.
        """
        if self._sparse is not None:
            self._sparse.disable()
            self._sparse = None
        self._densities = []
        self.made_dense = 0
        if choice.config is not None:
            model: Any = self.model
            sparse = enable_sparse_prefill(model, choice.config, **choice.options)
            try:
                check_some_sparse(model)
            except ValueError as error:
                sparse.disable()
                raise ValueError(f"{choice.name} must leave a layer that runs sparse: {error}") from error
            self._sparse = sparse
            self.made_dense = sum(layer.why.startswith(AS_ASKED) for layer in describe_sparse_prefill(model))

    def density(self) -> float:
        """Kept blocks / causal blocks of all prompts since `use`; a prompt that ran dense counts as 1.

        The mean over the heads of the layers that ran sparse, and of those that the choice made dense.

        Raises:
            ValueError: if no prompt was read.
        """
        if not self._densities:
            raise ValueError("density needs at least one prompt since the selector was set, got none")
        return torch.cat(self._densities).mean().item()

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **options: Any,
    ) -> list[int]:
        """As `HFLM.tok_encode`, remembered."""
        return self._encoded(string, add_special_tokens, left_truncate_len, **options).tolist()

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return self._observed(
            context, lambda: super(FlexPrefillLM, self)._model_generate(context, *arguments, **options)
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As `HFLM`'s, whose batches end in zeros without saying how many: what they pad is masked.

        Token 0 at the end of a request would look like padding: such a request is asked alone.
        """
        ask = super()._loglikelihood_tokens
        zeros = {index for index, (_, context, asked) in enumerate(requests) if (context + asked)[-2] == 0}
        alone = {index: ask([requests[index]], disable_tqdm=disable_tqdm, override_bs=1)[0] for index in zeros}
        self._masks_zeros = True
        try:
            others = [request for index, request in enumerate(requests) if index not in zeros]
            answers = iter(ask(others, disable_tqdm=disable_tqdm, override_bs=override_bs) if others else ())
        finally:
            self._masks_zeros = False
        return [alone[index] if index in zeros else next(answers) for index in range(len(requests))]

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        call = super()._model_call
        with self._padding_masked(inps):
            return self._observed(inps, lambda: call(inps, *arguments, **options))

    def _padding_masked(self, inps: Tensor) -> AbstractContextManager[Any]:
        """Gives the model the mask of zeros at the ends of rows `[B, n]`, which `HFLM` does not pass on."""
        if not self._masks_zeros or self._sparse is None or inps[:, -1].all():
            return nullcontext()
        mask = (inps != 0).flip(1).cummax(1).values.flip(1).long()
        model: Any = self.model
        return model.register_forward_pre_hook(
            lambda module, positional, named: (positional, {**named, "attention_mask": mask}), with_kwargs=True
        )

    def _observed(self, prompts: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a prefill of prompts `[B, n]` and keep what it kept."""
        dense = torch.ones(len(prompts), device="cpu")
        if self._sparse is None:
            self._densities.append(dense)
            return run()
        model: Any = self.model
        with collect_statistics(model) as found:
            result = run()
            try:
                density = found.latest().density  # [layers, B, heads]
            except ValueError:  # every layer ran dense: the prompts are short
                self._densities.append(dense)
            else:
                sparse, others = len(density), self.made_dense
                self._densities.append((sparse * density.nanmean((0, 2)) + others) / (sparse + others))
        return result


register_model("flexprefill")(FlexPrefillLM)
