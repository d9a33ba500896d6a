"""Models of random weights: shapes of published ones, whole in one process, or each rank's share of it under torchrun.

The shares are those of the model's own `tp_plan`. They are cut from the weights that one process would have, so both
compute the same thing; no checkpoint is written, and a rank never holds more of the model than its share and the one
matrix that is being drawn.
"""

from __future__ import annotations

import copy
import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flexprefill_fa.tools.loading import UsageError, require_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LLAMA = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16"},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 135168},
    **{"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False},
    **{"bos_token_id": 128000, "eos_token_id": 128001},
}
_TINY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 512, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072},
    **{"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
}
SHAPES: dict[str, dict[str, Any]] = {"llama-3.1-8b": _LLAMA, "tiny": {**_LLAMA, **_TINY}}
"""Hugging Face configs, without what the length of a prompt does not depend on; "tiny" is of no published model."""


def model_config(name: str) -> PreTrainedConfig:
    """The transformers config of one of `SHAPES`."""
    require_transformers()
    from transformers import AutoConfig

    if name not in SHAPES:
        raise UsageError(f"config must be one of {', '.join(SHAPES)}, got {name!r}")
    return AutoConfig.for_model(**SHAPES[name])


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size` that share a model, on its device; a context manager, which leaves them.

    Without torchrun there is one, and torch.distributed is not started.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def start(cls, device: str | torch.device) -> Ranks:
        """Join the other ranks, over NCCL on GPUs and over gloo on the CPU; once in a process.

        The device is "cpu", "cuda", which under torchrun is the GPU of the process's local rank, or "cuda:N" without.
        """
        device = torch.device(device)
        world_size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        if world_size == 1:
            if device.index is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            return cls(0, 1, device)
        if device.index is not None:
            told = "device must be without a number under torchrun, where each rank takes the GPU of its local rank"
            raise ValueError(f"{told}: expected {device.type!r}, got {str(device)!r}")
        if device.type == "cuda":
            if local >= (found := torch.cuda.device_count()):
                raise ValueError(f"each rank needs a GPU of its own: expected more than {local} GPUs, got {found}")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        elif torch.cuda.is_available():
            raise ValueError("device must be 'cuda' where ranks see GPUs (hide them: CUDA_VISIBLE_DEVICES=), got 'cpu'")
        over = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**over)
        return cls(dist.get_rank(), world_size, device)

    def barrier(self) -> None:
        """Wait for the others, and for this GPU's work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def least(self, number: int) -> int:
        """The smallest that any rank has: all must make as many passes."""
        if self.world_size == 1:
            return number
        shared = torch.tensor([number], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def build_model(config: PreTrainedConfig, dtype: torch.dtype, ranks: Ranks, seed: int = 0) -> PreTrainedModel:
    """A causal language model with random weights, in evaluation mode, on the rank's device.

    Matrices are drawn from a normal distribution with the config's initializer_range; vectors (norms, biases) have
    the values of the model's own initialisation. On one kind of device several ranks hold slices of what one process
    holds. Several need accelerate installed, as tensor parallelism in transformers does.
    """
    require_transformers()  # and keep its table of weights that were in no checkpoint off the terminal: none are
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from flexprefill_fa.integrations.hf_ranks import check_heads

    text = config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    check_heads(f"this {config.model_type} config", heads, text.num_key_value_heads or heads, ranks.world_size)
    config = copy.deepcopy(config)
    model: Any
    if ranks.world_size == 1:
        with ranks.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # Made on no device, then cut: an empty state dict leaves every weight to the initialisation, of which each rank
        # does its share.
        options: dict[str, Any] = {"config": config, "state_dict": {}, "dtype": dtype}
        shares = DistributedConfig(tp_size=ranks.world_size, tp_plan="auto")
        model = model_class.from_pretrained(None, **options, distributed_config=shares)
    _draw_weights(model, text.initializer_range, seed)
    return model.eval()


def _draw_weights(model: PreTrainedModel, deviation: float, seed: int) -> None:
    """Fill every matrix, whole on every rank for a moment, whose own part is kept."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
            generator = torch.Generator(local.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=local.device)
            whole.normal_(0.0, deviation, generator=generator)
            if isinstance(parameter, DTensor):
                mesh, places = parameter.device_mesh, parameter.placements
                whole = distribute_tensor(whole, mesh, places, src_data_rank=None).to_local()
            local.copy_(whole)
