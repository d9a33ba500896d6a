"""`flexprefill inspect --why`: why blocks are kept, as text."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_checks import assert_refused
from inspect_pages import read_data
from test_cli import run
from test_inspect import OPTIONS, SIZES, prompt  # noqa: F401 (a fixture)
from torch import Tensor
from typer.testing import Result

from flexprefill_fa import PeakPrefillConfig
from flexprefill_fa.integrations.transformers import SparseCall, enable_sparse_prefill, observe_sparse_prefill
from flexprefill_fa.tools.inspection import why
from flexprefill_fa.tools.inspection.place import Place
from flexprefill_fa.tools.inspection.why import explain_place
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.progress import WorkProgress

CONFIG = PeakPrefillConfig(peak=0.1, per_block=3)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(1, 2000, (1, 1200), generator=torch.Generator().manual_seed(0))


def explain(model: Any, input_ids: Tensor, *place: int, config: Any = CONFIG) -> list[str]:
    return explain_place(model, input_ids, config, WorkProgress(), False, Place(*place))


@pytest.fixture(scope="module")
def call(needle_model: Any, input_ids: Tensor) -> SparseCall:
    """Layer 3's."""
    calls: list[SparseCall] = []
    sparse = enable_sparse_prefill(needle_model, CONFIG)
    with sparse, observe_sparse_prefill(needle_model, calls.append), torch.no_grad():
        needle_model(input_ids)
    return calls[3]


def shares_by_row(call: SparseCall, head: int, block: int, row: int) -> Tensor:
    """What one row gives each block, from its scores with the representatives."""
    from flexprefill_fa.grid import Grid
    from flexprefill_fa.masks.element import element_of
    from flexprefill_fa.masks.peakprefill.reference import log_shares
    from flexprefill_fa.masks.peakprefill.representatives import representatives

    found = element_of(call.query[0], call.key[0], 0, 1200, Grid(1200, 1200, 128), call.scale)
    assert found is not None
    shares = torch.cat([shares for _, shares in log_shares(found[0], *representatives(found[0], CONFIG))], 1)
    return shares[head, block, row].exp()


LINE = re.compile(
    r"key block (?P<block>\d+) \((?P<first>\d[\d,]*)–(?P<last>\d[\d,]*)\) (?P<kept>kept: [a-z ,]+|not kept); largest "
    r"share (?P<share>[01]\.\d{4}) of one query's attention, given by query (?P<query>[\d,]+) through "
    r"(?P<through>representative \d|all of its keys): (?P<side>at least|below) peak 0\.1"
)


@pytest.mark.parametrize(("head", "block"), [(0, 0), (6, 5), (0, 8), (6, 8), (6, 9)])
def test_every_kept_block_has_its_clause_and_its_share(
    needle_model: Any, input_ids: Tensor, call: SparseCall, head: int, block: int
) -> None:
    first, *lines = explain(needle_model, input_ids, 3, head, block)
    kept = call.selection.to_dense()[0, head, block].nonzero()[:, 0].tolist()
    span = f"{128 * block:,}–{min(128 * block + 127, 1199):,}"
    where = f"layer 3, head {head}, query block {block} ({span})"
    assert first == f"{where}: {len(kept)} of {block + 1} key blocks kept"
    found = [LINE.fullmatch(line) for line in lines]
    assert [int(line["block"]) for line in found if line] == kept
    for line in found:
        assert line is not None
        key_block, query = int(line["block"]), int(line["query"].replace(",", ""))
        names = [name for name, holds in (("first block", key_block == 0), ("own positions", key_block == block),
                                          ("last query blocks", block == 9)) if holds]  # fmt: skip
        assert line["kept"] == f"kept: {', '.join(names) or 'the rule'}"
        share = shares_by_row(call, head, block, query - 128 * block)[key_block].item()
        assert float(line["share"]) == pytest.approx(share, abs=6e-5)
        assert line["side"] == ("at least" if share >= 0.1 else "below") and (names or share >= 0.1)
        assert (line["through"] == "all of its keys") == (key_block in (0, block))


def test_a_key_block_that_is_not_kept(needle_model: Any, input_ids: Tensor, call: SparseCall) -> None:
    keep = call.selection.to_dense()[0, 6, 8]
    dropped = (~keep[:8]).nonzero()[0].item()
    kept = keep[:8].nonzero()[-1].item()
    (line,) = explain(needle_model, input_ids, 3, 6, 8, int(dropped))
    where = "layer 3, head 6, query block 8 (1,024–1,151), "
    found = LINE.fullmatch(line.removeprefix(where))
    assert found is not None and line.startswith(where)
    assert (found["kept"], found["side"], int(found["block"])) == ("not kept", "below", dropped)
    rows = torch.stack([shares_by_row(call, 6, 8, row) for row in range(128)])
    assert float(found["share"]) == pytest.approx(rows[:, int(dropped)].max().item(), abs=6e-5)
    (line,) = explain(needle_model, input_ids, 3, 6, 8, int(kept))
    found = LINE.fullmatch(line.removeprefix(where))
    assert found is not None and found["kept"].startswith("kept: ")


def test_a_selector_without_shares(needle_model: Any, input_ids: Tensor) -> None:
    from flexprefill_fa import XAttentionConfig

    config = XAttentionConfig(threshold=0.8)
    first, *lines = explain(needle_model, input_ids, 3, 6, 8, config=config)
    assert first.endswith("of 9 key blocks kept (xattention has no share of single blocks to show)")
    assert lines[0] == "key block 0 (0–127) kept: first block"
    assert lines[-1] == "key block 8 (1,024–1,151) kept: own positions"
    assert any(line.endswith(" kept: the rule") for line in lines)
    kept = {int(line.split()[2]) for line in lines}
    (block,) = list(set(range(9)) - kept)[:1]
    (line,) = explain(needle_model, input_ids, 3, 6, 8, block, config=config)
    assert (
        line.endswith(" not kept (xattention has no share of single blocks to show)") and f"key block {block} (" in line
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((6, 0, 0), "layer must be one with attention (0, 1, 2, 3, 4, 5), got 6"),
        ((0, 8, 0), "head must be from 0 to 7, got 8"),
        ((0, 0, 10), "query block must be from 0 to 9, got 10"),
        ((0, 0, 4, 5), "key block for query block 4 must be from 0 to 4, got 5"),
    ],
)
def test_places_that_are_not_there(needle_model: Any, input_ids: Tensor, place: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        explain(needle_model, input_ids, *place)


def test_layers_count_as_the_model_counts_them(input_ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose other layers have no attention."""
    described = [SimpleNamespace(layer=layer, runs="sparse", why="") for layer in (3, 7)]
    monkeypatch.setattr(why, "watch_prefill", lambda *arguments: arguments[-1](described))
    for layer in (0, 1, 8):
        with pytest.raises(UsageError, match=rf"^layer must be one with attention \(3, 7\), got {layer}$"):
            explain(None, input_ids, layer, 0, 4)
    with pytest.raises(UsageError, match=r"^layer 7 ran dense in this prompt"):
        explain(None, input_ids, 7, 0, 4)


def test_layers_that_do_not_run_sparse(input_ids: Tensor, monkeypatch: pytest.MonkeyPatch, needle_model: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **kinds)).eval()
    with pytest.raises(UsageError, match=r"^layer 0 runs window, no selector decides there: a sliding window of 256"):
        explain(model, input_ids, 0, 0, 4)
    assert explain(model, input_ids, 1, 0, 4)[0].startswith("layer 1, head 0, query block 4 (512–639): ")
    monkeypatch.setattr(why, "watch_prefill", lambda *_: None)  # where the layer got a mask, for one
    with pytest.raises(UsageError, match=r"^layer 1 ran dense in this prompt of 1200 tokens: every block was kept$"):
        explain(needle_model, input_ids, 1, 0, 4)


def inspect(prompt: Path, *options: str) -> Result:  # noqa: F811
    return run("inspect", "--model", str(MODEL_DIR), "--prompt-file", str(prompt), *options)


def test_the_command_with_and_without_a_page(prompt: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "report.html"
    text = inspect(prompt, *OPTIONS, "--why", "4,5,16")
    assert text.exit_code == 0, text.output
    lines = text.stdout.splitlines()
    assert lines[0].startswith("layer 4, head 5, query block 16 (2,048–2,175): ") and len(lines) > 2
    assert lines[1] == "key block 0 (0–127) kept: first block"
    both = inspect(prompt, *OPTIONS, "--why", "4,5,16", "--out", str(out))
    assert both.exit_code == 0, both.output
    assert both.stdout.splitlines()[:-1] == lines and both.stdout.splitlines()[-1].startswith(f"{out}: 48 heads in 6")
    assert len(read_data(out.read_text(encoding="utf-8"))["heads"]) == 48


def test_bad_input(prompt: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_refused(inspect(prompt, *OPTIONS), "inspect needs --out for a page, --why for text, or both")
    for text in ("", "1", "1,2", "1,2,3,4,5", "1,2,-3", "a,b,c", "1, 2, 3", "1,2,3.5", "１,2,3"):
        refused = inspect(tmp_path / "missing", *OPTIONS, f"--why={text}")
        assert_refused(refused, "why must be LAYER,HEAD,QUERY_BLOCK or LAYER,HEAD,QUERY_BLOCK,KEY_BLOCK", repr(text))
    out = tmp_path / "report.html"
    assert_refused(
        inspect(prompt, *OPTIONS, "--why", "9,0,0", "--out", str(out)),
        "layer must be one with attention (0, 1, 2, 3, 4, 5), got 9",
    )
    assert not out.exists()
