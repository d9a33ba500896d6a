"""What tensor parallelism asks of a model whose attention heads are shared out over ranks."""

from __future__ import annotations


def check_heads(what: str, query_heads: int, kv_heads: int, ranks: int) -> None:
    """Whether every rank gets whole heads, and as many as the others.

    Args:
        what: the model or layer, for the message.
        query_heads: of the whole layer. kv_heads: of the whole layer.
        ranks: over which they are shared out.

    Raises:
        ValueError: if not.
    """
    if query_heads % ranks or kv_heads % ranks:
        raise ValueError(
            f"{what} has {query_heads} query heads and {kv_heads} kv heads: tensor parallelism needs a number of ranks "
            f"that divides both, got {ranks}"
        )
