"""--dry_run --suggest: which layouts a model fits, what they cost, and which is the cheapest.

It reads at most a config.json, or uses a built-in size; it needs neither weights nor data, and imports no torch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import unused_flags, with_defaults
from colossal_llama2.dataset.write.sample_lengths import check_max_length
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import UserError
from colossal_llama2.gpus import GPUS
from colossal_llama2.launcher import place
from colossal_llama2.model.config_fields import ModelFolder, fields_of
from colossal_llama2.model.loading import check_model_folder
from colossal_llama2.model_sizes import MODEL_SIZES, VOCABULARIES
from colossal_llama2.terminal_text import show
from colossal_llama2.train.forecast.suggestion import Job, Suggestion, suggest
from colossal_llama2.train.forecast.suggestion_report import MOST_HYBRID, Budget, suggestion_lines, summary_lines
from colossal_llama2.train.settings.flag_problems import suggestion_problems
from colossal_llama2.train.settings.from_flags import Problems, engine_settings


def plan_layouts(args: argparse.Namespace) -> None:
    """Print what fits, for parsed flags.

    Raises:
        UserError: with everything that is wrong.
    """
    given, args = args, with_defaults(args)
    problems = Problems(unused_flags(given) + suggestion_problems(args))
    models = problems.check(lambda: _models(args))
    problems.raise_any()
    if not logs.is_first_rank():
        return
    jobs = [_job(args, *model) for model in models]
    budget = Budget(args.tokens, args.gpu_hour_price, args.storage_gb_per_s * 1e9)
    if len(jobs) == 1:
        suggestions, compared = suggest(jobs[0], most_hybrid=MOST_HYBRID)
        _check_tokens(budget, suggestions)
        lines = suggestion_lines(jobs[0], suggestions, budget, compared=compared)
    else:
        found = [(job, suggest(job, most_hybrid=1)[0]) for job in jobs]
        for _, suggestions in found:
            _check_tokens(budget, suggestions)
        lines = summary_lines(found, budget)
    show("\n".join([*lines, "dry run: nothing was trained, nothing was written"]))


def _check_tokens(budget: Budget, suggestions: Sequence[Suggestion]) -> None:
    """Raise a UserError for a budget of less than a step of the best layout."""
    if suggestions and budget.tokens < suggestions[0].step_tokens:
        raise UserError(
            f"--tokens {budget.tokens:g}: less than one step, which has {suggestions[0].step_tokens:,} tokens; give "
            "more, or fewer --step_tokens or --num_ranks"
        )


def _models(args: argparse.Namespace) -> list[tuple[str, dict[str, Any], EngineSettings]]:
    """Name, fields and settings of each model to plan for: the given one, or all built-in sizes."""
    base = engine_settings(args)
    if args.pretrained is not None:
        folder = ModelFolder(args.pretrained)
        check_model_folder(folder, "--pretrained", needs_weights=False)
        check_max_length(args.max_length, folder)
        base = replace(base, trainable=base.trainable.of_model(folder))
        return [(args.pretrained, folder.fields, base)]
    sizes = list(MODEL_SIZES) if args.model_size is None else [args.model_size]
    vocabularies = VOCABULARIES if args.model_size is None else [args.vocab_size]
    return [(size, built_in_fields(size, vocab, args.max_length), base) for size in sizes for vocab in vocabularies]


def built_in_fields(size: str, vocab_size: int, max_length: int) -> dict[str, Any]:
    """The fields of config.json of a built-in size, with a vocabulary and as many positions as samples need."""
    sizes = MODEL_SIZES[size]
    positions = max(max_length, int(sizes["max_position_embeddings"]))
    entries = {**sizes, "vocab_size": vocab_size, "max_position_embeddings": positions}
    return fields_of(entries, Path(f"--model_size {size}"))


def _job(args: argparse.Namespace, name: str, fields: dict[str, Any], base: EngineSettings) -> Job:
    return Job(
        name=name,
        fields=fields,
        base=base,
        ranks=args.num_ranks or place().world_size,
        gpu=GPUS[args.gpu],
        max_length=args.max_length,
        step_tokens=args.step_tokens,
        always_recomputes=args.use_grad_checkpoint,
    )
