"""Argument checks, in one place. None of them reads GPU memory."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda", "cpu")
BLOCK_SIZES = (64, 128)
MAX_INTEGER = 2**53  # settings travel as float64
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
CPU_MEAN_CORRECTION_TORCH = (2, 13)  # with 2.11 a process that tested it died, for a reason not found yet
GRAPH = ("never", "auto")


def torch_version() -> tuple[int, ...]:
    """(major, minor) of the torch that runs."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """A finite real number in [low, high], without the ends that are open."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    above = low < number if open_low else low <= number
    if not above or not (number < high if open_high else number <= high):
        ends = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value}")


def check_integer(name: str, value: object, low: int, high: int = MAX_INTEGER) -> None:
    """A whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if int(value) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_block_size(block_size: object) -> None:
    """A block size that every backend and kernel knows."""
    check_integer("block_size", block_size, 1)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")


def check_scale(scale: float | None, name: str = "scale") -> None:
    """A positive finite score scale, or None for the default."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"{name} must be a number or None, got {type(scale).__name__}")
    if torch.compiler.is_dynamo_compiling():  # a number without a value yet
        return
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"{name} must be a positive finite number, got {scale}")


def corrects_means(device: torch.device) -> bool:
    """Whether mean correction runs there."""
    return device.type != "cpu" or torch_version() >= CPU_MEAN_CORRECTION_TORCH


def check_correction_kind(mean_correction: object) -> None:
    """True, False or "tilted"."""
    if not isinstance(mean_correction, bool) and mean_correction != "tilted":
        raise ValueError(f"mean_correction must be True, False or 'tilted', got {mean_correction!r}")


def check_graph(graph: object) -> None:
    """Whether calls that come again are captured as CUDA graphs, see `graph_cache.py`."""
    if graph not in GRAPH:
        raise ValueError(f"graph must be one of {GRAPH}, got {graph!r}")


def check_mean_correction(mean_correction: object, mask_mod: object, score_mod: object, device: torch.device) -> None:
    """One of its kinds; what stands for dropped blocks knows nothing of a mask_mod or score_mod."""
    check_correction_kind(mean_correction)
    given = [name for name, mod in (("mask_mod", mask_mod), ("score_mod", score_mod)) if mod is not None]
    if mean_correction and given:
        raise ValueError(f"mean_correction cannot be combined with a {' or a '.join(given)}")
    if mean_correction and not corrects_means(device):
        raise ValueError(
            f"mean_correction on the CPU was tested with torch 2.13 and newer, got torch {torch.__version__}"
        )


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have shape [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but sparse prefill is for inference only: call it under torch.no_grad() "
            "or torch.inference_mode()"
        )


def check_query_key(query: Tensor, key: Tensor) -> None:
    """Shapes, dtypes, devices and head counts of a query [B, Hq, Lq, D] and a key [B, Hkv, Lkv, D]."""
    _check_tensor("query", query)
    _check_tensor("key", key)
    if query.device != key.device:
        raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
    if query.device.type not in DEVICES:
        raise ValueError(f"sparse prefill runs on CUDA and CPU tensors, got {query.device}")
    if query.dtype != key.dtype:
        raise TypeError(f"query and key must have one dtype, got {query.dtype} and {key.dtype}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have one batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have one head_dim, got {query.shape[3]} and {key.shape[3]}")
    if not MIN_HEAD_DIM <= query.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in [{MIN_HEAD_DIM}, {MAX_HEAD_DIM}], got {query.shape[3]}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query length must not exceed key length (queries are the last positions of the keys), "
            f"got {query.shape[2]} and {key.shape[2]}"
        )


def check_value(key: Tensor, value: Tensor) -> None:
    """A value [B, Hkv, Lkv, D] that fits the key."""
    _check_tensor("value", value)
    if value.device != key.device:
        raise ValueError(f"key and value must be on one device, got {key.device} and {value.device}")
    if value.dtype != key.dtype:
        raise TypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    if value.shape != key.shape:
        raise ValueError(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}")


def per_element(
    name: str, value: Tensor | Sequence[int] | None, batch: int, device: torch.device, low: int, high: int
) -> Tensor | None:
    """`starts` or `lengths` as an int32 tensor [B] on device.

    Values that live on the host are checked against [low, high]; values on a GPU are clamped by the kernels instead,
    because a check would have to wait for the device.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be an integer tensor or a sequence of ints, got {type(value).__name__}")
        for item in value:
            check_integer(name, item, low)
        value = torch.tensor(list(value), dtype=torch.int32, device="cpu")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    if value.shape != (batch,):
        raise ValueError(f"{name} must have shape [batch] = [{batch}], got {list(value.shape)}")
    on_host = (
        value.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()
    )  # a traced tensor has no values yet
    if on_host and ((value < low) | (value > high)).any():
        raise ValueError(f"{name} must be in [{low}, {high}], got {value.tolist()}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name} must be on the query's device {device} or on the CPU, got {value.device}")
    return value.to(device, torch.int32)


def check_padding(
    starts: Tensor | Sequence[int] | None,
    lengths: Tensor | Sequence[int] | None,
    batch: int,
    kv_len: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """`starts` (first real key position) and `lengths` (number of real keys) of each batch element, checked."""
    start = per_element("starts", starts, batch, device, 0, kv_len - 1)
    length = per_element("lengths", lengths, batch, device, 1, kv_len)
    on_host = device.type == "cpu" and not torch.compiler.is_dynamo_compiling()
    if on_host and start is not None and length is not None and (start + length > kv_len).any():
        raise ValueError(
            f"starts + lengths must not exceed the key length {kv_len}, got {start.tolist()} + {length.tolist()}"
        )
    return start, length
