"""The documents: a short README whose snippets run, links that lead somewhere, and the site built from them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexprefill_fa.tools.needle import MODEL_DIR

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def anchors(document: Path) -> list[str]:
    """What GitHub calls a document's headings."""
    titles = re.findall(r"^#+ (.*)$", _FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain]


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", document.read_text(encoding="utf-8"))):
        path, _, heading = link.partition("#")
        file = document.parent / path if path else document
        if not file.is_file() or (heading and heading not in anchors(file)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert broken_links(document) == []
    headings = anchors(document)
    assert len(set(headings)) == len(headings), "a link can name only the first of equal headings"


def test_broken_links_are_found(tmp_path: Path) -> None:
    document, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("# The model's `x`, [y](z) and more\n\n```sh\n# no heading\n```\n")
    links = ("b.md", "b.md#the-models-x-y-and-more", "#here", "https://example.org/none.md")
    document.write_text("## Here\n" + "".join(f"[text]({link})\n" for link in links))
    assert broken_links(document) == []
    broken = ["c.md", "b.md#no-heading", "#there"]
    document.write_text("# Here\n" + "".join(f"[text]({link})\n" for link in broken))
    assert broken_links(document) == broken


def snippet(mark: str) -> str:
    """The README's one piece of Python with some text in it."""
    (code,) = [code for language, code in _FENCE.findall(README.read_text()) if language == "python" and mark in code]
    return code


def run_snippet(mark: str, **names: Any) -> dict[str, Any]:
    exec(snippet(mark), names)
    return names


def peaked(length: int = 1500) -> tuple[Tensor, Tensor, Tensor]:
    """Every query looks for its own key; the values of the fourth block are huge."""
    torch.manual_seed(0)
    key, value = torch.randn(1, 2, length, 64), torch.randn(1, 2, length, 64)
    value[:, :, 384:512] = 1e6
    return 2 * key.repeat_interleave(2, dim=1), key, value


def distance(out: Tensor, dense: Tensor) -> float:
    """Relative, L2."""
    return float((out - dense).norm() / dense.norm())


def test_the_readmes_block_mask_runs() -> None:
    query, key, value = peaked()
    found = run_snippet("create_peakprefill_block_mask", query=query, key=key, value=value)
    kept = found["block_mask"].to_dense()[0, :, :12, :12].sum((-1, -2))
    assert kept.tolist() == [1 + 10 * 2 + 12] * 4  # the first block and the row's own; the last row keeps all
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = found["out"]
    assert distance(out[:, :, :384], dense[:, :, :384]) < 0.02
    assert out[:, :, 512:1408].abs().max() < 10 < dense[:, :, 512:1408].abs().max()


def test_the_readmes_one_call_runs() -> None:
    query, key, value = peaked()
    out = run_snippet("import PeakPrefillConfig", query=query, key=key, value=value)["out"]
    dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert distance(out[:, :, :384], dense[:, :, :384]) < 0.02
    code = snippet("import PeakPrefillConfig").replace("peak=0.2)", 'peak=0.2), dense="never"')
    names: dict[str, Any] = {"query": query, "key": key, "value": value}
    exec(code, names)
    assert names["out"][:, :, 512:1408].abs().max() < 10 < dense[:, :, 512:1408].abs().max()


def test_the_readmes_generation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    found = run_snippet("AutoTokenizer", path=str(MODEL_DIR), prompt="def f(x):\n    return x\n" * 40)
    new = found["output"].shape[1] - found["inputs"]["input_ids"].shape[1]
    assert 0 < new <= 64 and capsys.readouterr().out.strip()


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="benchmarks.html"' in index and 'src="attention.png"' in index
    assert (tmp_path / "attention.png").is_file() and (tmp_path / "inspect.png").is_file()
    assert 'src="fidelity.png"' in (tmp_path / "accuracy.html").read_text(encoding="utf-8")
