"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from flexprefill_fa import masks
from flexprefill_fa.choice import make_config, selector_spec
from flexprefill_fa.mean_correction import MeanCorrection
from flexprefill_fa.tools.loading import UsageError, one_line_errors

Model = Annotated[str, typer.Option(help="A local folder with a causal language model in Hugging Face format.")]
PromptFile = Annotated[str, typer.Option(help="The prompt, UTF-8 text; - reads standard input.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed prefills of each kind; the median is reported.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]

USUAL = f"{masks.DEFAULT_SELECTOR} with tilted means where the model can have them"
"""What runs where no selector is named."""

_SELECTOR = Annotated[
    str | None,
    typer.Option(
        help="Which selector chooses the blocks: name, or name:field=value+field=value; default: "
        f"{USUAL}, or flexprefill where an option of its own is given.",
        show_default=False,
    ),
]
_FIELDS: dict[str, Any] = {
    "gamma": Annotated[
        float | None, typer.Option(help="FlexPrefill: share of the attention probability to cover, in (0, 1].")
    ],
    "tau": Annotated[
        float | None, typer.Option(help="FlexPrefill: Jensen-Shannon distance below which a head is query-aware.")
    ],
    "min_budget": Annotated[int | None, typer.Option(help="FlexPrefill: tokens that every query row keeps at least.")],
    "max_budget": Annotated[int | None, typer.Option(help="FlexPrefill: tokens that a query row keeps at most.")],
    "block_size": Annotated[int | None, typer.Option(help="Tokens per block.")],
    "variant": Annotated[str | None, typer.Option(help="FlexPrefill: published or paper.")],
}
SELECTOR_FIELDS = tuple(_FIELDS)


@dataclass(frozen=True)
class Selected:
    """What `--selector` and the options beside it ask for.

    Attributes:
        config: the selector's.
        chosen: whether any of them was given; tilted means go with the default selector alone.
    """

    config: Any
    chosen: bool

    def correction(self, model: Any) -> MeanCorrection:
        """The mean correction that goes with it, for a model.

        Raises:
            UsageError: if the integration refuses the model.
        """
        from flexprefill_fa.tools.generation import usual_correction

        return False if self.chosen else usual_correction(model)


def selector_options(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--selector` and options for these fields of selectors in the place of its keyword `selected`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            settings = {name: given.pop(name) for name in fields}
            with one_line_errors():
                selected = _selected(given.pop("selector"), settings)
            command(**given, selected=selected)

        options = {"selector": _SELECTOR, **{name: _FIELDS[name] for name in fields}}
        shown: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name == "selected":
                shown += [parameter.replace(name=name, annotation=kind, default=None) for name, kind in options.items()]
            else:
                shown.append(parameter)
        run.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return run

    return decorate


def _selected(selector: str | None, settings: dict[str, Any]) -> Selected:
    """From a selector's spec and the options beside it, where None means not given."""
    given = {name: value for name, value in settings.items() if value is not None}
    name, fields = selector_spec(masks.default_selector(given) if selector is None else selector)
    for field in fields:
        if field in given:
            raise UsageError(f"{field} is given twice, as an option and in selector {selector!r}")
    return Selected(make_config(name, **(given | fields)), chosen=selector is not None or bool(given))
