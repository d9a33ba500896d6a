"""What an installed package holds, and what importing it does."""

import ast
import json
import os
import re
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


ALONE = """
import importlib, pkgutil, sys, torch, torch.nn.attention.flex_attention
torch.compile(len)
before = set(sys.modules)
import flexprefill_fa
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not added & {"transformers", "triton", "accelerate", "typer", "rich", "vllm", "flash_attn"}, added
ours = [name for name in sys.modules if name.startswith("flexprefill_fa")]
assert not [name for name in ours if {"triton", "tl"} & vars(sys.modules[name]).keys()], ours
assert not torch.cuda.is_initialized()
assert not torch._dynamo.utils.counters

extras = ("rich", "typer", "transformers", "vllm", "sglang", "lm_eval", "matplotlib", "bench")
sys.modules.update(dict.fromkeys(extras))
import flexprefill_fa.integrations
for module in pkgutil.walk_packages(flexprefill_fa.__path__, "flexprefill_fa."):
    if not module.name.startswith(("flexprefill_fa.integrations.", "flexprefill_fa.tools.")):
        __import__(module.name)
try:
    import flexprefill_fa.integrations.transformers
except ImportError as error:
    print(error)
assert not [name for name in sys.modules if name.startswith(("transformers.", "flexprefill_fa.integrations."))]
assert not hasattr(torch.ops.flexprefill_fa, "sequence_ids")
for engine in ("vllm", "sglang"):
    name = f"flexprefill_fa.integrations.{engine}"
    integration = importlib.import_module(name)
    importlib.import_module(f"{name}_plan")
    assert f"{name}_backend" not in sys.modules
    try:
        integration.register()
    except ImportError as error:
        print(error)
from flexprefill_fa.tools import main
main()
"""


def test_what_an_import_does_and_what_it_does_without_the_extras() -> None:
    """In one process, for each takes seconds to import torch.

    An import brings in no optional package and no Triton kernel (torch.compile itself imports Triton), and starts
    neither CUDA nor a compilation. Without the extras the library and the plans of the engines import, the rest says
    what to install, and nothing is half registered.
    """
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the command needs rich and typer: pip install 'flexprefill-fa[cli]' (")
    transformers, vllm, sglang = done.stdout.splitlines()
    assert "needs transformers: pip install 'flexprefill-fa[hf]'" in transformers
    assert vllm == "the vLLM integration needs vLLM: pip install 'flexprefill-fa[vllm]'"
    assert sglang.startswith("the SGLang integration needs SGLang with a registry of attention backends: ")


def imports(file: Path) -> set[str]:
    """The full names of the modules that a file imports anywhere, those inside functions included."""
    here = [*file.relative_to(ROOT).parent.parts, ""]
    here = ["flexprefill_fa", *here] if here[0] == "integrations" else here
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join([*here[: -node.level], node.module or ""]).strip(".") if node.level else node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def breaches(files: list[Path], forbidden: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each file with the forbidden module, or part of one, that it imports."""
    return [
        (file.name, name)
        for file in files
        for name in sorted(imports(file))
        if any(name == module or name.startswith(f"{module}.") for module in forbidden)
    ]


def test_the_library_imports_no_tools_and_the_tools_no_benchmarks() -> None:
    inside = [path for path in (ROOT / "flexprefill_fa").rglob("*.py") if "integrations" not in path.parts]
    tools = [path for path in inside if path.is_relative_to(ROOT / "flexprefill_fa" / "tools")]
    library = [*(path for path in inside if path not in tools), *(ROOT / "integrations").glob("*.py")]
    assert len(tools) > 30 and len(library) > 60
    assert breaches(library, ("flexprefill_fa.tools", "rich", "typer", "bench")) == []
    assert breaches(tools, ("bench",)) == []
    assert {name for _, name in breaches(tools, ("rich", "typer"))} >= {"rich.table", "typer"}, "imports are found"


def test_of_lm_eval_the_public_modules_are_enough() -> None:
    files = [*(ROOT / "flexprefill_fa").rglob("*.py"), *(ROOT / "integrations").glob("*.py")]
    names = {name for file in files for name in imports(file) if name.startswith("lm_eval.")}
    assert "lm_eval.tasks.TaskManager" in names and not [name for name in names if "._" in name]


def test_relative_imports_are_read_too() -> None:
    names = imports(ROOT / "integrations" / "lm_eval.py")
    assert {"flexprefill_fa.integrations.hf_plan.AS_ASKED", "flexprefill_fa.choice.Choice", "functools"} <= names


def test_public_names_exist() -> None:
    import flexprefill_fa

    assert all(hasattr(flexprefill_fa, name) for name in flexprefill_fa.__all__)


def test_the_release_has_one_version() -> None:
    from flexprefill_fa import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (cited,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    (released,) = re.findall(r'^date-released: "(.+)"$', citation, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == __version__ and f"[{__version__}] - {released}" in headings[:2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with what a build needs and what it shall leave out."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("flexprefill_fa", "integrations", "bench", "tests"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_with_integrations_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    modules = {name for name in names if name.endswith(".py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "flexprefill_fa").rglob("*.py")}
    expected |= {f"flexprefill_fa/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert modules == expected
    assert "flexprefill_fa/integrations/__init__.py" in modules
    tools = ROOT / "flexprefill_fa" / "tools"
    patterns = ("inspection/*.html", "inspection/*.css", "inspection/*.js", "*/tasks/*.yaml", "needle/model/*")
    data = {str(path.relative_to(ROOT)) for pattern in patterns for path in tools.glob(pattern)}
    assert len(data) == 4 + 8 + 5 + 5 and data <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"flexprefill_fa"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.MULTILINE)
    assert {name for name, rest in required if "extra ==" not in rest} == {"torch", "triton", "einops"}
    assert {name for name, rest in required if 'extra == "cli"' in rest} == {"rich", "typer"}
    assert wheel.stat().st_size < 16 * 2**20


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True, capture_output=True)
    script = """
import sys
sys.modules["bench"] = None
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="flexprefill")
import flexprefill_fa
print(flexprefill_fa.__file__, file=sys.stderr)
command.load()()
"""
    options = ("demo", "--tokens", "768", "--needles", "4", "--device", "cpu", "--json")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        cwd=empty,
        env={**environment, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == str(target / "flexprefill_fa" / "__init__.py")
    report = json.loads(done.stdout)
    assert report["ok"] and report["commit"] == "unknown" and 0 < report["sparse"]["density"] < 0.95
    assert list(empty.iterdir()) == []
