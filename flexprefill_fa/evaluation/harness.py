"""lm-evaluation-harness, one task at one length at a time: find tasks, load their data, ask a model."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexprefill_fa.evaluation.task_data import takes_budget
from flexprefill_fa.loading import UsageError, first_line
from flexprefill_fa.rows import CHECKOUT

if TYPE_CHECKING:
    from flexprefill_fa.integrations.lm_eval import FlexPrefillLM

_OWN_TASKS = Path(__file__).parent / "tasks"
_NEEDLE_TASKS = CHECKOUT / "bench" / "needle" / "tasks"


def require_lm_eval() -> None:
    """Check that lm-eval is here, and keep its notes off the terminal (its errors stay).

    Raises:
        UsageError: naming the extra to install.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"this command needs lm-evaluation-harness: pip install 'flexprefill-fa[eval]' ({first_line(error)})"
        ) from error


@dataclass(frozen=True)
class Answers:
    """What a model answered to one task.

    Attributes:
        metric: the task's first metric, or that of the length.
        value: its value.
        samples: how many questions there were.
        wrong: the indices of questions with a score below 1; None where questions have no score of their own.
        prompts_sha256: of all prompts, in order.
        first_prompts: the first few prompts, as the model read them.
    """

    metric: str
    value: float
    samples: int
    wrong: list[int] | None
    prompts_sha256: str
    first_prompts: list[str] = field(repr=False)


class Tasks:
    """The tasks of lm-eval, this package, the checkout and `include`, by name.

    Attributes:
        names: of the tasks that were asked for, groups and tags taken apart.
        manager: lm-eval's index of tasks.

    Args:
        names: tasks, groups or tags.
        include: more folders with task files.
        data_dir: a folder with datasets under their names, looked into before anything is downloaded.

    Raises:
        UsageError: for a name that no task has, or a folder that is not there.
    """

    def __init__(self, names: Sequence[str], include: Sequence[Path] = (), data_dir: Path | None = None):
        from lm_eval.tasks import TaskManager

        for folder in (*include, *(() if data_dir is None else (data_dir,))):
            if not folder.is_dir():
                raise UsageError(f"no folder at {folder}")
        folders: list[str | Path] = [folder for folder in (_OWN_TASKS, _NEEDLE_TASKS, *include) if folder.is_dir()]
        self._data_dir = data_dir
        # A task gets what this holds when it is loaded: building the index for each length would take 10 s each.
        self._metadata: dict[str, Any] = {"max_seq_lengths": []}
        self.manager = TaskManager(include_path=folders, include_defaults=False, metadata=self._metadata)
        if any(name not in self.manager.task_index for name in names):
            self.manager = TaskManager(include_path=folders, metadata=self._metadata)
        self.names = list(dict.fromkeys(leaf for name in names for leaf in self._leaves(name)))

    def _leaves(self, name: str) -> list[str]:
        from lm_eval.tasks._index import Kind

        entry = self.manager.task_index.get(name)
        if entry is None:
            raise UsageError(
                f"no task {name!r}: expected one of lm-eval's tasks, groups or tags, or of this package: "
                f"{', '.join(sorted(path.stem for path in self._own_files()))}"
            )
        if entry.kind is Kind.TAG:
            return sorted(entry.tags)
        if entry.kind is Kind.GROUP:
            children = (entry.cfg or {}).get("task", [])
            return [
                leaf for child in children for leaf in self._leaves(child if isinstance(child, str) else child["task"])
            ]
        return [name]

    def _own_files(self) -> Iterator[Path]:
        for folder in (_OWN_TASKS, _NEEDLE_TASKS):
            yield from folder.glob("*.yaml")

    def load(self, name: str, metadata: dict[str, Any]) -> Any:
        """A task with its data.

        Args:
            name: one of `names`.
            metadata: for tasks that make their own prompts, see `task_data.dataset`.

        Raises:
            UsageError: saying which task lacks which data.
        """
        self._metadata.update(metadata)
        try:
            with _working_in(self._data_dir), _without_bars():
                loaded = self.manager.load([self._spec(name)])
        except UsageError:
            raise
        except ValueError as error:
            if "length must be" in str(error):
                raise UsageError(f"task {name}: {first_line(error)}") from error
            raise UsageError(self._data_problem(name, error)) from error
        except Exception as error:  # datasets, hubs and task files raise nearly anything
            raise UsageError(self._data_problem(name, error)) from error
        return loaded["tasks"][name]

    def _spec(self, name: str) -> Any:
        """A task's name; or its whole config where lm-eval gives features to `datasets` in a form it does not take."""
        config = self._config(name)
        features = (config.get("dataset_kwargs") or {}).get("features")
        if not features:
            return name
        import datasets

        kinds: dict[str, Any] = {}
        for name_of, kind in features.items():
            value = datasets.Value(kind["dtype"])
            kinds[name_of] = datasets.Sequence(value) if kind.get("sequence") else value
        return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "features": datasets.Features(kinds)}}

    def _config(self, name: str) -> dict[str, Any]:
        """What a task's file says, with what it includes."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.manager.task_index[name]
        return load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else {}

    def _data_problem(self, name: str, error: Exception) -> str:
        wanted = self._config(name).get("dataset_path") or "what its task file names"
        return (
            f"task {name} cannot be loaded. It needs data: {wanted}. {first_line(error)}. Where the network is closed, "
            f"fetch it elsewhere (hf download --repo-type dataset NAME --local-dir DATA/NAME) and give --data-dir DATA"
        )


@contextmanager
def _working_in(folder: Path | None) -> Iterator[None]:
    """`datasets` takes a dataset from a folder of its name below the working folder, where there is one."""
    before = Path.cwd()
    try:
        if folder is not None:
            os.chdir(folder)
        yield
    finally:
        os.chdir(before)


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval draws a bar for each step of each task on stderr; one bar for the whole run is enough."""
    with redirect_stderr(io.StringIO()):
        yield


def has_budget(task: Any) -> bool:
    """Whether a task makes its prompts to a length."""
    return takes_budget(task.config.custom_dataset)


def ask(
    lm: FlexPrefillLM, tasks: Tasks, task: Any, length: int | None, samples: int, seed: int, chat_template: bool
) -> Answers:
    """Let lm-eval put a task's questions to a model.

    Args:
        lm: the model, with its selector.
        tasks: where the task is from; lm-eval would read all task files again without its index.
        task: from `Tasks.load`.
        length: in tokens, where the task was made to one.
        samples: questions to ask at most.
        seed: of lm-eval's own random numbers.
        chat_template: whether to put prompts into the tokenizer's chat template.
    """
    import lm_eval

    simple_evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its type
    with _without_bars():
        results: Any = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=tasks.manager,
            limit=samples,
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    name = task.config.task
    metric, value = _metric(results["results"][name], length)
    asked = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"][0][0] for sample in asked]
    scores = [sample.get(metric) for sample in asked]
    known = all(isinstance(score, (int, float)) for score in scores)
    return Answers(
        metric=metric,
        value=value,
        samples=len(asked),
        wrong=[sample["doc_id"] for sample, score in zip(asked, scores, strict=True) if score < 1] if known else None,
        prompts_sha256=hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        first_prompts=prompts[:8],
    )


def _metric(results: dict[str, Any], length: int | None) -> tuple[str, float]:
    """lm-eval's RULER tasks have a metric for each length, others name theirs."""
    values = {key.partition(",")[0]: value for key, value in results.items() if "," in key and "stderr" not in key}
    name = str(length) if str(length) in values else next(iter(values))
    return name, float(values[name])
