"""How a run continues from a checkpoint: whether it is intact, what must be unchanged, and how exact the resume is."""

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import changes_numbers
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.device import repeats_exactly
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.json_input import shown
from colossal_llama2.train.checkpointing.checkpointer import publish_model
from colossal_llama2.train.checkpointing.evaluation_history import was_interrupted
from colossal_llama2.train.checkpointing.run_facts import RunFacts
from colossal_llama2.train.checkpointing.saved_run import SavedRun
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import STATES_NAME
from colossal_llama2.train.settings.config import SaveConfig, TrainConfig
from colossal_llama2.train.settings.model_source import OTHER_CHECKPOINT, ModelSource, log_skipped, newest_source
from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps
from colossal_llama2.train.stepping.state import TrainState

if TYPE_CHECKING:
    from colossal_llama2.engine.engine import Engine

# Longest value of a checkpoint that a message quotes, in characters.
SHOWN_CHARACTERS = 200

# Facts that must be as in the checkpoint, and the flags behind them: they decide the position in the data, the meaning
# of the data, or which states Adam has.
DATA_FACTS = {
    "num_samples": "--dataset",
    "dataset_fingerprints": "--dataset",
    "bucketed": "--bucketed",
    "mixture": "--mixture",
    "mixture_end": "--mixture_end",
    "sources": "--dataset",
    "groups_by_length": "--group_by_length",
    "seed": "--seed",
}
RESUMED_FACTS = {
    **DATA_FACTS,
    "pretrained_tokenizer": "--pretrained",
    "model_shape": "--pretrained",
    "trained_rows": "--train_new_rows_only",
    "freeze_non_embeds_params": "--freeze_non_embeds_params",
    "adapter": "--lora_rank",
}
# Besides --lora_rank: what they mean is in the fact "adapter" too.
ADAPTER_FLAGS = ("--lora_alpha", "--lora_targets")


def with_first_ranks_source(config: TrainConfig) -> TrainConfig:
    """The settings with the model source of rank 0. Called on all ranks.

    With --resume auto, rank 0 alone looks for the newest checkpoint while the run folder is locked. The others may
    have looked before another run saved its last one.
    """
    source = ModelSource(**collectives.first_rank_value(config.source.as_values()))
    with collectives.all_or_none():
        return config.with_source(source)


def settle(config: TrainConfig) -> TrainConfig:
    """The settings with the model source of rank 0, whose checkpoint is compared with its manifest.

    Called on all ranks.

    Raises:
        UserError: the checkpoint that --load_checkpoint names is damaged, or all that --resume auto could resume are.
    """
    config = with_first_ranks_source(config)
    source = config.source
    while source.checkpoint is not None:
        problem = _damage(Path(source.checkpoint))
        if problem is None:
            break
        if not source.is_newest:
            raise UserError(f"--load_checkpoint {problem}{OTHER_CHECKPOINT}")
        log_skipped(problem)
        with collectives.all_or_none():
            source = newest_source(config.saving.folder, otherwise=source, before=source.checkpoint)
        source = ModelSource(**collectives.first_rank_value(source.as_values()))
    with collectives.all_or_none():
        return config.with_source(source)


def _damage(checkpoint: Path) -> str | None:
    """The first problem in a checkpoint's content; each rank reads its share."""
    rank, ranks = collectives.place()
    with collectives.all_or_none():
        problems = list(checkpoint_files.content_problems(checkpoint, share=rank, shares=ranks))
    return next((problem for found in collectives.gather_values(problems) for problem in found), None)


def read_saved(config: TrainConfig) -> SavedRun | None:
    """The run that this one resumes, or whose data it continues; None for a run that does neither."""
    source = config.source
    if source.checkpoint is not None:
        return SavedRun.read(source.checkpoint)
    return SavedRun.read(Path(source.trained).parent) if config.data.continues else None


def difference(name: str, before: Any, now: Any) -> str:
    """What changed since a checkpoint was written, as a clause. Of two dicts only the entries that differ are named."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in now if before.get(key) != now[key]]
        before, now = ({key: values.get(key) for key in keys} for values in (before, now))
    return f"{name} was {shown_shortly(before)}, this run has {now}"


def changes(saved: SavedRun, facts: RunFacts) -> list[str]:
    """The differences from the saved run that can change the last bits of its numbers."""
    now, entries = facts.entries(), saved.entries
    pairs = [(name, entries.get(name), now[name]) for name in ("world_size", "data_parallel_size")]
    pairs.append(("version of the numerics", entries.get("numerics", 1), now["numerics"]))
    for group in ("settings", "versions", "machine"):
        before = entries.get(group) or {}
        # A version without a flag behaved as with its default.
        names = [name for name in now[group] if group != "settings" or (name in before and _is_compared(name))]
        pairs += [(name, before.get(name), now[group][name]) for name in names]
    return [f"{name} {shown_shortly(before)} -> {value}" for name, before, value in pairs if before != _as_json(value)]


def _is_compared(setting: str) -> bool:
    """Whether a setting is compared by its value; paths are compared by their content, such as data by its hash."""
    return changes_numbers(setting) and f"--{setting}" not in {*RESUMED_FACTS.values(), *ADAPTER_FLAGS}


def shown_shortly(value: Any) -> str:
    """A value of a checkpoint or a rank, as a message quotes it."""
    return textwrap.shorten(str(value), SHOWN_CHARACTERS, placeholder="...")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def log_verdict(saved: SavedRun, facts: RunFacts) -> None:
    """Log where a resumed run continues, and how exactly it repeats the uninterrupted one."""
    logger, state = logs.get_logger(), saved.state
    logger.info(
        "Resuming %s: epoch %d, step %d, %s and %s consumed",
        saved.folder,
        state.epoch,
        state.step,
        counted(state.samples_seen, "sample"),
        counted(state.tokens_seen, "token"),
    )
    changed = changes(saved, facts)
    if not changed and not _same_layout(saved, facts):
        changed = [difference("layout", saved.entries.get("layout"), facts.layout)]
    if not changed and repeats_exactly():
        logger.info("What follows repeats the uninterrupted run bit for bit")
        return
    if not changed:
        logger.info(
            "What follows repeats the uninterrupted run except for rounding: on GPUs the backward pass of fused "
            "attention sums in another order each time"
        )
        return
    logger.warning(
        "The same samples follow in the same order, but not bit for bit, since this changed: %s", ", ".join(changed)
    )
    if not _same_layout(saved, facts):
        logger.warning("The parallel layout changed, so the float32 master weights are replaced by the rounded weights")


def _same_layout(saved: SavedRun, facts: RunFacts) -> bool:
    return saved.entries.get("layout") == _as_json(facts.layout)


def restore_exactly(saved: SavedRun, engine: "Engine", facts: RunFacts) -> None:
    """Restore what ColossalAI's own checkpoint lacks, if the parallel layout is unchanged. Called on all ranks."""
    if not _same_layout(saved, facts):
        return
    if resume_state.has_masters(engine):
        engine.load_masters(str(saved.folder / resume_state.MASTERS_NAME))
    with collectives.all_or_none():
        try:
            resume_state.restore_rank_states(engine, saved.entries["ranks"][engine.rank])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{saved.folder}: its random states cannot be read ({error!r}); resume from another checkpoint"
            )


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        state: at the first step.
        first_sample: the sample at which the run began to read, counted over all epochs.
        saved: the run that it resumes or whose data it continues; None for neither.
        resumes: it resumes `saved`, with optimizer, random states and history.
        eval_pending: a signal interrupted the evaluation after the last step of `saved`, so it is run again.
    """

    state: TrainState
    first_sample: int = 0
    saved: SavedRun | None = None
    resumes: bool = False
    eval_pending: bool = False

    @property
    def resumed(self) -> SavedRun | None:
        """The run that is resumed, if one is."""
        return self.saved if self.resumes else None


def find_start(config: TrainConfig, saved: SavedRun | None, facts: RunFacts, order: SampleOrder) -> Start:
    """Where the run begins: at `saved`, if what decides its data and its weights is unchanged.

    Raises:
        UserError: something changed, or the data is read to its end.
    """
    if saved is None:
        return Start(TrainState())
    if config.source.checkpoint is None:
        state = _continued_state(saved, facts, order, num_epochs=config.recipe.num_epochs)
        return Start(state, state.epoch * order.num_samples + state.sample_start_index, saved)
    entries = facts.entries()
    for name, flag in RESUMED_FACTS.items():
        if saved.entries.get(name) != entries[name]:
            raise UserError(
                f"--load_checkpoint {saved.folder}: {difference(name, saved.entries.get(name), entries[name])}; "
                f"resume with the same {flag}, or load only its weights: --load_checkpoint {config.source.trained}"
            )
    _check_place(saved, order)
    # A copy, since the run counts on in it.
    state = replace(saved.state)
    if state.epoch >= config.recipe.num_epochs:
        raise UserError(f"--load_checkpoint {saved.folder}: is in epoch {state.epoch}; give a higher --num_epochs")
    log_verdict(saved, facts)
    pending = config.evaluation.measures and was_interrupted(saved)
    return Start(state, saved.first_sample, saved, resumes=True, eval_pending=pending)


def is_done(config: TrainConfig, start: Start, order: SampleOrder) -> bool:
    """Whether --resume auto found the last checkpoint of its run, so that at most the model is not published yet."""
    state, recipe = start.state, config.recipe
    at_end = state.epoch == recipe.num_epochs - 1 and order.steps_after(state.sample_start_index) == 0
    return config.source.is_newest and (at_end or state.step == recipe.max_steps) and not start.eval_pending


def _check_place(saved: SavedRun, order: SampleOrder) -> None:
    """Raise a UserError for a position that a run on this data cannot have reached."""
    state = saved.state
    place = state.epoch * order.num_samples + state.sample_start_index
    if state.sample_start_index > order.num_samples or saved.first_sample + state.samples_seen > place:
        raise UserError(
            f"{saved.folder / STATES_NAME}: epoch {state.epoch:,}, sample {state.sample_start_index:,}, "
            f"{state.samples_seen:,} samples read is not a position in data of {counted(order.num_samples, 'sample')}"
            f"{OTHER_CHECKPOINT}"
        )


def _continued_state(saved: SavedRun, facts: RunFacts, order: SampleOrder, *, num_epochs: int) -> TrainState:
    """The state of a new run that continues in the data where `saved` stopped, whose weights it loads.

    Raises:
        UserError: one of DATA_FACTS changed, or the data is read to its end.
    """
    entries = facts.entries()
    for name in DATA_FACTS:
        if saved.entries.get(name) != entries[name]:
            raise UserError(
                f"--continue_data: {difference(name, saved.entries.get(name), entries[name])}, so there is no "
                f"position in the data to continue from; give the same data, or leave the flag out"
            )
    _check_place(saved, order)
    place = TrainState(epoch=saved.state.epoch, sample_start_index=saved.state.sample_start_index)
    if order.steps_after(place.sample_start_index) == 0:
        place = TrainState(epoch=saved.state.epoch + 1)
    if place.epoch >= num_epochs:
        raise UserError(
            f"--continue_data: {saved.folder} has read all of the data, {counted(saved.state.epoch + 1, 'epoch')}; "
            f"give a higher --num_epochs, or leave the flag out to read it again"
        )
    logs.get_logger().info(
        "Data: continuing after %s, epoch %d, sample %s", saved.folder, place.epoch, f"{place.sample_start_index:,}"
    )
    return place


def make_schedule(config: TrainConfig, start: Start, order: SampleOrder) -> CosineSchedule:
    """The learning rate over all steps of the run, including those before a resume.

    Raises:
        UserError: no step is left, and no evaluation is pending.
    """
    state, recipe, source = start.state, config.recipe, config.source
    if is_done(config, start, order):
        return _schedule_of(config, state.step)
    steps_left = order.steps_after(state.sample_start_index)
    steps_left += (recipe.num_epochs - state.epoch - 1) * order.steps_after(0)
    if steps_left == 0 and not start.eval_pending:
        raise UserError(
            f"--load_checkpoint {source.checkpoint}: its training is complete ({counted(recipe.num_epochs, 'epoch')}), "
            f"the model is in {source.trained}; give a higher --num_epochs to continue"
        )
    total_steps = state.step + steps_left
    if recipe.max_steps is not None:
        total_steps = min(total_steps, recipe.max_steps)
    if recipe.max_steps is not None and state.step >= recipe.max_steps + start.eval_pending:
        raise UserError(
            f"--load_checkpoint {source.checkpoint}: its step {state.step} is not before --max_steps "
            f"{recipe.max_steps}, the model is in {source.trained}; give a higher --max_steps to continue"
        )
    schedule = _schedule_of(config, total_steps)
    if schedule.warmup_steps >= total_steps:
        logs.get_logger().warning(
            "--warmup_steps %d: the run has %s, so the learning rate only rises",
            schedule.warmup_steps,
            counted(total_steps, "step"),
        )
    if start.resumed is not None:
        _log_changed_schedule(start.resumed.read_schedule(), schedule)
    return schedule


def _schedule_of(config: TrainConfig, total_steps: int) -> CosineSchedule:
    warmup = warmup_steps(config.recipe.warmup_steps, total_steps)
    return CosineSchedule(config.engine.learning_rate, total_steps, warmup)


def _log_changed_schedule(saved: dict[str, Any], schedule: CosineSchedule) -> None:
    now = asdict(schedule)
    changed = [f"{name} {shown(saved.get(name))} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        logs.get_logger().warning("The learning rate follows a different curve from now on: %s", ", ".join(changed))


def finish_again(saved: SavedRun, engine: "Engine", saving: SaveConfig, *, card: Callable[[], str | None]) -> None:
    """Finish a run that died after its last save: publish the model, and remove old checkpoints."""
    with engine.first_rank_only() as first:
        if first:
            saving.folder.check_held()
            publish_model(saved.folder, card())
            checkpoint_files.remove_old(saved.folder, keep_last=saving.keep_last, keep_every=saving.keep_every)
    logs.get_logger().info("Already done: all epochs are trained. The model is beside %s", saved.folder)
