"""Prompts, devices and local models for the command line, with one line for whatever a user may get wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexprefill_fa.choice import ChoiceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class UsageError(Exception):
    """Something the user can put right, told in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def one_line_errors(
    mistakes: tuple[type[Exception], ...] = (UsageError, ChoiceError, torch.OutOfMemoryError),
) -> Iterator[None]:
    """Turn a mistake of the user in the body into one line on stderr and exit status 2.

    Args:
        mistakes: the exceptions that are such.
    """
    import typer

    try:
        yield
    except mistakes as error:
        typer.echo(f"error: {first_line(error)}", err=True)
        raise typer.Exit(2) from error


def read_prompt(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-".

    Raises:
        UsageError: if it cannot be read, is empty or is not UTF-8.
    """
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the prompt file {name}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt file {name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    if not text.strip():
        raise UsageError(f"the prompt file {name} is empty")
    return text


def resolve_device(name: str) -> torch.device:
    """The device for "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: for another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {name} was asked for, but torch {torch.__version__} finds no CUDA GPU here")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UsageError(f"device {name} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    return device


def require_kernels(device: torch.device) -> None:
    """Check that FlexAttention's kernels can be built for a device: on the CPU, with a C++ compiler, for AVX2.

    Raises:
        UsageError: naming what is missing.
    """
    if device.type != "cpu":
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(
            f"sparse prefill on the CPU needs a C++ compiler: {compiler} is not here (install it or set CXX)"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX") or capability == "AVX":
        raise UsageError(f"sparse prefill on the CPU needs AVX2, and torch finds {capability}")


def resolve_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, None for "auto".

    Raises:
        UsageError: for another name.
    """
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def require_transformers() -> None:
    """Check that Hugging Face transformers is here, and keep its own bars and notes off the terminal.

    Raises:
        UsageError: naming the extra to install.
    """
    try:
        import transformers

        import flexprefill_fa.integrations.transformers  # noqa: F401 (it knows which versions it can serve)
    except ImportError as error:
        raise UsageError(
            f"this command needs Hugging Face transformers: pip install 'flexprefill-fa[hf]' ({first_line(error)})"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(
    path: str | Path, dtype: torch.dtype | None, device: torch.device, device_map: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A local Hugging Face causal language model with dense (SDPA) attention, and its tokenizer.

    Args:
        path: a folder with config.json, weights and tokenizer. Nothing is downloaded, no code from it is run.
        dtype: of the weights; None keeps the checkpoint's.
        device: where the model goes.
        device_map: how it is spread over devices instead, such as "auto".

    Raises:
        UsageError: if the folder or a file in it is missing or cannot be used.
    """
    tokenizer = load_tokenizer(path)
    _check_weights(path)
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = _LOCAL if device_map is None else {**_LOCAL, "device_map": device_map}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            Path(path), dtype=dtype or "auto", attn_implementation="sdpa", **options
        )
        model = (model if device_map is not None else model.to(device)).eval()
    except Exception as error:  # a broken folder raises nearly anything, depending on which file is broken
        raise UsageError(f"cannot load the model in {path}: {first_line(error)}") from error
    return model, tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model; errors as for `load_model`, those of missing files included."""
    folder = _model_folder(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise UsageError(f"cannot load the tokenizer in {path}: {first_line(error)}") from error


def load_config(path: str | Path) -> PretrainedConfig:
    """The config of a local model; errors as for `load_model`, those of missing files included."""
    folder = _model_folder(path)
    _check_weights(path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise UsageError(f"cannot load the model in {path}: {first_line(error)}") from error


def _model_folder(path: str | Path) -> Path:
    """The folder of a model that has every kind of file that is needed."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"no model folder at {path}: --model takes a local folder in Hugging Face format")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(
                f"the folder {path} holds an adapter alone{_its_base(folder)}: merge it into its base model with peft "
                "(merge_and_unload, save_pretrained) and name the folder of the result"
            )
        raise UsageError(f"the model folder {path} has no config.json")
    if not _any_file(folder, _TOKENIZER_FILES):
        raise UsageError(f"the model folder {path} has no tokenizer (such as tokenizer.json)")
    require_transformers()
    return folder


def _check_weights(path: str | Path) -> None:
    if not _any_file(Path(path), _WEIGHT_FILES):
        raise UsageError(f"cannot load the model in {path}: the folder has no weights (such as model.safetensors)")


def _any_file(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(file for pattern in patterns for file in folder.glob(pattern))


def model_name(path: str) -> str:
    """What rows call a model: the path as it was given, or its last part where that says where things lie here."""
    given = Path(path)
    return given.resolve().name if given.is_absolute() or ".." in given.parts else given.as_posix()


def _its_base(folder: Path) -> str:
    """Which model an adapter is for, in words."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return f" (for {base})" if isinstance(base, str) and base else ", no model"


def token_count(text: str) -> int:
    """One of a list of prompt lengths.

    Raises:
        UsageError: for anything but a whole number from 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"lengths must be whole numbers of tokens from 1, such as 4096,8192, got {text!r}")
    return int(text)
