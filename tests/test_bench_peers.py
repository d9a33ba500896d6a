"""Adapters of public implementations over stand-ins: what they are called with, and told from other states by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peer_packages import (
    FLASH,
    FLASH_FILE,
    FLASH_PEER,
    FLEX,
    FLEX_FILE,
    INFER,
    SELECTORS,
    both,
    forget_peers,
    make_package,
    rows_of,
    run,
    write,
)

from bench.peers import minference
from bench.peers.base import foreign_code
from bench.speed_tables import GIVEN, PEERS


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    forget_peers()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make_package(tmp_path / "checkout")


def test_given_blocks_are_those_that_ours_are_over(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    result = run(out, *both(package), "--density", "0.7,0.8")
    assert result.exit_code == 0, result.output
    ours, peers = rows_of(out)
    assert [row["implementation"] for row in peers] == ["FlexPrefill"] * 2 + ["FlashPrefill"] * 2
    for row in peers:
        mine = next(other for other in ours if other["settings" if other["selector"] else "kernel"] == row["settings"])
        assert row["density"] == mine["density"] < 0.9 and row["attend_ms"] > 0
        assert row["check_error"] < 1e-5 and "total_ms" not in row
    table = GIVEN.markdown([*ours, *peers])
    assert table in result.stdout and PEERS.markdown([*ours, *peers]).count("| 512 |") == 2  # the dense ones
    lines = [re.split(r" *\| *", line)[1:4] for line in table.splitlines() if line.startswith("| 512")]
    who = ("flexprefill_fa CPU", "FlexPrefill", "FlashPrefill")
    assert lines == [["512", density, name] for density in ("0.700", "0.800") for name in who]


def test_other_blocks_than_those_given_are_an_error(package: Path, tmp_path: Path) -> None:
    write(package, flex=FLEX.replace("kept[b, h, head] = True", "kept[b, h, head[::2]] = True"), flash=FLASH)
    out = tmp_path / "peers.jsonl"
    assert run(out, *both(package), "--density", "0.7").exit_code == 2
    flex, flash = rows_of(out)[1]
    assert re.search(r"ValueError: relative error .* allowed 0.1|not finite", flex["error"]) and "attend_ms" not in flex
    assert "error" not in flash


def test_a_peer_that_selects_nothing_is_measured_over_given_blocks(tmp_path: Path) -> None:
    write(tmp_path / "checkout", infer=INFER)
    given = ("--peer", f"flashinfer={tmp_path / 'checkout'}")
    out = tmp_path / "peers.jsonl"
    result = run(out, *given, "--density", "0.7", "--lengths", "512,600")
    assert result.exit_code == 0, result.output
    rows = rows_of(out)[1]
    assert [(row["implementation"], row["selector"], row["length"]) for row in rows] == [
        ("FlashInfer", "synthetic", length) for length in (512, 600)
    ]
    for row in rows:
        assert row["density"] < 0.9 and row["check_error"] < 1e-5 and row["attend_ms"] > 0 and "total_ms" not in row

    own = run(tmp_path / "own.jsonl", *given)
    assert own.exit_code == 0 and not rows_of(tmp_path / "own.jsonl")[1]
    assert "FlashInfer selects nothing itself: it is measured over given blocks, with --density" in own.stderr


def test_a_causal_mask_that_is_not_aligned_to_the_end_of_the_gathered_keys_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "checkout", infer=INFER.replace(".tril(len(tokens) - len(queries))", ".tril()"))
    out = tmp_path / "peers.jsonl"
    assert run(out, "--peer", f"flashinfer={tmp_path / 'checkout'}", "--density", "0.7").exit_code == 2
    (row,) = rows_of(out)[1]
    assert re.search(r"ValueError: relative error .* allowed 0.1", row["error"]) and "attend_ms" not in row


def test_no_peer_is_measured_under_a_variant_that_it_does_not_select(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    paper = SELECTORS[0].replace("gamma", "variant=paper+gamma")
    assert run(out, *both(package), "--selectors", f"{paper},{SELECTORS[0]}").exit_code == 2
    ours, (other, same) = rows_of(out)
    assert [row["settings"]["variant"] for row in (*ours[2:], other, same)] == ["paper", "published"] * 2
    assert not any("error" in row for row in (*ours, same))
    assert other["error"] == "ValueError: it selects the variant 'published', got settings of the variant 'paper'"
    assert "total_ms" not in other and "peer_settings" not in other


def test_a_prompt_that_the_released_code_attends_densely_has_a_density_of_one(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.jsonl"
    assert run(out, *both(package), "--lengths", "256").exit_code == 0
    _, (flex, _) = rows_of(out)
    assert (flex["computational_ratio"], flex["density"]) == (1, 1)


NAMES = "flexprefill, flashprefill, flashprefill-v2, xattention, spargeattn, minference, flashinfer"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", f"error: peer must be NAME=FOLDER with a name of {NAMES}, got 'nowhere'"),
        ("flux=empty", f"error: peer must be NAME=FOLDER with a name of {NAMES}, got 'flux=empty'"),
        ("flexprefill=empty", f"error: peer flexprefill needs a folder that holds {FLEX_FILE}, got empty"),
        ("flashprefill=flash/ops", f"error: peer flashprefill needs a folder that holds {FLASH_FILE}, got flash/ops"),
        ("flexprefill=flash", f"error: peer flexprefill needs a folder that holds {FLEX_FILE}, got flash"),
    ],
)
def test_a_folder_without_the_module_is_refused_before_anything(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "flash", flash=FLASH)
    monkeypatch.chdir(tmp_path)
    result = run(tmp_path / "peers.jsonl", "--peer", given)
    assert result.exit_code == 2 and result.stderr.strip() == message
    assert not (tmp_path / "peers.jsonl").exists()


def test_the_digest_is_that_of_names_and_contents(package: Path) -> None:
    def digest() -> str:
        return FLASH_PEER.identity(package)["peer_digest"]

    found = [digest()]
    (package / ".venv").mkdir()
    (package / ".venv" / "hidden.py").write_text("x = 1\n")
    (package / "link.py").symlink_to(package / "nowhere.py")
    (package / "folder.py").mkdir()
    assert digest() == found[0]
    (package / "b.py").write_text("x = 1\n")
    found.append(digest())
    (package / "b.py").rename(package / "c.py")
    found.append(digest())
    (package / "c.py").write_text("")
    found.append(digest())
    assert len(set(found)) == 4


def test_a_name_that_is_taken_is_not_mistaken_for_the_peer(package: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", flash=FLASH)
    with foreign_code(tmp_path / "other"):
        FLASH_PEER.load(tmp_path / "other")
    with foreign_code(package), pytest.raises(ImportError, match=r"is .*other/ops/.*, not the one in .*checkout"):
        FLASH_PEER.load(package)


def test_minferences_columns_and_diagonals_are_the_best_of_the_last_queries() -> None:
    length, heads = 300, 2
    query, key = (torch.randn(1, heads, length, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    columns, diagonals = minference._chosen(query, key, 40, 120)
    causal = torch.arange(length) <= torch.arange(length)[-64:, None]
    shares = (query[:, :, -64:] @ key.mT / 4).masked_fill(~causal, float("-inf")).softmax(-1)[0]
    offsets = torch.arange(length)[-64:, None] - torch.arange(length)
    for head in range(heads):
        vertical = shares[head].sum(0)
        vertical[:30] = float("inf")
        slash = torch.tensor([shares[head][offsets == o].sum() for o in range(length)])
        slash[:100] = float("inf")
        for found, total in ((columns[0, head], vertical), (diagonals[0, head], slash)):
            assert len(set(found.tolist())) == len(found)
            torch.testing.assert_close(total[found].sort().values, total.topk(len(found)).values.sort().values)
