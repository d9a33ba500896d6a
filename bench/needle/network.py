"""The needle model for training: a Llama whose parameters have the names and shapes of Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": _EPSILON,
            "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


class _Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, _EPSILON)


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
        self.input_layernorm = _Norm(shape.hidden)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _Norm(shape.hidden)
        self.mlp = _FeedForward(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Backbone(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.hidden)


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


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: dimension i and i + 32 of `[B, H, n, 64]` are a point that turns with the position."""
    first, second = heads.chunk(2, -1)
    return heads * cosine + torch.cat((-second, first), -1) * sine
