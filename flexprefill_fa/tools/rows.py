"""Result rows: JSON lines, each with the conditions it was measured under."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Hashable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flexprefill_fa import __version__
from flexprefill_fa.tools.digests import model_sha256, tokenizer_sha256
from flexprefill_fa.tools.files import write_whole
from flexprefill_fa.tools.loading import UsageError, first_line

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds `bench/` where this package is used from a checkout."""

Row = dict[str, Any]

_MEASURED = (".", ":!bench/results", ":!README.md", ":!docs")  # what a commit says about a measurement


def environment(device: torch.device) -> Row:
    """Processor, its CUDA compute capability, versions, commit and date.

    The commit is the environment variable BENCH_COMMIT, for a copy of a checkout; else that of the checkout, with
    "-dirty" where tracked files other than results and README were changed; else "unknown".
    """
    return {
        "gpu": processor_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "flash_attn_4": package_version("flash-attn-4"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def model_conditions(model: Any, folder: str | Path) -> Row:
    """What a row says of the model that it was measured with, of the device and of the versions; all but the date.

    Args:
        model: a transformers model.
        folder: where it was read from.
    """
    where = environment(model.device)
    del where["date"]
    return {
        "model_sha256": model_sha256(folder),
        "tokenizer_sha256": tokenizer_sha256(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **where,
        "transformers": package_version("transformers"),
        "flexprefill_fa": __version__,
        "python": platform.python_version(),
    }


def processor_name(device: torch.device) -> str:
    """Name of the GPU, or the CPU's model and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def commit(root: Path = CHECKOUT) -> str:
    """The checkout's commit, see `environment`."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"  # an installed package inside another project's checkout
        head = _git(root, "rev-parse", "--short=10", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *_MEASURED)
        dirty = dirty or _git(root, "ls-files", "--others", "--exclude-standard", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if dirty else head


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def package_version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def append(path: Path, row: Row) -> None:
    """Add a row to a file of JSON lines, made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def require_appendable(path: Path) -> None:
    """Check that rows can be added to a file, so that one that cannot be written is told before anything is measured.

    Its folder is made where it is missing, the file is not.

    Raises:
        UsageError: naming it.
    """
    if path.is_dir():
        raise UsageError(f"rows must go to a file of JSON lines, {path} is a folder")
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot add rows to {path}: {first_line(error)}") from error


def drop_unfinished(path: Path) -> None:
    """Cut off a last line that was not written whole, because its writer was stopped; end a whole one.

    Nothing is done where there is no file.

    Raises:
        OSError: if the file cannot be read or written.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    last = data[data.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        write_whole(path, data[: -len(last)])
    else:
        write_whole(path, data + b"\n")


def rows_before(path: Path) -> list[Row]:
    """The rows that are in a file already, without a line that was not finished, which is cut off.

    Raises:
        UsageError: where rows cannot be added to it.
    """
    require_appendable(path)
    try:
        drop_unfinished(path)
        return read(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot add rows to {path}: {first_line(error)}") from error


def read(path: Path) -> list[Row]:
    """The rows of a file, in its order; none where there is no file.

    Raises:
        ValueError: naming the line that is not a JSON object.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """The last row for each key, in the order in which the keys came first."""
    return list({key(row): row for row in rows}.values())
