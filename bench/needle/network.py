"""The needle model: a Llama whose parameters have the names and shapes of Hugging Face's, and its folder."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexprefill_fa.tools.loading import UsageError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEAD_DIM = 64
_EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of the model; heads of 64, 4 query heads to a key and value head.

    Attributes:
        vocabulary: tokens of the tokenizer.
        hidden, intermediate: widths.
        layers, heads, kv_heads: how many.
        theta: base of the rotary positions. At 1e8, a third of each head turns less than half a radian in 128K
            tokens, so that content is compared alike at every distance.
        positions: the longest prompt that the model says it takes.
    """

    vocabulary: int = 2048
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    theta: float = 1e8
    positions: int = 131072

    def config(self) -> dict[str, Any]:
        """`config.json` as Hugging Face's Llama reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 0,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": self.positions,
            "mlp_bias": False,
            "model_type": "llama",
            "rms_norm_eps": _EPSILON,
            "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            **{name: getattr(self, size) for size, name in _SIZES.items()},
        }


_SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}
"""Names of the sizes in `config.json`."""


class _Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.q_proj = nn.Linear(shape.hidden, shape.heads * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(shape.heads * HEAD_DIM, shape.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (_turn(heads, cosine.to(heads.dtype), sine.to(heads.dtype)) for heads in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, _EPSILON)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, _EPSILON)
        self.mlp = _FeedForward(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Backbone(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, _EPSILON)


class Network(nn.Module):
    """The model, with random weights drawn from torch's global generator."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = _Backbone(shape)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The last hidden states `[B, n, hidden]` of tokens `[B, n]`; `logits` reads them."""
        powers = torch.arange(0, HEAD_DIM, 2, device=tokens.device, dtype=torch.int64).float() / HEAD_DIM
        positions = torch.arange(tokens.shape[1], device=tokens.device).float()
        angles = positions[:, None] * (1.0 / self.shape.theta**powers)
        angles = torch.cat((angles, angles), -1)  # [n, HEAD_DIM]
        cosine, sine = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cosine, sine)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token `[..., vocabulary]`; the embedding serves as the head too."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def logits_at(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Scores `[B, A, vocabulary]` of the tokens at `places` `[B, A]`, from the states before them."""
        return self.logits(hidden.gather(1, (places - 1)[..., None].expand(-1, -1, hidden.shape[-1])))


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: dimension i and i + 32 of `[B, H, n, 64]` are a point that turns with the position."""
    first, second = heads.chunk(2, -1)
    return heads * cosine + torch.cat((-second, first), -1) * sine


def export(network: Network, tokenizer: Path, folder: Path) -> None:
    """Write config, bfloat16 weights and the files of the tokenizer in a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    config = json.dumps(network.shape.config(), indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_release(folder: Path, device: torch.device) -> tuple[Network, Tokenizer]:
    """The model of such a folder, in bfloat16 as it is used, and its tokenizer.

    Raises:
        UsageError: where there is no such model.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = Shape(**{size: config[name] for size, name in _SIZES.items()})
        if config | shape.config() != config:
            raise ValueError("its config.json is not of the needle model's architecture")
        with torch.device("meta"):
            network = Network(shape)
        network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises no narrower one
        raise UsageError(f"no needle model in {folder}: {first_line(error)}") from error
    return network.to(device), tokenizer


def attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU flash attention or nothing: the kernels that SDPA would fall back to need memory for all scores.

    Raises:
        UsageError: for a GPU that is too old for it.
    """
    if device.type != "cuda":
        return nullcontext()
    if (found := torch.cuda.get_device_capability(device)) < (8, 0):
        got = ".".join(map(str, found))
        raise UsageError(f"flash attention in bfloat16 needs a GPU of compute capability 8.0 or more, got {got}")
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
