"""Going on from a checkpoint: which one, whether it is whole, what must be the same, and what will be exact."""

import argparse
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import changes_numbers
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.device import repeats_exactly
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import CONFIG_FILE
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.json_input import shown
from colossal_llama2.train.checkpointing.checkpointer import LoadPlan, plan_loading, publish_model
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps
from colossal_llama2.train.stepping.state import TrainState

# Raised by one when a version computes other numbers from the same flags; checkpoints without it are of the first. The
# second has SDPA as default attention, float32 rotary frequencies, NEFTune by document and repeated fp16 steps.
NUMERICS = 2
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
# Of a value of a checkpoint that a message tells.
SHOWN_CHARACTERS = 200

# What must be as in the checkpoint: it decides the place in the data, what the data means, or which states Adam has.
DATA_FACTS = {
    "num_samples": "--dataset",
    "dataset_fingerprints": "--dataset",
    "bucketed": "--bucketed",
    "mixture": "--mixture",
    "mixture_end": "--mixture_end",
    "sources": "--dataset",
    "seed": "--seed",
}
RESUMED_FACTS = {
    **DATA_FACTS,
    "pretrained_tokenizer": "--pretrained",
    "model_shape": "--pretrained",
    "trained_rows": "--train_new_rows_only",
    "freeze_non_embeds_params": "--freeze_non_embeds_params",
}


def newest_plan(save_dir: str, *, otherwise: LoadPlan, before: str | None = None) -> LoadPlan:
    """Resume the newest checkpoint of `save_dir` whose files have the right sizes; `otherwise` if there is none at all.

    Args:
        before: a checkpoint; only those written before it are looked at.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    complete = checkpoint_files.complete_checkpoints(Path(save_dir))
    if before is not None:
        complete = complete[: complete.index(Path(before))] if Path(before) in complete else []
    problem = first_problem = None
    for folder in reversed(complete):
        try:
            return replace(plan_loading("", str(folder)), is_newest=True)
        except UserError as error:
            problem = str(error).removeprefix("--load_checkpoint ").removesuffix("; resume from another checkpoint")
            first_problem = first_problem or problem
            logs.get_logger().warning("--resume auto: %s; taking the checkpoint before it", problem)
    if problem or before is not None:
        why = f" ({first_problem})" if first_problem else ""
        cure = "give a new --save_dir to begin anew"
        raise UserError(f"--resume auto: no checkpoint in {save_dir} is whole{why}; {cure}")
    return otherwise


def settle(plan: LoadPlan, save_dir: str) -> LoadPlan:
    """The plan of rank 0, when the content of its checkpoint was compared with the manifest. Called on all ranks.

    Raises:
        UserError: the checkpoint that --load_checkpoint names is damaged, or all that --resume auto could take are.
    """
    plan = LoadPlan(**collectives.first_rank_value(asdict(plan)))
    while plan.resume_path is not None:
        problem = _damage(Path(plan.resume_path))
        if problem is None:
            break
        if not plan.is_newest:
            raise UserError(f"--load_checkpoint {problem}; resume from another checkpoint")
        logs.get_logger().warning("--resume auto: %s; taking the checkpoint before it", problem)
        with collectives.all_or_none():
            plan = newest_plan(save_dir, otherwise=plan, before=plan.resume_path)
        plan = LoadPlan(**collectives.first_rank_value(asdict(plan)))
    return plan


def _damage(checkpoint: Path) -> str | None:
    """The first thing wrong with a checkpoint's content; each rank reads its share."""
    rank, ranks = collectives.place()
    with collectives.all_or_none():
        problems = list(checkpoint_files.content_problems(checkpoint, share=rank, shares=ranks))
    return next((problem for found in collectives.gather_values(problems) for problem in found), None)


def model_shape(path: str) -> dict[str, Any]:
    """The sizes in a model's config.json that decide the shapes of its weights."""
    config = read_json(Path(path, CONFIG_FILE))
    return {key: config.get(key) for key in SHAPE_KEYS}


def machine() -> dict[str, Any]:
    """What the last bits of a sum depend on besides software: the device, and on a CPU its threads."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "threads": None}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def difference(name: str, before: Any, now: Any) -> str:
    """In words: what changed since a checkpoint was written. Of two dicts only the entries that differ are told."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in now if before.get(key) != now[key]]
        before, now = ({key: values.get(key) for key in keys} for values in (before, now))
    return f"{name} was {_short(before)}, this run has {now}"


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the run that was saved and can change the last bits of its numbers."""
    pairs = [(name, saved.get(name), now[name]) for name in ("world_size", "data_parallel_size")]
    pairs.append(("version of the numerics", saved.get("numerics", 1), now["numerics"]))
    for group in ("settings", "versions", "machine"):
        before = saved.get(group) or {}
        # A flag that was not there yet was as its default is.
        names = [name for name in now[group] if group != "settings" or (name in before and _is_compared(name))]
        pairs += [(name, before.get(name), now[group][name]) for name in names]
    return [f"{name} {_short(before)} -> {value}" for name, before, value in pairs if before != _as_json(value)]


def _is_compared(setting: str) -> bool:
    """Whether the value of a setting is compared: not where what it means is, as a path of data by the data's hash."""
    return changes_numbers(setting) and f"--{setting}" not in RESUMED_FACTS.values()


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), SHOWN_CHARACTERS, placeholder="...")


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def log_verdict(plan: LoadPlan, state: TrainState, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Log where a resumed run goes on and how exactly."""
    logger = logs.get_logger()
    logger.info(
        "Resuming %s: epoch %d, step %d, %s samples and %s tokens consumed",
        plan.resume_path,
        state.epoch,
        state.step,
        f"{state.samples_seen:,}",
        f"{state.tokens_seen:,}",
    )
    changed = changes(saved, now)
    if not changed and not _same_layout(saved, now):
        changed = [difference("layout", saved.get("layout"), now["layout"])]
    if not changed and repeats_exactly():
        logger.info("What follows repeats the uninterrupted run bit for bit")
        return
    if not changed:
        logger.info(
            "What follows repeats the uninterrupted run but for rounding: on GPUs the backward pass of fused attention "
            "adds up in another order each time"
        )
        return
    logger.warning(
        "The same samples follow in the same order, but not bit for bit, since this changed: %s", ", ".join(changed)
    )
    if not _same_layout(saved, now):
        logger.warning("The float32 master weights are left aside, they were split otherwise; rounded ones are taken")


def _same_layout(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    return saved.get("layout") == _as_json(now["layout"])


def restore_exactly(plan: LoadPlan, engine, now: dict[str, Any]) -> None:
    """Give back what ColossalAI's own checkpoint lacks, as far as this job is laid out as the saved one was.

    Called on all ranks.
    """
    with collectives.all_or_none():
        _, saved = plan.read_states()
    if not _same_layout(saved, now):
        return
    if resume_state.has_masters(engine):
        engine.load_masters(str(Path(plan.resume_path, resume_state.MASTERS_NAME)))
    with collectives.all_or_none():
        try:
            resume_state.restore_rank_states(engine, saved["ranks"][engine.rank])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{plan.resume_path}: its random states cannot be read ({error!r}); resume another one")


def is_done(
    plan: LoadPlan,
    state: TrainState,
    order: SampleOrder,
    *,
    num_epochs: int,
    max_steps: int | None,
    owes_evaluation: bool,
) -> bool:
    """True if --resume auto found the last checkpoint of its run, which only may not have published its model."""
    at_end = state.epoch == num_epochs - 1 and order.steps_after(state.sample_start_index) == 0
    return plan.is_newest and (at_end or state.step == max_steps) and not owes_evaluation


def initial_state(
    args: argparse.Namespace, plan: LoadPlan, run_facts: dict[str, Any], order: SampleOrder
) -> TrainState:
    """The state to begin from: that of the resumed checkpoint, if this run goes on with the same things."""
    if plan.resume_path is None:
        if not args.continue_data:
            return TrainState()
        state = _continued_state(plan, run_facts, order, num_epochs=args.num_epochs)
        run_facts["first_sample"] = state.epoch * order.num_samples + state.sample_start_index
        return state
    state, saved = plan.read_states()
    run_facts["first_sample"] = saved.get("first_sample") or 0
    weights_alone = f"or take its weights alone: --load_checkpoint {plan.model_path}"
    for name, flag in RESUMED_FACTS.items():
        if saved.get(name) != run_facts[name]:
            raise UserError(
                f"--load_checkpoint {plan.resume_path}: {difference(name, saved.get(name), run_facts[name])}; "
                f"resume with the same {flag}, {weights_alone}"
            )
    _check_place(plan, state, order, first_sample=run_facts["first_sample"])
    if state.epoch >= args.num_epochs:
        raise UserError(f"--load_checkpoint {plan.resume_path}: is of epoch {state.epoch}, give a higher --num_epochs")
    log_verdict(plan, state, saved, run_facts)
    return state


def _check_place(plan: LoadPlan, state: TrainState, order: SampleOrder, *, first_sample: int) -> None:
    """Raise a UserError for a place that a run on this data cannot have come to."""
    place = state.epoch * order.num_samples + state.sample_start_index
    if state.sample_start_index > order.num_samples or first_sample + state.samples_seen > place:
        raise UserError(
            f"{plan.resume_path}/running_states.json: epoch {state.epoch:,}, sample {state.sample_start_index:,}, "
            f"{state.samples_seen:,} samples read is no place in data of {order.num_samples:,} samples; resume from "
            f"another checkpoint"
        )


def _continued_state(plan: LoadPlan, now: dict[str, Any], order: SampleOrder, *, num_epochs: int) -> TrainState:
    """The state of a new run that goes on in the data where another one, whose weights it takes, had come to.

    Args:
        now: the facts of this run, of which DATA_FACTS must be as they were.

    Raises:
        UserError: they are not, or the data is read to its end.
    """
    earlier = replace(plan, resume_path=str(Path(plan.model_path).parent))
    state, saved = earlier.read_states()
    for name in DATA_FACTS:
        if saved.get(name) != now[name]:
            raise UserError(
                f"--continue_data: {difference(name, saved.get(name), now[name])}, so there is no place in the data to "
                f"go on from; give the data as it was, or leave the flag out"
            )
    _check_place(earlier, state, order, first_sample=saved.get("first_sample") or 0)
    place = TrainState(epoch=state.epoch, sample_start_index=state.sample_start_index)
    if order.steps_after(place.sample_start_index) == 0:
        place = TrainState(epoch=state.epoch + 1)
    if place.epoch >= num_epochs:
        raise UserError(
            f"--continue_data: {earlier.resume_path} has read {state.epoch + 1} epochs of the data, all of it; give a "
            f"higher --num_epochs, or leave the flag out to read it again"
        )
    logs.get_logger().info(
        "Data: going on from %s, epoch %d, sample %s", earlier.resume_path, place.epoch, f"{place.sample_start_index:,}"
    )
    return place


def make_schedule(
    args: argparse.Namespace, plan: LoadPlan, state: TrainState, order: SampleOrder, *, owes_evaluation: bool
) -> CosineSchedule:
    """The learning rate over all steps of the run, those before a resume included.

    Raises:
        UserError: no step is left, nor an evaluation to make up for.
    """
    steps_left = order.steps_after(state.sample_start_index)
    steps_left += (args.num_epochs - state.epoch - 1) * order.steps_after(0)
    if steps_left == 0 and not owes_evaluation:
        raise UserError(
            f"--load_checkpoint {plan.resume_path}: its {args.num_epochs} epochs are trained, the model is in "
            f"{plan.model_path}; give a higher --num_epochs to go on"
        )
    if state.step >= (args.max_steps or math.inf) + owes_evaluation:
        raise UserError(
            f"--load_checkpoint {plan.resume_path}: its step {state.step} is not before --max_steps {args.max_steps}, "
            f"the model is in {plan.model_path}; give a higher --max_steps to go on"
        )
    total_steps = min(state.step + steps_left, args.max_steps or math.inf)
    schedule = CosineSchedule(args.lr, total_steps, warmup_steps(args.warmup_steps, total_steps))
    if schedule.warmup_steps >= total_steps:
        logs.get_logger().warning(
            "--warmup_steps %d: the run has %d steps, so the learning rate only rises",
            schedule.warmup_steps,
            total_steps,
        )
    if plan.resume_path is not None:
        _tell_changed_schedule(plan.read_schedule(), schedule)
    return schedule


def _tell_changed_schedule(saved: dict[str, Any], schedule: CosineSchedule) -> None:
    now = asdict(schedule)
    changed = [f"{name} {shown(saved.get(name))} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        logs.get_logger().warning("The learning rate goes on along another curve: %s", ", ".join(changed))


def finish_again(
    plan: LoadPlan, engine, *, keep_last: int | None, keep_every: int | None, card: Callable[[], str | None]
) -> None:
    """Do what a run that died after its last save left undone: remove old checkpoints, and publish the model."""
    last = Path(plan.resume_path)
    with engine.first_rank_only() as first:
        if first:
            publish_model(last, card())
            checkpoint_files.remove_old(last, keep_last=keep_last, keep_every=keep_every)
    logs.get_logger().info("Done already: all epochs are trained. The model is beside %s", plan.resume_path)
