"""Hidden states and logits of a text, and how far two of them are apart, against plain definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from hf_models import prompt, tiny_model
from torch import Tensor, nn

from flexprefill_fa.tools.fidelity import divergence
from flexprefill_fa.tools.fidelity.divergence import NotFiniteError, diverge
from flexprefill_fa.tools.fidelity.reading import Reader
from flexprefill_fa.tools.loading import UsageError

CAPPED = {"gemma2": "final_logit_softcapping", "cohere": "logit_scale", "granite": "logits_scaling"}


def all_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states_are_the_models(family: str) -> None:
    model: Any = FAMILIES[family]()
    if family in CAPPED:
        setattr(model.config, CAPPED[family], 0.3)
        for name in ("logit_scale", "logits_scaling"):
            if hasattr(model, name):
                setattr(model, name, 0.3)
    ids = prompt(1, 70)
    reader = Reader(model)
    read = reader.read(ids)
    expected = all_logits(model, ids)
    head = model.get_output_embeddings()
    torch.testing.assert_close(reader.logits(read.hidden), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reader.logits(read.hidden[3:5]), expected[3:5], atol=1e-5, rtol=1e-5)
    if family in CAPPED:
        assert not torch.allclose(head(read.hidden), expected, atol=1e-3), "nothing was done to these logits"
    assert read.seconds > 0 and reader.vocabulary == 128
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("chunk", [1, 33, 64, 70, 71])
def test_a_text_in_chunks_is_the_same_text(chunk: int) -> None:
    model = tiny_model("qwen2")
    ids = prompt(1, 70)
    lengths: list[int] = []
    model.get_decoder().register_forward_hook(lambda m, a, output: lengths.append(output.last_hidden_state.shape[1]))
    reader = Reader(model, chunk)
    reader._checked = True
    hidden = reader.read(ids).hidden
    assert lengths == [min(chunk, 70 - first) for first in range(0, 70, chunk)]
    torch.testing.assert_close(hidden, Reader(model).read(ids).hidden, atol=1e-5, rtol=1e-5)


def test_a_head_that_sees_more_than_hidden_states_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, arguments, output: output + torch.randn_like(output))
    with pytest.raises(UsageError, match="LlamaForCausalLM does not make its logits from its hidden states"):
        Reader(model).read(prompt(1, 70))


class Table(nn.Module):
    """Stands for a model: a hidden state is a row number of a table of logits."""

    vocabulary = 4

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[:, 0].long()]


def readings(p: Tensor, q: Tensor) -> tuple[Any, Tensor, Tensor]:
    rows = torch.arange(len(p), dtype=torch.float32)[:, None]
    return Table(torch.cat((p, q))), rows, rows + len(p)


@pytest.mark.parametrize("elements", [4, 12, 2**20])
@pytest.mark.parametrize("skip", [0, 5, 98])
def test_divergence_is_as_defined(elements: int, skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergence._PIECE_ELEMENTS, "cpu", elements)
    p, q = torch.randn(2, 100, 4) * 2
    ids = torch.randint(0, 4, (1, 100))
    reader, dense, sparse = readings(p, q)
    found = diverge(reader, dense, sparse, ids, skip)
    log_p, log_q = p.double().log_softmax(-1)[skip:-1], q.double().log_softmax(-1)[skip:-1]
    kl = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    targets = ids[0, skip + 1 :]
    assert found.positions == 99 - skip == len(kl)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-5)
    assert found.dense_loss == pytest.approx(nn.functional.nll_loss(log_p, targets).item(), rel=1e-5)
    assert found.loss == pytest.approx(nn.functional.nll_loss(log_q, targets).item(), rel=1e-5)
    assert found.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1))[skip:-1].double().mean().item())
    reverse = diverge(reader, sparse, dense, ids, skip)
    assert reverse.kl != pytest.approx(found.kl, rel=1e-3), "KL is not symmetric"
    same = diverge(reader, dense, dense, ids, skip)
    assert same == replace(found, kl=0, kl_99=0, loss=found.dense_loss, same_top=1)


def test_tokens_that_a_model_rules_out_do_not_count() -> None:
    p, q = torch.randn(2, 50, 4)
    p[:, 3] = q[:, 3] = -torch.inf
    ids = torch.randint(0, 3, (1, 50))
    whole = diverge(*readings(p, q), ids, 0)
    reader, dense, sparse = readings(p[:, :3], q[:, :3])
    assert whole == diverge(reader, dense, sparse, ids, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dense", [True, False])
def test_logits_that_are_not_finite_are_told(dense: bool, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergence._PIECE_ELEMENTS, "cpu", 40)
    p, q = torch.randn(2, 50, 4)
    (p if dense else q)[37, 1] = bad
    ids = torch.randint(0, 4, (1, 50))
    with pytest.raises(NotFiniteError, match="the logits of position 37 are not finite") as caught:
        diverge(*readings(p, q), ids, 10)
    assert caught.value.dense == dense and caught.value.position == 37
    assert diverge(*readings(p, q), ids, 38).positions == 11
