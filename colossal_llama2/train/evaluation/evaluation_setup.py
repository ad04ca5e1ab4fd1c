"""The data of --eval_dataset, opened and checked, and the evaluator of a run, which measures the tasks as well."""

from colossal_llama2.dataset.read.eval_sets import target_bytes
from colossal_llama2.dataset.read.prepared_data import check_lengths, dataset_fingerprints, load_parts, without_names
from colossal_llama2.engine.engine import Engine
from colossal_llama2.evaluation.task import task_fingerprint
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory
from colossal_llama2.train.checkpointing.resuming import Start
from colossal_llama2.train.evaluation.accuracies import LoadedTask
from colossal_llama2.train.evaluation.alarm import Alarm
from colossal_llama2.train.evaluation.answers import Answerer, EvalPrompt
from colossal_llama2.train.evaluation.evaluator import Evaluator, LoadedSet, SilentEvaluator
from colossal_llama2.train.settings.collating import make_collator
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.stopping import NoSignals


def load_eval_sets(config: TrainConfig) -> list[LoadedSet]:
    """The samples of each --eval_dataset. Raises UserError as for --dataset."""
    loaded = []
    # Document lengths matter without --document_mask too: a document's first token is not predicted.
    mask = "auto" if config.data.document_mask == "off" else config.data.document_mask
    for eval_set in config.evaluation.sets:
        flag = f"--eval_dataset {eval_set.name}"
        samples = without_names(load_parts([eval_set.path], mask, flag=flag))
        check_lengths(samples, config.data.max_length, flag=flag)
        loaded.append(LoadedSet(eval_set.name, samples, target_bytes(eval_set.path)))
    return loaded


def read_history(config: TrainConfig, start: Start) -> EvaluationHistory:
    """The evaluations so far; a run that measures nothing keeps those of the checkpoint that it resumes."""
    fingerprints = {eval_set.name: dataset_fingerprints([eval_set.path])[0] for eval_set in config.evaluation.sets}
    fingerprints |= {task.name: task_fingerprint(task) for task in config.evaluation.tasks}
    return EvaluationHistory.after(start.resumed, fingerprints)


def make_evaluator(
    config: TrainConfig,
    engine: Engine,
    sets: list[LoadedSet],
    tasks: list[LoadedTask],
    prompts: list[EvalPrompt],
    history: EvaluationHistory,
    *,
    eval_pending: bool,
    reporter: SilentReporter,
    stop: NoSignals,
) -> SilentEvaluator:
    """What evaluates the model on --eval_dataset and --eval_tasks, and answers --eval_prompts, while it trains.

    Args:
        eval_pending: run the evaluation that a signal interrupted after the step at which the run begins.
    """
    if not sets and not tasks:
        return SilentEvaluator()
    settings, collator = config.evaluation, make_collator(config, keeps_apart=config.data.document_mask != "off")
    answerer = None
    if prompts:
        answerer = Answerer(
            engine,
            prompts,
            collator,
            most_tokens=settings.prompt_tokens,
            turn_ends=config.chat.turn_ends if config.chat else (),
            tokenizer_dir=config.source.tokenizer,
            stop=stop,
        )
    return Evaluator(
        engine,
        sets,
        collator,
        tasks=tasks,
        answerer=answerer,
        interval=settings.interval,
        reporter=reporter,
        history=history,
        stop=stop,
        eval_pending=eval_pending,
        alarm=Alarm(settings.limits, stops=settings.stops),
    )
