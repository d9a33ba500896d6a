"""What every selector offers, and what is done with any of them."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexprefill_fa.block_mask import base_mask_mod, looked_up, to_block_mask
from flexprefill_fa.selection import BlockSelection
from flexprefill_fa.validation import check_padding, check_query_key, check_scale

SelectOperator = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


class SelectorConfig(Protocol):
    """The settings of a selector: a frozen dataclass, checked when made."""

    name: ClassVar[str]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block."""
        ...

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks that a prompt of this length usually comes to, in [0, 1]."""
        ...

    def settings(self) -> Tensor:
        """The numbers as a float64 tensor on the CPU, for `operator`."""
        ...

    def operator(self) -> SelectOperator:
        """The operator `(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails)`."""
        ...


def check_selector(config: object) -> None:
    """A selector's config, or a TypeError that says what was expected."""
    if isinstance(config, type) or not callable(getattr(config, "operator", None)):
        got = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"config must be a selector config such as FlexPrefillConfig(), got {got}")


def select_blocks(
    query: Tensor,
    key: Tensor,
    config: SelectorConfig,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    all_partial: bool = False,
) -> BlockSelection:
    """Run a selector.

    Args:
        query: `[B, Hq, Lq, D]`, the last Lq positions of the keys. key: `[B, Hkv, Lkv, D]`.
        config: which selector, and its settings.
        lengths: number of real keys of each batch element; starts: its first real key. Default: all keys are real.
        scale: score scale, default 1/sqrt(D).
        all_partial: put every kept block in the partial list, for a mask_mod that may mask anywhere.

    Returns:
        The selection; nothing in it has been read back from the GPU.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
    """
    check_selector(config)
    check_query_key(query, key)
    check_scale(scale)
    starts, lengths = check_padding(starts, lengths, query.shape[0], key.shape[2], query.device)
    lists = config.operator()(
        query, key, starts, lengths, config.settings(), scale, config.block_size, all_partial, False
    )
    return BlockSelection(*lists, query.shape[2], key.shape[2], config.block_size, starts, lengths, all_partial)


def create_block_mask(
    query: Tensor,
    key: Tensor,
    config: SelectorConfig,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    starts: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    eager_safe: bool = True,
) -> BlockMask:
    """The BlockMask of a selector's choice, see `create_flexprefill_block_mask`."""
    selection = select_blocks(query, key, config, lengths=lengths, starts=starts, scale=scale)
    mask_mod = base_mask_mod(query, key, selection.starts, selection.lengths)
    if eager_safe:
        mask_mod = looked_up(mask_mod, selection.to_dense(), selection.block_size)
    return to_block_mask(selection, mask_mod)
