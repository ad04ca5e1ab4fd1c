"""The inputs of a run before its weights: the model's shape, the data, the order of samples and the first sample.

`open_inputs` is the first half of every run. A dry run ends here; build_run.py builds the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS
from colossal_llama2.dataset.read.buckets import Buckets, MeasuredPart
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import check_lengths, load_parts
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import measure_parts
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.settings import Ranks
from colossal_llama2.errors import UserError
from colossal_llama2.model import training_history
from colossal_llama2.model.loading import ModelFacts, check_model
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.model.training_history import Weights
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.resuming import Start
from colossal_llama2.train.checkpointing.run_facts import RunFacts
from colossal_llama2.train.checkpointing.small_files import json_bytes, model_files
from colossal_llama2.train.checks import Checks, check_model_fits, check_tokenizer_fits
from colossal_llama2.train.evaluation.accuracies import LoadedTask, load_eval_tasks
from colossal_llama2.train.evaluation.answers import EvalPrompt, load_prompts
from colossal_llama2.train.evaluation.evaluation_setup import load_eval_sets
from colossal_llama2.train.evaluation.evaluator import LoadedSet
from colossal_llama2.train.forecast import data_plan
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.report.model_card import base_model
from colossal_llama2.train.run_folder.file_names import STATES_NAME
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.stepping.schedule import CosineSchedule

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LoadedData:
    """The samples of --dataset.

    Attributes:
        samples: as `load_parts` returns them.
        measured: the parts with the lengths of their samples; empty on ranks that do not need them, which are all but
            the first unless the order depends on lengths.
        buckets: the order of samples, if it is not one shuffle of everything.
        eval_sets: the samples of each --eval_dataset.
        eval_tasks: those of --eval_tasks.
        eval_prompts: those of --eval_prompts.
    """

    samples: "datasets.Dataset"
    measured: Sequence[MeasuredPart]
    buckets: Buckets | None
    eval_sets: list[LoadedSet]
    eval_tasks: list[LoadedTask]
    eval_prompts: list[EvalPrompt]


@dataclass(frozen=True)
class JobInputs:
    """What is known about a job before its weights are read. For a benchmark this is all.

    Attributes:
        ranks: the engine of a job; of a dry run, the ranks that it plans for.
    """

    model: ModelFacts
    ranks: Ranks
    order: SampleOrder

    @property
    def engine(self) -> Engine:
        """The ranks of a job that runs; a dry run has none. Raises TypeError there."""
        if not isinstance(self.ranks, Engine):
            raise TypeError("a dry run has no engine")
        return self.ranks


@dataclass(frozen=True)
class RunInputs(JobInputs):
    """All that is known about a run before its weights are read.

    Attributes:
        facts: what all checkpoints of the run record.
        base: the hashes of the weights that an adapter is trained on; empty without an adapter, and in a dry run.
        schedule: the learning rate of each update, and the number of steps.
    """

    data: LoadedData
    facts: RunFacts
    start: Start
    schedule: CosineSchedule
    base: Weights = field(default_factory=dict)

    @property
    def has_documents(self) -> bool:
        """Whether the samples have the lengths of their documents."""
        return DOCUMENT_LENGTHS in self.data.samples.column_names


def open_inputs(config: TrainConfig, checks: Checks) -> RunInputs:
    """Open model and data, check them against each other and the flags, and find where the run begins.

    Raises:
        UserError: a check found a problem; on all ranks of a job, and with all problems in a dry run.
    """
    model = _open_model(config, checks)
    data = _open_data(config, checks, model)
    if not checks.may_continue():
        checks.raise_problems()
    ranks = checks.ranks(config, model)
    if data is not None:
        checks.samples(data.samples, model, flag="--dataset")
        for eval_set in data.eval_sets:
            checks.samples(eval_set.samples, model, flag=f"--eval_dataset {eval_set.name}")
    checks.weights(config.source.weights, config.engine.precision)
    base = checks.base_of_adapter(config)
    order = checks(_order_of_data, config, ranks, data)
    name = checks.on_first_rank(base_model, config.source.weights)
    facts = checks(run_metadata.describe_run, config, ranks, order, name)
    checks.dry_run_only(_check_records, config, facts)
    start = checks(_find_start, config, facts, order)
    schedule = checks(resuming.make_schedule, config, start, order)
    checks.raise_problems()
    assert model and data and order and facts and start and schedule, "what is missing was raised as a problem"
    return RunInputs(model, ranks, order, data, facts.with_first_sample(start.first_sample), start, schedule, base)


def open_benchmark_inputs(config: TrainConfig, checks: Checks, *, num_samples: int) -> JobInputs:
    """The same for --benchmark, which reads no data.

    Args:
        num_samples: random samples of an epoch.
    """
    model = checks.model(config.source.weights_folder)
    checks(check_model_fits, config, model)
    checks.raise_problems()
    assert model is not None, "what is missing was raised as a problem"
    ranks = checks.ranks(config, model)
    checks.weights(config.source.weights, config.engine.precision)
    return JobInputs(model, ranks, _sample_order(config, ranks, num_samples))


def _open_model(config: TrainConfig, checks: Checks) -> ModelFacts | None:
    """Its shapes, compared with its config.json, the flags and the tokenizer."""
    source = config.source
    if not checks.may_continue() and not _is_model(source.weights_folder):
        return None  # reported with the flags
    model = checks.model(source.weights_folder)
    checks(check_model_fits, config, model)
    if config.has_tokenizer:
        checks(check_tokenizer_fits, config, model)
    if model is not None and config.has_tokenizer:
        files = partial(model_files, stage=config.stage, chat=config.chat)
        checks.dry_run_only(files, source.weights_folder, source.tokenizer, config.engine.precision)
    return model


def _open_data(config: TrainConfig, checks: Checks, model: ModelFacts | None) -> LoadedData | None:
    parts = config.data.parts
    if not parts.parts:
        return None  # reported with the flags
    samples = checks(load_parts, parts.paths, config.data.document_mask)
    checks(check_lengths, samples, config.data.max_length)
    if samples is None:
        return None
    if not checks.may_continue():
        # Token ids are not checked, since the model may be wrong.
        checks.samples(samples, None, flag="--dataset")
        return None
    measured = checks(_measure, parts)
    buckets = checks(data_plan.buckets_of, parts, measured)
    eval_sets = checks(load_eval_sets, config)
    eval_tasks = checks(load_eval_tasks, config, model)
    eval_prompts = checks(load_prompts, config)
    return LoadedData(samples, measured or [], buckets, eval_sets or [], eval_tasks or [], eval_prompts or [])


def _measure(data: Data) -> Sequence[MeasuredPart]:
    return measure_parts(data.parts) if data.needs_lengths or logs.is_first_rank() else []


def _order_of_data(config: TrainConfig, ranks: Ranks, data: LoadedData) -> SampleOrder:
    grouped = config.data.parts.groups_by_length
    lengths = np.concatenate([lengths for _, lengths in data.measured]) if grouped else None
    return _sample_order(config, ranks, len(data.samples), data.buckets, lengths)


def _sample_order(
    config: TrainConfig,
    ranks: Ranks,
    num_samples: int,
    buckets: Buckets | None = None,
    lengths: np.ndarray | None = None,
) -> SampleOrder:
    return data_plan.make_order(
        num_samples,
        micro_batch_size=config.engine.micro_batch_size,
        data_size=ranks.data_size,
        accumulation_steps=config.engine.accumulation_steps,
        seed=config.recipe.seed,
        buckets=buckets,
        lengths=lengths,
    )


def _find_start(config: TrainConfig, facts: RunFacts, order: SampleOrder) -> Start:
    return resuming.find_start(config, resuming.read_saved(config), facts, order)


def _check_records(config: TrainConfig, facts: RunFacts) -> None:
    """Refuse what no checkpoint could record, and log damage in the model's history."""
    json_bytes(facts.entries(), STATES_NAME)
    training_history.log_problem(training_history.read_history(Path(config.source.weights)))


def _is_model(folder: StrPath) -> bool:
    try:
        check_model(folder, "--pretrained", needs_weights=False)
    except UserError:
        return False
    return True
