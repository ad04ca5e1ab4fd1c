"""What --eval_dataset names, opened and checked, and what measures the model on it."""

import argparse
from typing import Any

from colossal_llama2.dataset.read.eval_sets import resolve_eval_sets, target_bytes
from colossal_llama2.dataset.read.prepared_data import (
    check_lengths,
    dataset_fingerprints,
    load_tokenized_dataset,
    without_names,
)
from colossal_llama2.engine.engine import Engine
from colossal_llama2.train.checkpointing.checkpointer import LoadPlan
from colossal_llama2.train.evaluation.evaluator import (
    Alarm,
    Evaluator,
    LoadedSet,
    SilentEvaluator,
    history_of,
    is_cut_short,
)
from colossal_llama2.train.settings import flags
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.stopping import NoSignals


def load_eval_sets(args: argparse.Namespace) -> list[LoadedSet]:
    """The data of --eval_dataset, checked as that of --dataset is."""
    sets = []
    for name, path in resolve_eval_sets(args.eval_dataset):
        flag = f"--eval_dataset {name}"
        # Nothing is told by source and category there. Where documents end matters without --document_mask too.
        mask = "auto" if args.document_mask == "off" else args.document_mask
        samples = without_names(load_tokenized_dataset([path], mask, flag=flag))
        check_lengths(samples, args.max_length, flag=flag)
        sets.append(LoadedSet(name, samples, target_bytes(path)))
    return sets


def make_evaluator(
    args: argparse.Namespace,
    plan: LoadPlan,
    engine: Engine,
    sets: list[LoadedSet],
    run_facts: dict[str, Any],
    *,
    tokenizer_path: str,
    owes: bool,
    metrics: SilentReporter,
    stop: NoSignals,
) -> SilentEvaluator:
    """What measures the model on --eval_dataset; checkpoints get what it finds.

    Args:
        owes: whether it makes up for an evaluation, see `owes_evaluation`.
    """
    saved = plan.read_states()[1] if plan.resume_path is not None else {}
    fingerprints = {one.name: dataset_fingerprints([one.path])[0] for one in resolve_eval_sets(args.eval_dataset)}
    # Kept through a run that is not measured, too.
    run_facts["evaluations"] = history_of(saved, fingerprints)
    run_facts["eval_fingerprints"] = {**(saved.get("eval_fingerprints") or {}), **fingerprints}
    if not sets:
        return SilentEvaluator()
    collator = flags.make_collator(args, tokenizer_path, keeps_apart=args.document_mask != "off")
    return Evaluator(
        engine,
        sets,
        collator,
        interval=args.eval_interval,
        metrics=metrics,
        history=run_facts["evaluations"],
        stop=stop,
        makes_up=owes,
        alarm=Alarm(alarm_limits(args), stops=args.on_forgetting == "stop"),
    )


def owes_evaluation(args: argparse.Namespace, plan: LoadPlan) -> bool:
    """Whether the run makes up for an evaluation that a signal has cut short in the one that it resumes."""
    return bool(args.eval_dataset) and plan.resume_path is not None and is_cut_short(plan.read_states()[1])


def alarm_limits(args: argparse.Namespace) -> dict[str, float]:
    """--forgetting_alarm: by which share each set's bits per byte may rise."""
    pairs = (word.rpartition("=") for word in args.forgetting_alarm or ())
    return {name: float(limit) for name, _, limit in pairs}
