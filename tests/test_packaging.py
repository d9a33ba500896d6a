"""What an installed package holds, and what importing it does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_integrations_is_a_relative_symlink() -> None:
    link = ROOT / "flexprefill_fa" / "integrations"
    assert link.is_symlink()
    assert os.readlink(link) == "../integrations"


def test_importing_starts_nothing() -> None:
    """No optional package, no Triton kernel (torch.compile itself imports Triton), no CUDA start, no compilation."""
    script = """
import sys, torch, torch.nn.attention.flex_attention
torch.compile(len)
before = set(sys.modules)
import flexprefill_fa
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not added & {"transformers", "triton", "accelerate", "typer", "rich", "vllm", "flash_attn"}, added
ours = [name for name in sys.modules if name.startswith("flexprefill_fa")]
assert not [name for name in ours if {"triton", "tl"} & vars(sys.modules[name]).keys()], ours
assert not torch.cuda.is_initialized()
assert not torch._dynamo.utils.counters
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_integrations_package_needs_no_optional_package() -> None:
    script = "import sys; sys.modules['transformers'] = None; import flexprefill_fa.integrations, flexprefill_fa.cli"
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_public_names_exist() -> None:
    import flexprefill_fa

    assert all(hasattr(flexprefill_fa, name) for name in flexprefill_fa.__all__)


def test_wheel_holds_the_package_with_integrations_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flexprefill_fa", "integrations", "bench", "tests"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "model")
        )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.endswith(".py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "flexprefill_fa").rglob("*.py")}
    expected |= {f"flexprefill_fa/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert modules == expected
    assert "flexprefill_fa/integrations/__init__.py" in modules
    page = {f"flexprefill_fa/inspection/{name}" for name in ("page.html", "page.css", "heads.js", "overview.js")}
    assert page <= names
    tasks = {str(path.relative_to(ROOT)) for path in (ROOT / "flexprefill_fa/evaluation/tasks").glob("*.yaml")}
    assert len(tasks) == 8 and tasks <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"flexprefill_fa"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
