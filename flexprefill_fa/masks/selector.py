"""The base class of selectors: what a rule leaves to it, which is all but the rule."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexprefill_fa.autocast import without_autocast
from flexprefill_fa.grid import MAX_BLOCKS, Grid, cdiv, real_ranges, unmasked_blocks, visible_blocks, whole_blocks
from flexprefill_fa.index_lists import PARTIAL, shared_lists
from flexprefill_fa.masks.density import usual_density
from flexprefill_fa.masks.element import Element, element_of
from flexprefill_fa.masks.settings import Travelling, as_settings, of_settings, travelling_fields
from flexprefill_fa.masks.shares import BlockShares
from flexprefill_fa.validation import check_block_size

Lists = tuple[Tensor, ...]
SelectOperator = Callable[..., Lists]

SHARED_HEADS = "_shared_heads"
"""What the name of a selector ends in that chooses once for the query heads of a key head."""

DEFAULT_SELECTOR = "peakprefill"
"""The name of the selector that is meant where none is named."""

_REGISTRY: dict[str, type[Selector]] = {}
_OPERATORS: dict[str, SelectOperator] = {}
_LIBRARIES: dict[str, torch.library.Library] = {}  # what defines each operator, as long as it is here


def get_selector(name: str) -> type[Selector]:
    """The class of a selector; `<name>_shared_heads` is made when it is first asked for, see `share_heads`.

    Raises:
        ValueError: if no selector has that name; the message lists those that exist.
    """
    own = name.removesuffix(SHARED_HEADS)
    if name not in _REGISTRY and own in _REGISTRY:
        from flexprefill_fa.masks.shared_heads import make_shared  # which needs this module

        return make_shared(_REGISTRY[own])
    if name not in _REGISTRY:
        raise ValueError(f"unknown selector {name!r}, expected one of {', '.join(selector_names())}")
    return _REGISTRY[name]


def default_selector(settings: Iterable[str] = ()) -> str:
    """The name of the selector that settings are for, by their names, where no selector is named.

    The default one, but FlexPrefill where they are its own: it was the default once, and what was written for it still
    means it.
    """
    given = set(settings)
    for name in (DEFAULT_SELECTOR, "flexprefill"):
        if given <= {field.name for field in dataclasses.fields(get_selector(name))}:  # pyright: ignore[reportArgumentType]
            return name
    return DEFAULT_SELECTOR


def selector_names() -> list[str]:
    """Of all selectors that are defined, in alphabetical order; without those that share heads."""
    return sorted(name for name in _REGISTRY if not name.endswith(SHARED_HEADS))


def is_registered(kind: type) -> bool:
    """Whether it is a selector, and the one that its name means now."""
    return issubclass(kind, Selector) and _REGISTRY.get(getattr(kind, "name", "")) is kind


def check_selector(config: object) -> None:
    """A selector's config, or a TypeError that says what was expected: for a name or a class, the config of it."""
    if not isinstance(config, Selector):
        meant = getattr(config, "name", config)
        name = meant if isinstance(meant, str) and meant in selector_names() else DEFAULT_SELECTOR
        wanted = f"{get_selector(name).__name__}() or get_selector({name!r})()"
        raise TypeError(f"config must be a selector config such as {wanted}, got {in_words(config)}")


def in_words(value: object) -> str:
    """What came in the place of a config: text as it is, a class as one, of everything else the type."""
    if isinstance(value, str):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class Selector:
    """A rule for which key blocks each query block computes, and its settings.

    A subclass is a frozen dataclass of numbers, with a rule in plain PyTorch:

        @dataclass(frozen=True)
        class NearestConfig(Selector, name="nearest"):
            count: int = 4

            def keep(self, element: Element) -> Tensor:
                first, _ = element.diagonal()
                block = torch.arange(element.grid.kv_blocks, device=element.device)
                return (first[:, None] - block < self.count).expand(element.heads, -1, -1)

    Fields are bool, int, float or a Literal, or one of them or None; `block_size` (64 or 128 tokens) is added as the
    last one where a class does not declare it. Check values in `__post_init__`, and begin it with
    `super().__post_init__()`.

    Attributes:
        name: by which it is found; its operator is `flexprefill_fa::select_<name>`.
        diagnostics: names of the numbers for each head that its rule reports, see `Element.report`.
        triton: "package.module:function" of the same rule for CUDA, or None. The function takes (query, key, starts,
            lengths, config, scale, all_partial, zero_tails) and returns what `operator` does.
        sweep: the field that says how much is kept (or several, which move together), and values to try, fewest
            blocks first.
    """

    name: ClassVar[str]
    diagnostics: ClassVar[tuple[str, ...]] = ()
    triton: ClassVar[str | None] = None
    sweep: ClassVar[Mapping[str, Sequence[Any]]] = {}

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _fields: ClassVar[tuple[Travelling, ...]] = ()

    block_size: int

    def __init_subclass__(cls, name: str | None = None, register: bool = True, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        name = vars(cls).get("name") if name is None else name  # a dataclass with slots is made twice
        if name is None:
            raise TypeError(f"class {cls.__name__} needs a name: expected class {cls.__name__}(Selector, name=...)")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a selector's name must be lower case letters, digits and _, got {name!r}")
        if not register:  # for what stands in a selector's place and has an operator of its own
            return
        inherited = "triton" not in vars(cls) and {"keep", "always", "clauses", "pattern"} & set(vars(cls))
        if inherited:  # kernels of another rule
            cls.triton = None
        other = _REGISTRY.get(name)  # a module may be loaded again, and a notebook's cell run again
        remade = "__dataclass_params__" in vars(cls)  # by a dataclass with slots, before it has its qualified name
        if other is not None and not remade:
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the selector {name!r} is there already: {other.__module__}.{other.__qualname__}")
            if (other.diagnostics, other.triton) != (cls.diagnostics, cls.triton):
                raise ValueError(
                    f"the selector {name!r} was defined with diagnostics {other.diagnostics} and triton "
                    f"{other.triton!r}, which its operator keeps: expected the same, or another name"
                )
        if not isinstance(cls.diagnostics, tuple):
            raise TypeError(f"{cls.__name__}.diagnostics must be a tuple of names, got {cls.diagnostics!r}")
        declared = vars(cls).get("__annotations__", {})
        if "block_size" not in declared:
            cls.__annotations__ = {**declared, "block_size": int}
            cls.block_size = 128
        cls.name, cls._fields = name, travelling_fields(cls)
        if other is None:
            _OPERATORS[name] = _define_operator(name, len(cls.diagnostics), cls.triton is not None)
        _REGISTRY[name] = cls

    def __init__(self, *arguments: Any, **fields: Any) -> None:
        raise TypeError(f"{type(self).__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it")

    def __post_init__(self) -> None:
        """Checks the block size."""
        check_block_size(self.block_size)

    def keep(self, element: Element) -> Tensor:
        """The rule: bool `[H, nq, nk]`, the blocks that one sequence keeps.

        Blocks of the future do not matter, and what `always` keeps is added.
        """
        raise NotImplementedError(f"{type(self).__name__} must define keep(element)")

    def always(self, element: Element) -> Tensor:
        """bool `[nq, nk]`: blocks that are kept whatever the rule says, those of all `clauses`."""
        if type(self).clauses is Selector.clauses:
            return element.first_and_diagonal()
        parts = self.clauses(element)
        if not parts:
            raise ValueError(f"{type(self).__name__}.clauses must name a part of what is always kept, got none")
        return functools.reduce(torch.logical_or, parts.values())

    def clauses(self, element: Element) -> dict[str, Tensor]:
        """The parts of `always` by their names, bool `[nq or 1, nk or 1]`: the first block, and a row's own positions.

        Of a selector with a `pattern`, which adds nothing to it: the parts of that. Blocks of the future do not matter.
        """
        return {"first block": element.first_block(), "own positions": element.own_positions()}

    def block_shares(self, element: Element) -> BlockShares | None:
        """What the rule compares with its threshold, for `flexprefill inspect`; None where it has no such number."""
        return None

    def pattern(self, grid: Grid, ranges: Tensor) -> Tensor | None:
        """For rules that look at no query and no key: bool `[B, nq, nk]`, all that is kept; None: ask `keep`.

        Args:
            grid: of the whole batch. ranges: int32 `[B, 2]`, the positions of each element's real tokens.
        """
        return None

    @property
    def dense_tokens(self) -> int:
        """Prompts of at most this many tokens keep every block."""
        return 2 * self.block_size

    def expected_density(self, tokens: int) -> float:
        """Kept blocks / causal blocks that a prompt of this length usually comes to, in [0, 1]."""
        return 1.0 if tokens <= self.dense_tokens else usual_density(tokens)

    def settings(self) -> Tensor:
        """The fields as float64 on the CPU, without the block size, for `operator`."""
        if not getattr(self, "__dataclass_params__").frozen:  # noqa: B009  # which no type checker knows
            raise TypeError(f"{type(self).__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it")
        if not is_registered(type(self)):
            raise ValueError(f"{type(self).__name__} was defined again since this config was made: make a new one")
        check_block_size(self.block_size)
        return as_settings(self, self._fields)

    @classmethod
    def from_settings(cls, settings: Tensor, block_size: int) -> Any:
        """The inverse of `settings`."""
        return of_settings(cls, cls._fields, settings, block_size)

    @classmethod
    def operator(cls) -> SelectOperator:
        """The operator that runs the selection, with these arguments.

        query `[B, Hq, Lq, D]` and key `[B, Hkv, Lkv, D]`;
        starts, lengths: int `[B]`, first real key and number of real keys, or None;
        settings: `settings()`, a tensor, so that a compiled graph serves every setting;
        scale: score scale, None for 1/sqrt(D);
        block_size: tokens per block;
        all_partial: put every kept block in the partial list (for a mask_mod that may mask anywhere);
        zero_tails: fill the indices that are in neither list with 0, so that whole outputs can be compared.

        Returns:
            kv_num_blocks, full_kv_num_blocks int32 `[B, Hq, nq]`, indices int32 `[B, Hq, nq, 4 + nk]`, of which
            `index_lists.both_lists` makes the two lists, then the class's diagnostics (fp32 `[B, Hq]`).
        """
        return _OPERATORS[cls.name]


def _define_operator(name: str, diagnostics: int, has_triton: bool) -> SelectOperator:
    """`flexprefill_fa::select_<name>`: the rule in plain PyTorch, and the kernels on CUDA where a class names some."""
    schema = (
        "(Tensor query, Tensor key, Tensor? starts, Tensor? lengths, Tensor settings, float? scale, SymInt block_size, "
        f"bool all_partial, bool zero_tails) -> ({', '.join(['Tensor'] * (3 + diagnostics))})"
    )

    def select(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
        config = _REGISTRY[name].from_settings(settings, block_size)
        with without_autocast(query.device.type):
            return select_plain(query, key, starts, lengths, config, scale, all_partial, zero_tails)

    def select_on_cuda(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
        config = _REGISTRY[name].from_settings(settings, block_size)
        return kernels_of(name)(query, key, starts, lengths, config, scale, all_partial, zero_tails)

    def traced(query, key, starts, lengths, settings, scale, block_size, all_partial, zero_tails) -> Lists:
        return traced_lists(query, key, block_size, diagnostics)

    # Without what `torch.library.custom_op` adds, above all an autograd layer in Python, which each call would pay for.
    operator = f"select_{name}"
    _LIBRARIES.pop(name, None)  # one that was forgotten
    library = _LIBRARIES[name] = torch.library.Library("flexprefill_fa", "FRAGMENT")
    library.define(operator + schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(operator, select, "CPU" if has_triton else "CompositeExplicitAutograd")
    if has_triton:
        library.impl(operator, select_on_cuda, "CUDA")
    torch.library.register_fake(f"flexprefill_fa::{operator}", traced, lib=library)
    return getattr(torch.ops.flexprefill_fa, operator).default


@functools.cache
def kernels_of(name: str) -> Callable[..., Lists]:
    """The function that a selector's `triton` names, imported where it runs."""
    module, _, function = str(get_selector(name).triton).partition(":")
    return getattr(importlib.import_module(module), function)


def select_plain(
    query: Tensor,
    key: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    config: Selector,
    scale: float | None = None,
    all_partial: bool = False,
    zero_tails: bool = True,
) -> Lists:
    """A selection by the rule in plain PyTorch, on any device; arguments and results as of `Selector.operator`.

    It waits for the device only to read back the padding that the rule must leave out.
    """
    batch, heads, q_len, dim = query.shape
    grid = Grid(q_len, key.shape[2], config.block_size)
    ranges = None
    if starts is not None or lengths is not None:
        ranges = real_ranges(starts, lengths, batch, grid.kv_len, query.device)
    reports = {name: torch.zeros(batch, heads, device=query.device) for name in config.diagnostics}
    keep = None
    if type(config).pattern is not Selector.pattern:
        keep = config.pattern(
            grid, real_ranges(None, None, batch, grid.kv_len, query.device) if ranges is None else ranges
        )
    repeats = 1 if keep is None else heads
    if keep is None:
        keep = _kept_blocks(query, key, config, grid, ranges, 1 / math.sqrt(dim) if scale is None else scale, reports)
    else:
        keep = keep[:, None]
    lists = _lists_of(keep, ranges, grid, all_partial, zero_tails)
    if repeats > 1:
        lists = tuple(x.repeat(1, repeats, *[1] * (x.dim() - 2)) for x in lists)
    return *lists, *reports.values()


def _lists_of(keep: Tensor, ranges: Tensor | None, grid: Grid, all_partial: bool, zero_tails: bool) -> Lists:
    """Index lists of kept blocks `[B, H, nq, nk]`, without what no real query sees."""
    if keep.is_cuda and grid.kv_blocks <= MAX_BLOCKS:
        # One launch instead of 18. A plain rule imports no Triton elsewhere.
        write = importlib.import_module("flexprefill_fa.kernels.shared_heads").lists_of
        return write(keep, ranges, grid, all_partial, zero_tails)
    if ranges is None:
        visible, unmasked = whole_blocks(grid, keep.device)
    else:
        visible = visible_blocks(grid, ranges)
        unmasked = visible & unmasked_blocks(grid, ranges)
    if all_partial:
        return shared_lists(keep & visible[:, None], None)
    return shared_lists(keep & (visible ^ unmasked)[:, None], keep & unmasked[:, None])


def _kept_blocks(
    query: Tensor,
    key: Tensor,
    config: Selector,
    grid: Grid,
    ranges: Tensor | None,
    scale: float,
    reports: dict[str, Tensor],
) -> Tensor:
    """bool `[B, H, nq, nk]`: what the rule and `always` keep of each sequence; fills the reports `[B, H]`."""
    batch, heads = query.shape[:2]
    shape = (batch, heads, grid.q_blocks, grid.kv_blocks)
    alone = batch == 1 and ranges is None  # its sequence fills the grid
    keep = None if alone else torch.zeros(shape, dtype=torch.bool, device=query.device)
    for b, (start, end) in enumerate([(0, grid.kv_len)] * batch if ranges is None else ranges.tolist()):
        found = element_of(query[b], key[b], start, end, grid, scale)
        if found is None:
            continue
        element, rows, columns = found
        blocks = _kept(config, element) | config.always(element)
        for name, values in element.reports.items():
            reports[name][b] = values
        if keep is None:
            return blocks[None]
        keep[b, :, rows, columns] = blocks
    assert keep is not None  # a sequence without padding has a query
    return keep


def _kept(config: Selector, element: Element) -> Tensor:
    """What the rule keeps, checked.

    Raises:
        TypeError, ValueError: if it returns something else than bool `[H, nq, nk]`, or a report is not declared.
    """
    keep, grid = config.keep(element), element.grid
    shape = (element.heads, grid.q_blocks, grid.kv_blocks)
    rule = f"{type(config).__name__}.keep"
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"{rule} must return a bool tensor, got {got}")
    if tuple(keep.shape) != shape:
        raise ValueError(f"{rule} must return shape [H, nq, nk] = {shape}, got {tuple(keep.shape)}")
    unknown = sorted(set(element.reports) - set(config.diagnostics))
    if unknown:
        raise ValueError(f"{rule} reports {', '.join(unknown)}, but its class declares {config.diagnostics}")
    return keep


def traced_lists(query: Tensor, key: Tensor, block_size: int, diagnostics: int) -> Lists:
    """What tracing sees of a selection, unwritten."""
    batch, heads, q_len, _ = query.shape
    rows, columns = cdiv(q_len, block_size), cdiv(key.shape[2], block_size)
    count = query.new_empty((batch, heads, rows), dtype=torch.int32)
    indices = query.new_empty((batch, heads, rows, PARTIAL + columns), dtype=torch.int32)
    numbers = (query.new_empty((batch, heads), dtype=torch.float32) for _ in range(diagnostics))
    return count, torch.empty_like(count), indices, *numbers
