"""`flexprefill inspect`: the maps, the data in the page, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_pages import read_data, read_maps, synthetic
from oracle_attention import attention_probabilities
from test_cli import assert_one_line_error, run, tiny_models  # noqa: F401 (a fixture)
from tokenizers import Tokenizer
from torch import Tensor
from typer.testing import Result

from flexprefill_fa import FlexPrefillConfig, select_blocks
from flexprefill_fa.integrations.hf_attention import _record
from flexprefill_fa.integrations.hf_plan import default_plan
from flexprefill_fa.integrations.transformers import (
    SparseCall,
    collect_statistics,
    enable_sparse_prefill,
    observe_sparse_prefill,
)
from flexprefill_fa.selection import every_block
from flexprefill_fa.tools.inspection.collect import inspect_prefill
from flexprefill_fa.tools.inspection.maps import MAP_BYTES, MAX_CELLS, blocks_per_cell, layer_maps, quantise_share
from flexprefill_fa.tools.inspection.output import write_atomically
from flexprefill_fa.tools.inspection.page import render
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import build_prompt
from flexprefill_fa.tools.progress import WorkProgress

TOKENS = 2200  # 18 blocks of 128 tokens, the last one short
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "eos_token_id": 0,
}  # fmt: skip
CONFIG = FlexPrefillConfig(gamma=0.8, min_budget=128)
OPTIONS = ("--gamma", "0.8", "--min-budget", "128", "--dtype", "float32", "--device", "cpu")


def inspect(prompt: Path | str, out: Path | str, *options: str, model: Path | str = MODEL_DIR, **more: Any) -> Result:
    return run("inspect", "--model", str(model), "--prompt-file", str(prompt), "--out", str(out), *options, **more)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A needle prompt as text, in a file whose name would end a script element."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    path = tmp_path_factory.mktemp("prompt") / "<!--<script>.txt"
    path.write_text(tokenizer.decode(build_prompt(tokenizer, TOKENS).token_ids), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page(prompt: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    result = inspect(prompt, out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: 48 heads in 6 of 6 layers, density 0.")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def input_ids(prompt: Path) -> Tensor:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return torch.tensor([tokenizer.encode(prompt.read_text(encoding="utf-8")).ids])


def test_observer_sees_each_layers_selection(needle_model: Any, input_ids: Tensor, page: str) -> None:
    """What the observer is shown is what ran, and the page's numbers are those of `BlockSelection`."""
    calls: list[SparseCall] = []
    with enable_sparse_prefill(needle_model, CONFIG), collect_statistics(needle_model, recall=True) as found:
        with observe_sparse_prefill(needle_model, calls.append), torch.no_grad():
            needle_model(input_ids)
        count = len(calls)
        with torch.no_grad():
            needle_model(input_ids)
        assert len(calls) == count, "it was still called"
        rows = found.latest().rows()
    assert [call.layer for call in calls[:6]] == list(range(6))
    heads = read_data(page)["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [
        (layer, head) for layer in range(6) for head in range(8)
    ]
    for call in calls[:6]:
        mine = [head for head in heads if head["layer"] == call.layer]
        density, recall = (
            call.selection.density()[0].tolist(),
            call.selection.recall(call.query, call.key, scale=call.scale)[0].tolist(),
        )
        assert [head["density"] for head in mine] == pytest.approx(density, abs=2e-6)
        assert [head["recall"] for head in mine] == pytest.approx(recall, abs=1e-5)
        assert torch.equal(read_maps(page, call.layer, 8)[:, 0] == 255, call.selection.to_dense()[0])
    for head, row in zip(heads, rows, strict=True):
        assert head["pattern"] == row["pattern"][0]
        assert head["js_distance"] == pytest.approx(row["js_distance"][0], abs=2e-6)
        assert (head["density"], head["recall"]) == pytest.approx((row["density"][0], row["recall"][0]), abs=1e-5)


def test_an_observer_needs_an_uncompiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(1, 1, 8, 16)
    call = SparseCall(0, every_block(tensor, tensor, 128), tensor, tensor, 1, None)
    plan = default_plan()
    plan.observer = print
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="an observer of sparse prefill needs an uncompiled model"):
        _record(plan, call)


def test_an_observer_needs_sparse_prefill(needle_model: Any) -> None:
    message = "observe_sparse_prefill is for sparse prefill: call enable_sparse_prefill"
    with pytest.raises(ValueError, match=message), observe_sparse_prefill(needle_model, print):
        pass


def test_the_first_layer_against_an_oracle(needle_model: Any, input_ids: Tensor, page: str) -> None:
    """Queries and keys caught in a dense prefill: the first layer's are the same."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    caught: list[tuple[Tensor, Tensor]] = []

    def catching(module: Any, query: Tensor, key: Tensor, *arguments: Any, **options: Any) -> Any:
        caught.append((query, key))
        return sdpa_attention_forward(module, query, key, *arguments, **options)

    AttentionInterface.register("catching", catching)
    needle_model.set_attn_implementation("catching")
    try:
        with torch.no_grad():
            needle_model(input_ids)
    finally:
        needle_model.set_attn_implementation("sdpa")
    query, key = caught[0]
    length, blocks = input_ids.shape[1], -(-input_ids.shape[1] // 128)
    assert length % 128, "the last block should be short"
    keep = select_blocks(query, key, CONFIG).to_dense()[0]
    probabilities = attention_probabilities(query, key)[0]
    padded = torch.nn.functional.pad(probabilities, (0, blocks * 128 - length, 0, blocks * 128 - length))
    mass = padded.unflatten(-1, (-1, 128)).sum(-1).unflatten(-2, (-1, 128)).sum(-2)
    rows = mass.sum(-1, keepdim=True)
    maps = read_maps(page, 0, 8)
    assert maps.shape[-1] == blocks
    assert torch.equal(maps[:, 0] == 255, keep) and set(maps[:, 0].unique().tolist()) == {0, 255}
    for shown, share in ((maps[:, 1], mass / rows), (maps[:, 2], mass.masked_fill(keep, 0) / rows)):
        assert (shown.int() - quantise_share(share.tril()).int()).abs().max() <= 1
    data = read_data(page)
    kept = (mass * keep).sum((-2, -1)) / length
    assert [head["recall"] for head in data["heads"][:8]] == pytest.approx(kept.tolist(), abs=1e-4)
    assert data["tokens"] == length and data["block_size"] == 128


def test_header_and_layers(page: str, prompt: Path) -> None:
    data = read_data(page)
    about = data["about"]
    said = {"model": str(MODEL_DIR), "prompt": str(prompt), "selector": "flexprefill", "gamma": "0.8", "tau": "0.1"}
    said |= {"min_budget": "128", "max_budget": "none", "dtype": "float32", "torch": torch.__version__}
    assert about | said == about
    assert {"device", "transformers", "flexprefill_fa"} <= set(about)
    for name in ("density", "recall"):
        assert data[name] == pytest.approx(sum(head[name] for head in data["heads"]) / 48, abs=1e-6)
    assert [layer["layer"] for layer in data["layers"]] == list(range(6))
    assert all(layer["runs"] == "sparse" and layer["group"] == 1 for layer in data["layers"])
    assert "://" not in page, "a page that loads something"


def test_a_lower_gamma_changes_the_page(page: str, prompt: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = inspect("-", out, "--selector", "flexprefill:gamma=0.4+min_budget=128", "--dtype", "float32",
                     stdin=prompt.read_bytes())  # fmt: skip
    assert result.exit_code == 0, result.output
    before, after = read_data(page), read_data(out.read_text(encoding="utf-8"))
    assert after["density"] < 0.9 * before["density"] and after["recall"] < before["recall"] - 0.02
    assert (after["about"]["gamma"], after["about"]["prompt"]) == ("0.4", "standard input")
    kept, kept_before = (read_maps(text, 0, 8)[:, 0].count_nonzero() for text in (out.read_text(), page))
    assert kept < kept_before


def test_another_selector_has_its_name_for_a_pattern(prompt: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = inspect(prompt, out, "--selector", "streaming_llm:sink=128+window=512", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    data = read_data(out.read_text(encoding="utf-8"))
    assert {head["pattern"] for head in data["heads"]} == {"streaming_llm"}
    assert {head["js_distance"] for head in data["heads"]} == {None}
    assert 0 < data["density"] < 0.6


def test_pooled_maps() -> None:
    """Cells of several blocks: shares of kept causal blocks, and sums of attention over the rows of the cell."""
    keep = torch.zeros(2, 5, 5, dtype=torch.bool)
    keep[0] = torch.ones(5, 5).tril().bool()
    keep[1].fill_diagonal_(True)
    mass = torch.rand(2, 5, 5).tril()
    rows = torch.tensor([64, 64, 64, 64, 10])
    mass *= rows[:, None] / mass.sum(-1, keepdim=True)
    found = layer_maps(keep, mass, rows, 2)
    assert (found.group, found.cells) == (2, 3)
    maps = torch.frombuffer(bytearray(found.data), dtype=torch.uint8).view(2, 3, 6)
    assert maps[0, 0].tolist() == [255] * 6
    assert maps[1, 0].tolist() == [170, 0, 170, 0, 0, 255]  # 2 of 3 causal blocks on the diagonal
    expected = torch.stack(
        [
            mass[:, :2, :2].sum((1, 2)) / 128,
            mass[:, 2:4, :2].sum((1, 2)) / 128,
            mass[:, 2:4, 2:4].sum((1, 2)) / 128,
            mass[:, 4:, :2].sum((1, 2)) / 10,
            mass[:, 4:, 2:4].sum((1, 2)) / 10,
            mass[:, 4:, 4:].sum((1, 2)) / 10,
        ],
        1,
    )
    assert (maps[:, 1].int() - quantise_share(expected).int()).abs().max() <= 1
    assert maps[0, 2].count_nonzero() == 0
    assert maps[1, 2, 1] == maps[1, 1, 1] > 0 and maps[1, 2, 5] == 0
    assert 0 < maps[1, 2, 0] < maps[1, 1, 0]


def test_levels_of_shares() -> None:
    levels = quantise_share(torch.tensor([0.0, 9e-6, 1.01e-5, 1e-3, 0.5, 1.0, 1.0 + 1e-6]))
    assert levels.tolist() == [0, 0, 1, 103, 240, 255, 255]


@pytest.mark.parametrize("blocks", [1, 9, 64, 256, 257, 1024, 8192])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 8), (32, 32), (80, 64), (126, 128)])
def test_maps_keep_to_the_page_limit(blocks: int, layers: int, heads: int) -> None:
    group = blocks_per_cell(blocks, heads * 3, MAP_BYTES / layers)
    cells = -(-blocks // group)
    assert cells <= MAX_CELLS
    assert layers * heads * 3 * cells * (cells + 1) / 2 * 4 / 3 <= MAP_BYTES
    if (layers, heads) == (6, 8):
        assert group == -(-blocks // MAX_CELLS), "pooled without need"


def test_the_largest_page_keeps_to_the_limit() -> None:
    page = render(synthetic(80, 64, 1024), {"model": "noise"})
    assert len(page) < MAP_BYTES + 2 * 2**20


def test_an_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    write_atomically(out, "old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(out, "new")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_places_that_cannot_be_written(prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_line_error(inspect(prompt, tmp_path, *OPTIONS), f"cannot write the report to {tmp_path}: it is a folder")
    missing = tmp_path / "missing"
    assert_one_line_error(inspect(prompt, missing / "report.html", *OPTIONS), f"there is no folder {missing}")
    assert_one_line_error(inspect(prompt, prompt, *OPTIONS), "it is the prompt file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert_one_line_error(inspect(prompt, tmp_path / "report.html", *OPTIONS), "no permission to write to the folder")
    monkeypatch.undo()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Exception, match="No space left on device"):
        write_atomically(tmp_path / "report.html", "page")


def test_bad_input(prompt: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:  # noqa: F811
    out = tmp_path / "report.html"
    assert_one_line_error(inspect(tmp_path / "missing.txt", out, *OPTIONS), "missing.txt", "No such file")
    assert_one_line_error(inspect(prompt, out, *OPTIONS, model=tmp_path / "missing"), "no model folder at")
    (tmp_path / "empty").mkdir()
    for file in tiny_models["short"].glob("*.json"):
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    assert_one_line_error(inspect(prompt, out, *OPTIONS, model=tmp_path / "empty"), "cannot load the model in")
    assert_one_line_error(inspect(prompt, out, "--gamma", "2"), "gamma must be in (0, 1], got 2")
    twice = ("--selector", "flexprefill:gamma=0.9", "--gamma", "0.8")
    assert_one_line_error(inspect(prompt, out, *twice), "gamma is given twice")
    assert_one_line_error(
        inspect(prompt, out, *OPTIONS, model=tiny_models["window"]), "no layer of this model", "window"
    )
    assert not out.exists()


def test_a_short_prompt_is_an_error(tmp_path: Path) -> None:
    out, short = tmp_path / "report.html", tmp_path / "prompt.txt"
    short.write_text("def f(x):\n    return x\n")
    result = inspect(short, out, "--dtype", "float32")
    assert_one_line_error(
        result, "the prompt runs dense, there is nothing to inspect", "peakprefill", "up to 384 tokens", "this has"
    )
    # Short of the queries that sparse prefill starts at, whatever the selector would drop.
    short.write_text("x = 1\n" * 20)
    result = inspect(short, out, "--selector", "streaming_llm:sink=1+window=1+block_size=64", "--dtype", "float32")
    assert_one_line_error(result, "ran dense in this prompt of", "there is nothing to inspect")
    assert not out.exists()


def test_a_prompt_beyond_the_models_positions_warns(prompt: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:  # noqa: F811
    result = inspect(prompt, tmp_path / "report.html", *OPTIONS, model=tiny_models["short"])
    assert result.exit_code == 0, result.output
    assert "warning: the prompt takes" in result.stderr and "made for 64" in result.stderr


def test_prefill_in_chunks_is_refused(prompt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "generation_config.json").write_text(json.dumps({"prefill_chunk_size": 1024}))
    result = inspect(prompt, tmp_path / "report.html", *OPTIONS, model=folder)
    assert_one_line_error(result, "inspect needs a prefill in one piece", "got 1024 of 2", "unset prefill_chunk_size")


def test_layers_with_a_window_are_listed(tmp_path: Path, prompt: Path) -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **kinds))
    folder = tmp_path / "gemma"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    out = tmp_path / "report.html"
    result = inspect(prompt, out, *OPTIONS, model=folder)
    assert result.exit_code == 0, result.output
    assert "2 heads in 1 of 2 layers" in result.stdout
    data = read_data(out.read_text(encoding="utf-8"))
    window, full = data["layers"]
    assert window == {"layer": 0, "runs": "window", "why": "a sliding window of 256 tokens"}
    assert full["runs"] == "sparse"
    assert [(head["layer"], head["head"]) for head in data["heads"]] == [(1, 0), (1, 1)]


def test_capped_scores_are_looked_at_capped(input_ids: Tensor) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    kinds = {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 0.02}
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **kinds)).eval()
    calls: list[SparseCall] = []
    found = inspect_prefill(model, input_ids, CONFIG, WorkProgress())
    with enable_sparse_prefill(model, CONFIG, statistics="recall") as handle, torch.no_grad():
        with observe_sparse_prefill(model, calls.append):
            model(input_ids)
        expected = [found.recall for found in handle.statistics.values()]
    for layer, (call, measured) in enumerate(zip(calls, expected, strict=True)):
        assert measured is not None
        recall = [head.recall for head in found.heads if head.layer == layer]
        assert call.softcap == 0.02
        assert recall == pytest.approx(measured[0].tolist(), abs=1e-5)
        capped, uncapped = (
            call.selection.recall(call.query, call.key, scale=call.scale, softcap=cap)[0].tolist()
            for cap in (call.softcap, None)
        )
        assert recall == pytest.approx(capped, abs=1e-5) != pytest.approx(uncapped, abs=1e-4)


def test_without_transformers(prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = inspect(prompt, tmp_path / "report.html", *OPTIONS)
    assert_one_line_error(result, "pip install 'flexprefill-fa[hf]'")
