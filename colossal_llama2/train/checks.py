"""Compare the inputs of a run: the model with the flags and the tokenizer, token ids with the vocabulary, numbers.

A job makes each check on all of its ranks together (JobChecks). A dry run makes it in one process, and collects all
problems (DryRunChecks).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from colossal_llama2 import logs
from colossal_llama2.dataset.read.prepared_data import highest_token_id
from colossal_llama2.dataset.read.untrained import log_untrained, untrained_samples
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import Ranks
from colossal_llama2.engine.settings_problems import split_problems
from colossal_llama2.errors import UserError
from colossal_llama2.model.adapter_files import check_base, read_adapter, weights_hashes
from colossal_llama2.model.loading import ModelFacts, facts_of_config, has_pickled_weights, inspect_weights
from colossal_llama2.model.model_folder import StrPath, has_weights
from colossal_llama2.model.positions import described
from colossal_llama2.model.training_history import Weights
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.settings.from_flags import Problems
from colossal_llama2.train.settings.ranks import PlannedRanks

if TYPE_CHECKING:
    import datasets

Value = TypeVar("Value")


class Checks(Protocol):
    """How checks are made. A result is None only in a dry run, where a check found a problem or was skipped."""

    def __call__(self, action: Callable[..., Value], *arguments: Any) -> Value | None:
        """The result of `action` for these arguments. It must not wait for other ranks.

        A dry run skips it if an argument is None, since an earlier check found out why.
        """

    def on_first_rank(self, action: Callable[..., Value], *arguments: Any) -> Value | None:
        """The result of `action` on rank 0, a JSON value."""

    def dry_run_only(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Make a check that a job makes later, when it writes files."""

    def may_continue(self) -> bool:
        """Whether checks that need valid flags make sense."""

    def raise_problems(self) -> None:
        """Raise a UserError that names all problems found so far, if there are any."""

    def model(self, folder: StrPath) -> ModelFacts | None:
        """The sizes of the model in a folder, after its weights are compared with its config.json."""

    def ranks(self, config: TrainConfig, model: ModelFacts | None) -> Ranks:
        """The ranks of the job."""

    def samples(self, samples: "datasets.Dataset", model: ModelFacts | None, *, flag: str) -> None:
        """Refuse data of another tokenizer, or without a trained token."""

    def weights(self, folder: str, precision: str) -> None:
        """Refuse weights with numbers that are not finite in `precision`."""

    def base_of_adapter(self, config: TrainConfig) -> Weights:
        """The hashes of the weights that an adapter is trained on, compared with those that it was trained on before.

        Empty if the run trains no adapter, and in a dry run, which reads no weights.
        """


class JobChecks(Checks):
    """The checks of a job that runs. All ranks call its methods together; each check fails on all or on none."""

    def __call__(self, action: Callable[..., Value], *arguments: Any) -> Value:
        with collectives.all_or_none():
            return action(*arguments)

    def on_first_rank(self, action: Callable[..., Value], *arguments: Any) -> Value:
        with collectives.all_or_none():
            value = action(*arguments) if collectives.place()[0] == 0 else None
        return collectives.first_rank_value(value)

    def dry_run_only(self, action: Callable[..., Any], *arguments: Any) -> None:
        pass

    def may_continue(self) -> bool:
        # The flags of a job are valid.
        return True

    def raise_problems(self) -> None:
        pass  # each check has raised its own

    def model(self, folder: StrPath) -> ModelFacts:
        return self(inspect_weights, folder)

    def ranks(self, config: TrainConfig, model: ModelFacts | None) -> Ranks:
        """The engine that will hold the model."""
        assert model is not None, "a job has inspected its model"
        trainable = config.engine.trainable
        # Gemini leaves frozen weights out of its chunks, and of an adapter's model hardly any are trained.
        split = model.parameters if trainable.adapter is None else trainable.parameters(model)
        return Engine(config.engine, split)

    def samples(self, samples: "datasets.Dataset", model: ModelFacts | None, *, flag: str) -> None:
        """Each rank reads its share."""
        assert model is not None, "a job has inspected its model"
        rank, ranks = collectives.place()
        with collectives.all_or_none():
            highest = highest_token_id(samples, share=rank, shares=ranks)
            untrained = untrained_samples(samples, share=rank, shares=ranks)
        check_highest_id(collectives.max_over_ranks(highest), model, flag=flag)
        log_untrained(sum(collectives.gather_values(untrained)), len(samples), flag=flag)

    def weights(self, folder: str, precision: str) -> None:
        """The ranks of a host share the work. Each host reads all weights: the folder may be on its own disk."""
        cure = "use --mixed_precision bf16 or fp32" if precision == "fp16" else "use --mixed_precision fp32"
        share, shares = collectives.place_on_host()
        with collectives.all_or_none():
            check_numbers(folder, precision, cure=cure, share=share, shares=shares)

    def base_of_adapter(self, config: TrainConfig) -> Weights:
        """Each rank reads its share of the files."""
        if config.engine.trainable.adapter is None or config.benchmark is not None:
            return {}
        folder, (rank, ranks) = config.source.weights, collectives.place()
        with collectives.all_or_none():
            own = weights_hashes(folder, share=rank, shares=ranks)
        base = {name: entry for hashes in collectives.gather_values(own) for name, entry in hashes.items()}
        if config.source.adapter is not None:
            with collectives.all_or_none():
                check_base(read_adapter(config.source.adapter), folder, base, flag="--pretrained")
        return base


class DryRunChecks(Checks):
    """The checks of a dry run: in this process only, without the weights' numbers, and with all problems collected."""

    def __init__(self, problems: Problems):
        """
        Args:
            problems: of the flags, to which others are added.
        """
        self._problems, self._has_valid_flags = problems, not problems

    def __call__(self, action: Callable[..., Value], *arguments: Any) -> Value | None:
        if any(argument is None for argument in arguments):
            return None
        return self._problems.check(lambda: action(*arguments))

    def on_first_rank(self, action: Callable[..., Value], *arguments: Any) -> Value | None:
        return self(action, *arguments)

    def dry_run_only(self, action: Callable[..., Any], *arguments: Any) -> None:
        self(action, *arguments)

    def may_continue(self) -> bool:
        return self._has_valid_flags

    def raise_problems(self) -> None:
        self._problems.raise_any()

    def model(self, folder: StrPath) -> ModelFacts | None:
        """A config.json is enough."""
        if has_weights(Path(folder)):
            return self(inspect_weights, folder)
        has = "only pickled weights, which a run refuses" if has_pickled_weights(Path(folder)) else "no weights"
        logs.get_logger().info("%s has %s: planned only from its config.json", folder, has)
        return self(facts_of_config, folder)

    def ranks(self, config: TrainConfig, model: ModelFacts | None) -> Ranks:
        return PlannedRanks(config.engine, config.world_size)

    def samples(self, samples: "datasets.Dataset", model: ModelFacts | None, *, flag: str) -> None:
        self(lambda: log_untrained(untrained_samples(samples, share=0, shares=1), len(samples), flag=flag))
        self(lambda facts: check_highest_id(highest_token_id(samples, share=0, shares=1), facts, flag=flag), model)

    def weights(self, folder: str, precision: str) -> None:
        """A dry run reads no weights."""

    def base_of_adapter(self, config: TrainConfig) -> Weights:
        return {}


def check_model_fits(config: TrainConfig, model: ModelFacts) -> None:
    """Refuse samples longer than the model has positions, and ranks that cannot split it."""
    max_length, settings = config.data.max_length, config.engine
    if max_length > model.positions:
        # As in `check_max_length`, for a checkpoint with other positions than --pretrained.
        has = described(model.positions, model.scaling)
        raise UserError(f"--max_length {max_length} given, {has}; give at most that")
    for problem in split_problems(settings, model):
        raise UserError(problem)


def check_tokenizer_fits(config: TrainConfig, model: ModelFacts) -> None:
    """Refuse a tokenizer with more tokens than the model has rows, with which the model could not be used."""
    folder = config.source.tokenizer
    tokens = len(load_tokenizer(folder, pad_token=config.data.pad_token))
    if tokens > model.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {tokens:,} tokens, the model's vocabulary {model.vocab_size:,}; "
            f"the tokenizer was extended but the model was not: run init_model.py, and give --pretrained the folder "
            f"that it writes"
        )


def check_highest_id(highest: int, model: ModelFacts, *, flag: str = "--dataset") -> None:
    """Raise a UserError if a token id is beyond the model's vocabulary."""
    if highest >= model.vocab_size:
        raise UserError(
            f"{flag} has token id {highest}, the model's vocabulary ends at {model.vocab_size - 1}; "
            f"prepare the data with the tokenizer of the model"
        )
