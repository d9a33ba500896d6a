"""lm-evaluation-harness, one task at one length at a time: find tasks, load their data, ask a model."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from flexprefill_fa.tools.evaluation.budget import BudgetError
from flexprefill_fa.tools.evaluation.task_data import takes_budget
from flexprefill_fa.tools.loading import UsageError, first_line
from flexprefill_fa.tools.needle import TASKS_DIR

if TYPE_CHECKING:
    from flexprefill_fa.integrations.lm_eval import FlexPrefillLM

_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "description"}
"""What a group may say without changing its tasks."""

_OWN_TASKS = Path(__file__).parent / "tasks"


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
        wrong: the indices of questions with a score below 1; None where scores are not 0, 1 or a share between them.
        truncated: prompts that were too long for the model, of which lm-eval left out the beginning.
        prompts_sha256: of all prompts, in order.
        first_prompts: the tokens of the first few prompts, as the model read them.
    """

    metric: str
    value: float
    samples: int
    wrong: list[int] | None
    truncated: int
    prompts_sha256: str
    first_prompts: list[list[int]] = field(repr=False)


class Tasks:
    """The tasks of lm-eval, this package and `include`, by name.

    Attributes:
        names: of the tasks that were asked for, groups and tags taken apart.
        manager: lm-eval's index of tasks.

    Args:
        names: tasks, groups or tags.
        include: more folders with task files.
        data_dir: a folder with datasets under their names, taken from there where a task's file names one of them.

    Raises:
        UsageError: for a name that no task has, or a folder that is not there.
    """

    def __init__(self, names: Sequence[str], include: Sequence[Path] = (), data_dir: Path | None = None):
        from lm_eval.tasks import TaskManager

        for folder in (*include, *(() if data_dir is None else (data_dir,))):
            if not folder.is_dir():
                raise UsageError(f"no folder at {folder}")
        folders: list[str | Path] = [_OWN_TASKS, TASKS_DIR, *(folder.resolve() for folder in include)]
        self._data_dir = data_dir
        self.manager = TaskManager(include_path=folders, include_defaults=False)
        if any(name not in self.manager.task_index for name in names):
            self.manager = TaskManager(include_path=folders)  # reads thousands of files
        self.names = list(dict.fromkeys(leaf for name in names for leaf in self._leaves(name)))

    def _leaves(self, name: str) -> list[str]:
        entry = self.manager.task_index.get(name)
        if entry is None:
            own = sorted(path.stem for folder in (_OWN_TASKS, TASKS_DIR) for path in folder.glob("*.yaml"))
            raise UsageError(
                f"no task {name!r}: expected one of lm-eval's tasks, groups or tags, or of this package: "
                f"{', '.join(own)}"
            )
        if name in self.manager.all_tags:
            return sorted(entry.tags)
        if name in self.manager.all_groups:
            group = self._config(name)
            children = group.get("task", [])
            if set(group) - _GROUP_KEYS or not all(isinstance(child, str) for child in children):
                raise UsageError(
                    f"group {name} changes the settings of its tasks, which this command does not follow: "
                    "name its tasks one by one"
                )
            return [leaf for child in children for leaf in self._leaves(child)]
        return [name]

    def load(self, name: str, metadata: dict[str, Any], seed: int = 0) -> Any:
        """A task with its data, the same for the same seed.

        Args:
            name: one of `names`.
            metadata: for tasks that make their own prompts, see `task_data.dataset`.
            seed: lm-eval's own tasks draw their prompts with Python's and numpy's global random numbers.

        Raises:
            UsageError: saying which task lacks which data.
        """
        _seed_everything(f"{seed} {name} {metadata.get('max_seq_lengths')}")
        try:
            with _without_bars():
                loaded = self.manager.load([{"group": "asked", "task": [self._changed(name, metadata)]}])
        except BudgetError as error:
            raise UsageError(f"task {name}: {first_line(error)}") from error
        except OSError as error:  # as hubs and `datasets` say that something is not there
            raise UsageError(self._data_problem(name, error)) from error
        except Exception as error:  # task files raise nearly anything
            what = f"task {name} cannot be loaded: {type(error).__name__}: {first_line(error)}"
            raise UsageError(what) from error
        task = loaded["tasks"][name]
        if task.OUTPUT_TYPE == "loglikelihood_rolling" or not all((task.higher_is_better() or {}).values()):
            raise UsageError(f"task {name} has a metric where less is better; rows hold metrics where more is better")
        return task

    def _changed(self, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """A task as a group of lm-eval's names it, with the settings that are not as its file has them."""
        config = self._config(name)
        changed: dict[str, Any] = {"task": name, "metadata": {**self._own_metadata(name), **metadata}}
        dataset = config.get("dataset_path")
        if self._data_dir is not None and dataset and (self._data_dir / dataset).is_dir():
            changed["dataset_path"] = str((self._data_dir / dataset).resolve())
        options = config.get("dataset_kwargs") or {}
        if features := options.get("features"):  # lm-eval gives them to `datasets` in a form that it does not take
            import datasets

            kinds: dict[str, Any] = {}
            for field_name, kind in features.items():
                value = datasets.Value(kind["dtype"])
                kinds[field_name] = datasets.Sequence(value) if kind.get("sequence") else value
            changed["dataset_kwargs"] = {**options, "features": datasets.Features(kinds)}
        return changed

    def version(self, name: str) -> Any:
        """The version in the metadata of a task's file; None without one."""
        return self._own_metadata(name).get("version")

    def _own_metadata(self, name: str) -> dict[str, Any]:
        metadata = self._config(name).get("metadata")
        return metadata if isinstance(metadata, dict) else {}

    def _config(self, name: str) -> dict[str, Any]:
        """What the file of a task or group says, with what it includes; functions as lm-eval's index has them."""
        return self.manager.task_index[name].cfg or {}

    def _data_problem(self, name: str, error: Exception) -> str:
        dataset = self._config(name).get("dataset_path")
        found = "give --data-dir DATA" if dataset else "start this command in the folder DATA"
        return (
            f"task {name} needs data that is not here: {dataset or 'what its task file names'} ({first_line(error)}). "
            f"Where the network is closed, fetch it elsewhere (hf download --repo-type dataset NAME --local-dir "
            f"DATA/NAME) and {found}"
        )


def _seed_everything(text: str) -> None:
    """Seed the global random numbers; what lm-eval's `ruler_cwe` keeps in its module goes on from its last draw."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    random.seed(seed)
    numpy.random.seed(seed)


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm-eval draws a bar for each step of each task, and some tasks print; one bar for the whole run is enough."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
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
    generates = task.OUTPUT_TYPE == "generate_until"
    batch = lm.batch_size_per_gpu
    try:
        if not generates:
            lm.batch_size_per_gpu = 1  # lm-eval pads such batches on the right, without a mask
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
    finally:
        lm.batch_size_per_gpu = batch
    name = task.config.task
    logged = results["samples"][name]
    chosen = logged[0]["filter"]  # tasks may read an answer in several ways: the first counts
    asked = sorted((sample for sample in logged if sample["filter"] == chosen), key=lambda sample: sample["doc_id"])
    metric, value = _metric(results["results"][name], chosen, length)
    prompts = [sample["arguments"][0][0] for sample in asked]
    room = lm.max_length - (task.config.generation_kwargs.get("max_gen_toks", lm.max_gen_toks) if generates else 0)
    encoded = [lm.tok_encode(prompt) for prompt in prompts]
    scores = [sample.get(metric) for sample in asked]
    shares = all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores)
    return Answers(
        metric=metric,
        value=value,
        samples=len(asked),
        wrong=[sample["doc_id"] for sample, score in zip(asked, scores, strict=True) if score < 1] if shares else None,
        truncated=sum(len(ids) > room for ids in encoded),
        prompts_sha256=hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        first_prompts=[ids[-room:] for ids in encoded[:8]],
    )


def _metric(results: dict[str, Any], chosen: str, length: int | None) -> tuple[str, float]:
    """lm-eval's RULER tasks have a metric for each length, others name theirs."""
    values = {}
    for key, value in results.items():
        name, comma, filtered = key.partition(",")
        if comma and filtered == chosen and not name.endswith("_stderr"):
            values[name] = value
    name = str(length) if str(length) in values else next(iter(values))
    return name, float(values[name])
