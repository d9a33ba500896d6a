"""One choice for the query heads of a key head: every block that one of them keeps, by any selector.

The union, because it lowers no head's recall at equal settings, and needs no rule for how scores of heads compare; what
it costs is density. A kernel that serves several heads at once, or reads each key block once for all of them, can then
do so. The lists stay per query head, as FlexAttention's kernels want them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from flexprefill_fa.masks.element import Element
from flexprefill_fa.masks.selector import SHARED_HEADS, Lists, Selector, check_selector, get_selector, kernels_of


def share_heads(config: Selector) -> Any:
    """The same selector and settings, with one choice for the query heads of each key head.

    By name it is `<selector>_shared_heads`: in `get_selector`, on the command line, and wherever else a selector is
    named.

    Raises:
        TypeError: for what is not a selector's config.
        ValueError: for a selector that keeps the same in every head, such as `streaming_llm`.
    """
    check_selector(config)
    if isinstance(config, _SharedHeads):
        return config
    return get_selector(config.name + SHARED_HEADS)(**_fields(config))


class _SharedHeads:
    """What is put before a selector."""

    name: ClassVar[str]

    def keep(self, element: Element) -> Tensor:
        kept = super().keep(element)  # pyright: ignore[reportAttributeAccessIssue]
        together = kept.unflatten(0, (-1, element.groups)).any(1, keepdim=True)
        return together.expand(-1, element.groups, -1, -1).flatten(0, 1)

    def __reduce__(self) -> tuple[Any, ...]:  # the class is in no module
        own: Any = get_selector(self.name.removesuffix(SHARED_HEADS))
        return share_heads, (own(**_fields(self)),)


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def make_shared(kind: type[Selector]) -> type[Selector]:
    """The selector `<name>_shared_heads` of a selector."""
    if kind.pattern is not Selector.pattern:  # the same in every head
        raise ValueError(f"{kind.name} looks at no head: it keeps the same in all of them")
    members: dict[str, Any] = {
        "__doc__": f"{kind.__name__} with one choice for the query heads of a key head.",
        "__annotations__": {"block_size": int},
        "block_size": kind.block_size,
    }
    if kind.triton is not None:
        members["triton"] = f"{__name__}:select_by_triton"
    name = kind.name + SHARED_HEADS
    made = type(f"SharedHeads{kind.__name__}", (_SharedHeads, kind), members, name=name)
    return dataclasses.dataclass(frozen=True)(made)


def select_by_triton(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: Any,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = False,
) -> Lists:
    """The selector's own kernels, then the unions in place."""
    from flexprefill_fa.kernels.shared_heads import unite_heads

    own = kernels_of(config.name.removesuffix(SHARED_HEADS))
    lists = own(query, key, starts, lengths, config, scale, all_partial, zero_tails)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        unite_heads(query, key, starts, lengths, lists[:3], config.block_size, all_partial, zero_tails)
    return lists
