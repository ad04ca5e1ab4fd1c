"""What python -m colossal_llama2.evaluation does: read the tasks, compute their items for each model, and report."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.errors import RunError, UserError, reason
from colossal_llama2.evaluation import ranks
from colossal_llama2.evaluation.card import write_card
from colossal_llama2.evaluation.compute import Record, records_of
from colossal_llama2.evaluation.report import print_results, write_results
from colossal_llama2.evaluation.results import result_of
from colossal_llama2.evaluation.settings import EvaluationSettings
from colossal_llama2.evaluation.task import Task, task_fingerprint
from colossal_llama2.evaluation.tasks import read_tasks
from colossal_llama2.inference import loading
from colossal_llama2.inference.answer_file import AnswerFile, model_digest
from colossal_llama2.logs import SilentProgress, get_logger, is_first_rank, progress
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

CHANGED = {
    "models": "other files of {}",
    "tasks": "other items or examples of {} (another --limit, --num_fewshot or --seed, or other files)",
}


def run(settings: EvaluationSettings) -> None:
    """Evaluate all models on all tasks, print the table, and write what --output_file asks for.

    Raises:
        UserError: a flag, a model's folder or a set's file cannot be used; with file:line for a set.
        RunError: the GPU runs out of memory.
    """
    given = [Path(path) for path in settings.model_paths]
    for folder in filter(Path.is_dir, given):
        # Before the seconds that importing torch takes.
        loading.check_files(folder, given=str(folder))
    tasks = read_tasks(settings.tasks, num_fewshot=settings.num_fewshot, limit=settings.limit, seed=settings.seed)
    models = _models(settings)
    job = _Job(settings, tasks, models)
    if not job.is_done:
        loading.quiet_libraries()
        with (
            loading.memory_errors_named(settings.device, cure="use a smaller --batch_size, or --device cpu"),
            ranks.connected(),
        ):
            job.compute()
    if is_first_rank():
        job.report()


class Model(NamedTuple):
    """A model: its name in the table, its folder, and --model_path, for messages."""

    name: str
    folder: Path
    given: str


def _models(settings: EvaluationSettings) -> list[Model]:
    found = []
    for path, name in zip(settings.model_paths, shortest_names(settings.model_paths), strict=True):
        folder = loading.local_folder(path)
        loading.check_files(folder, given=path)
        found.append(Model(name, folder, path))
    return found


def shortest_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, and of those that end alike as many more as make them differ."""
    parts = [Path(path).absolute().parts for path in paths]

    def name(place: int) -> str:
        whole = parts[place]
        others = [other for number, other in enumerate(parts) if number != place]
        for count in range(1, len(whole) + 1):
            if all(other[-count:] != whole[-count:] for other in others):
                return str(Path(*whole[-count:]))
        return paths[place]

    return [name(place) for place in range(len(paths))]


class _Job:
    """All items of all tasks and models, of which the first may have been computed by an earlier command."""

    def __init__(self, settings: EvaluationSettings, tasks: Sequence[Task], models: Sequence[Model]):
        self._settings, self._tasks, self._models = settings, tasks, models
        self._items = sum(len(task.subjects) for task in tasks)
        self._decides: dict[str, Any] = {
            # Lists, since the order decides which line belongs to which model and task.
            "models": [[model.name, model_digest(model.folder)] for model in models],
            "tasks": [[task.name, task_fingerprint(task)] for task in tasks],
            "dtype": None,
        }
        self._file: AnswerFile | None = None
        if settings.output_file is not None:
            count = self._items * len(models)
            self._file = AnswerFile(settings.output_file, self._decides, prompts=count, asked="item", changed=CHANGED)
            self._check_precision(self._file.dtype, settings)
        self._records = self._earlier_records()

    def _check_precision(self, before: str | None, settings: EvaluationSettings) -> None:
        """Raise a UserError, before torch is imported, for a file that was begun with another --dtype or --device."""
        if before is None:
            return
        dtype, _, device = before.partition(" on ")
        given = device if settings.device is None else settings.device.partition(":")[0]
        if (dtype, device) != (settings.dtype, given):
            raise UserError(
                f"--output_file {settings.output_file} was begun with --dtype {before}, now {settings.dtype} on "
                f"{given}; give a new file, or the same settings"
            )

    def _earlier_records(self) -> list[Record]:
        """The records of an earlier command.

        Raises:
            UserError: one belongs to another model or task than its line, is there twice, or lacks a field.
        """
        if self._file is None:
            return []
        found, seen = self._file.records(), set()
        places = (
            (model.name, task.name, len(task.subjects))
            for model in self._models
            for task in self._tasks
            for _ in task.subjects
        )
        for number, (record, (model, task, count)) in enumerate(zip(found, places, strict=False), start=1):
            given = record.get("model"), record.get("task")
            if given != (model, task):
                raise UserError(
                    f"{self._settings.output_file}:{number}: is an item of {given[0]} and {given[1]}, and one of "
                    f"{model} and {task} belongs there; give a new file"
                )
            if not _is_record(record, count):
                raise UserError(f"{self._settings.output_file}:{number}: is not an item of {task}; give a new file")
            if (model, task, record["item"]) in seen:
                raise UserError(
                    f"{self._settings.output_file}:{number}: has an item of {model} and {task} a second time; give a "
                    "new file"
                )
            seen.add((model, task, record["item"]))
        return found

    @property
    def is_done(self) -> bool:
        """Whether every item has its record already."""
        return len(self._records) == self._items * len(self._models)

    def compute(self) -> None:
        """Compute the items that have no record yet. Called on all ranks."""
        device = loading.resolve_device(ranks.own_device(self._settings.device))
        with contextlib.ExitStack() as around:
            if self._file is not None and is_first_rank():
                around.enter_context(contextlib.closing(self._file))
            done = self._open(device.type)
            for number, model in enumerate(self._models):
                if done < (number + 1) * self._items:
                    self._evaluate(model, device)

    def _open(self, device: str) -> int:
        """Open --output_file on rank 0. Returns how many items are done, or raises the error of rank 0 on all ranks."""
        problem, is_mistake = None, True
        if self._file is not None and is_first_rank():
            try:
                self._file.open(f"{self._settings.dtype} on {device}")
                self._records = self._earlier_records()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem, is_mistake = reason(error), False
        problem, is_mistake, done = ranks.gathered([problem, is_mistake, len(self._records)])[0]
        if problem is not None:
            raise UserError(problem) if is_mistake else RunError(problem)
        return done

    def _evaluate(self, model: Model, device: "torch.device") -> None:
        """All tasks of a model, without the items that have a record."""
        dtype = "fp32" if self._settings.dtype == "auto" and device.type == "cpu" else self._settings.dtype
        network, tokenizer = loading.load_folder(model.folder, device, given=model.given, dtype=dtype, rows=1)
        for task in self._tasks:
            # Rank 0 alone has opened the file.
            done = ranks.gathered(self._items_of(model, task))[0]
            if len(done) < len(task.subjects):
                self._measure(model, network, tokenizer, task, done)

    def _items_of(self, model: Model, task: Task) -> list[int]:
        """The items of a task whose records are there."""
        of = (model.name, task.name)
        return [record["item"] for record in self._records if (record["model"], record["task"]) == of]

    def _measure(
        self,
        model: Model,
        network: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        task: Task,
        done: Sequence[int],
    ) -> None:
        found = records_of(network, tokenizer, str(model.folder), task, batch_size=self._settings.batch_size, done=done)
        bar = SilentProgress()
        if is_first_rank():
            name = f"{model.name}, {task.name}"
            bar = progress(total=len(task.subjects), description=name, unit="item", initial=len(done))
        with bar:
            for records in found:
                if is_first_rank():
                    self._add(model, task, records)
                bar.update(len(records))

    def _add(self, model: Model, task: Task, records: Sequence[Record]) -> None:
        for record in records:
            whole = {"model": model.name, "task": task.name, **record}
            self._records.append(whole)
            if self._file is not None:
                self._file.add(whole)

    def report(self) -> None:
        """Print the table, and write the JSON and the chart beside the file of items."""
        found: dict[tuple[str, str], list[Record]] = {}
        for record in self._records:
            found.setdefault((record["model"], record["task"]), []).append(record)
        results = [
            result_of(model.name, task, found[model.name, task.name]) for model in self._models for task in self._tasks
        ]
        get_logger().info(f"{counted(len(self._records), 'item')} evaluated")
        print_results(results, by_subject=self._settings.by_subject)
        if self._settings.write_card:
            for model in self._models:
                write_card(model.folder, [result for result in results if result.model == model.name])
        if self._settings.output_file is not None:
            dtype = self._file.dtype if self._file else None
            write_results(results, self._settings.output_file, {**self._decides, "dtype": dtype})


def _is_record(record: Record, count: int) -> bool:
    """Whether a record has what the results of a task with `count` items are made of."""

    def has(name: str, *kinds: type) -> bool:
        return type(record.get(name)) in kinds

    is_scored = has("is_correct", bool) or (has("bits", int, float) and has("bytes", int))
    logits = record.get("logits", [0.0])
    return (
        has("item", int)
        and 0 <= record["item"] < count
        and has("subject", str)
        and has("tokens", int)
        and has("seconds", int, float)
        and is_scored
        and isinstance(logits, list)
        and all(type(logit) in (int, float) for logit in logits)
    )
