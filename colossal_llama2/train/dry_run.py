"""--dry_run: everything that a run checks before its first step, its plan, its memory and its disk, and no step.

It needs neither a process group nor a GPU, reads no weights and writes nothing, so a laptop answers for a cluster.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import with_defaults
from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import check_lengths, highest_token_id, load_tokenized_dataset
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import measure_parts
from colossal_llama2.dataset.read.untrained import log_untrained, untrained_samples
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import UserError
from colossal_llama2.model import training_history
from colossal_llama2.model.loading import ModelFacts, check_model, inspect_weights, model_without_weights
from colossal_llama2.terminal_text import show, show_line
from colossal_llama2.train import checks
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.checkpointer import STATES_NAME, LoadPlan, expected_bytes
from colossal_llama2.train.checkpointing.small_files import json_bytes, model_files
from colossal_llama2.train.evaluation import evaluation_setup
from colossal_llama2.train.forecast import data_plan as plans
from colossal_llama2.train.forecast.activations import ModelShape
from colossal_llama2.train.forecast.memory import MOMENTS, PARTS, Plan, RankMemory, rank_memory
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.report.model_card import base_model
from colossal_llama2.train.settings import flags
from colossal_llama2.train.stepping.state import TrainState

GIB = 2**30
# Of what was measured on a CPU (benchmarks/bench_memory.py), and a wider one where nothing was.
CPU_MARGIN, GPU_MARGIN = 15, 20
# What Python and its libraries take in each process of a rehearsal, roughly.
LIBRARIES = GIB


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job that is only thought of: what checks and plans ask of an Engine."""

    settings: EngineSettings
    world_size: int
    rank: int = 0

    @property
    def data_size(self) -> int:
        """Ranks that see different data."""
        return self.world_size // self.settings.model_ranks


class _Problems(list[str]):
    """What is wrong, gathered."""

    def check(self, action: Callable[[], Any]) -> Any:
        """What `action` returns, or None with its UserError noted."""
        try:
            return action()
        except UserError as error:
            self.append(str(error))
            return None


def dry_run(args: argparse.Namespace) -> None:
    """Check, and print what a run of these flags would do.

    Raises:
        UserError: with everything that is wrong.
    """
    problems = _Problems()
    plan = problems.check(lambda: checks.check_inputs(args))
    args = with_defaults(args)
    has_flags = plan is not None
    plan = plan or LoadPlan(model_path=args.pretrained, resume_path=None)
    rows = problems.check(lambda: flags.rows_to_train(args, plan)) if has_flags else None
    ranks = Ranks(flags.engine_settings(args, trained_rows=rows), flags.world_size_of(args))
    facts = _inspect_model(args, plan, problems)
    dataset = _inspect_data(args, facts, problems, has_flags=has_flags)
    content = order = state = schedule = None
    if dataset is not None and has_flags:
        data = flags.data_of(args)
        measured = measure_parts(data.parts)
        buckets = plans.buckets_of(data, measured)
        order = problems.check(lambda: flags.sample_order(args, len(dataset), ranks, buckets))
        problems.check(lambda: _check_eval_sets(args, facts))
    if order is not None:
        state = problems.check(lambda: _initial_state(args, plan, ranks, order, data))
    owes = state is not None and evaluation_setup.owes_evaluation(args, plan)
    takes_none = state is not None and _is_done(args, plan, state, order, owes)
    if state is not None and not takes_none:
        schedule = problems.check(lambda: resuming.make_schedule(args, plan, state, order, owes_evaluation=owes))
    takes_none = takes_none or (schedule is not None and schedule.total_steps == state.step)
    if schedule is not None and not takes_none:
        content = plans.build_plan(data, measured, order, num_epochs=args.num_epochs, schedule=schedule, state=state)
    if problems or not logs.is_first_rank():
        _end(problems)
        return
    if takes_none:
        show_line(f"dry run: {plan.resume_path} is the end of its run, which would take no step; nothing was written")
        return
    run_metadata.tell_plan(args, ranks, order, schedule, facts)
    for line in plans.plan_lines(content):
        logs.get_logger().info("%s", line)
    config = model_without_weights(plan.model_path).config
    has_documents = DOCUMENT_LENGTHS in dataset.column_names
    show(memory_lines(args, config, ranks, has_documents=has_documents))
    saves = saved_steps(
        order,
        state,
        args.num_epochs,
        args.save_interval,
        total_steps=schedule.total_steps,
        skip_epochs=args.skip_save_each_epoch,
    )
    show(_disk_lines(args, facts, saves))
    show_line("dry run: nothing was trained, nothing was written")


def _end(problems: Sequence[str]) -> None:
    if problems:
        raise UserError("; and ".join(dict.fromkeys(problems)))


def _inspect_model(args: argparse.Namespace, plan: LoadPlan, problems: _Problems) -> ModelFacts | None:
    """Shapes against config.json, both against the flags, and the tokenizer against the vocabulary."""
    try:
        check_model(plan.model_path, "--pretrained")
    except UserError:
        return None  # told by check_inputs
    facts = problems.check(lambda: inspect_weights(plan.model_path))
    if facts is not None:
        problems.check(lambda: checks.check_model_fits(args, facts))
        problems.check(lambda: checks.check_tokenizer_fits(args, plan, facts))
        problems.check(lambda: model_files(plan.model_path, flags.find_tokenizer(args, plan), args.mixed_precision))
    return facts


def _inspect_data(args: argparse.Namespace, facts: ModelFacts | None, problems: _Problems, *, has_flags: bool):
    """The samples, when their lengths and token ids were looked at; None if they cannot be read."""
    try:
        data = flags.data_of(args)
    except UserError:
        return None  # told by check_inputs
    dataset = problems.check(lambda: load_tokenized_dataset(data.paths, args.document_mask))
    if dataset is not None:
        problems.check(lambda: _check_samples(args, dataset))
        if facts is not None and has_flags:
            problems.check(lambda: checks.check_highest_id(highest_token_id(dataset, share=0, shares=1), facts))
    return dataset


def _check_samples(args: argparse.Namespace, dataset) -> None:
    check_lengths(dataset, args.max_length)
    log_untrained(untrained_samples(dataset, share=0, shares=1), len(dataset))


def _check_eval_sets(args: argparse.Namespace, facts: ModelFacts | None) -> None:
    for one in evaluation_setup.load_eval_sets(args):
        flag = f"--eval_dataset {one.name}"
        log_untrained(untrained_samples(one.samples, share=0, shares=1), len(one.samples), flag=flag)
        if facts is not None:
            highest = highest_token_id(one.samples, share=0, shares=1)
            checks.check_highest_id(highest, facts, flag=flag)


def _initial_state(
    args: argparse.Namespace, plan: LoadPlan, ranks: Ranks, order: SampleOrder, data: Data
) -> TrainState:
    facts = run_metadata.describe_run(args, ranks, order, flags.find_tokenizer(args, plan), data)
    json_bytes({**facts, "base_model": base_model(plan.model_path)}, STATES_NAME)
    training_history.log_problem(training_history.read_history(Path(plan.model_path)))
    return resuming.initial_state(args, plan, facts, order)


def _is_done(args: argparse.Namespace, plan: LoadPlan, state: TrainState, order: SampleOrder, owes: bool) -> bool:
    return resuming.is_done(
        plan, state, order, num_epochs=args.num_epochs, max_steps=args.max_steps, owes_evaluation=owes
    )


def _plans_for_gpus(args: argparse.Namespace) -> bool:
    """For a number of ranks that is only thought of, GPUs; else what this machine has."""
    import torch

    return args.num_ranks is not None or torch.cuda.is_available()


def memory_plan(args: argparse.Namespace, ranks: int, *, has_documents: bool, on_cpu: bool) -> Plan:
    """What the memory of a run depends on, from its flags. On GPUs flash-attn is taken to be installed."""
    takes_flash_attn = args.use_flash_attn and not on_cpu and args.mixed_precision != "fp32"
    return Plan(
        settings=flags.engine_settings(args),
        ranks=ranks,
        max_length=args.max_length,
        attention="flash" if takes_flash_attn else "sdpa",
        chunked_loss=args.chunked_loss != "off",
        checkpointing=args.use_grad_checkpoint,
        has_documents=has_documents and args.document_mask != "off",
        on_cpu=on_cpu,
    )


def memory_lines(args: argparse.Namespace, config, ranks: Ranks, *, has_documents: bool) -> str:
    """The memory that a run of this transformers LlamaConfig needs, on the devices that are planned for."""
    on_cpu = not _plans_for_gpus(args)
    plan = memory_plan(args, ranks.world_size, has_documents=has_documents, on_cpu=on_cpu)
    table = memory_table(rank_memory(ModelShape.of(config), plan), ranks=ranks.world_size, on_cpu=on_cpu)
    return "\n".join([table, *_device_lines(args, config, ranks, has_documents=has_documents)])


def _device_lines(args: argparse.Namespace, config, ranks: Ranks, *, has_documents: bool) -> list[str]:
    """Where --num_ranks plans for GPUs on a machine without any: that, and what a rehearsal here takes."""
    import torch

    if args.num_ranks is None or torch.cuda.is_available():
        return []
    plan = memory_plan(args, ranks.world_size, has_documents=has_documents, on_cpu=True)
    each = rank_memory(ModelShape.of(config), plan).peak
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    together = ranks.world_size * (each + LIBRARIES)
    return [
        f"there is no GPU here, so this is the plan of another machine; a rehearsal of {ranks.world_size} processes on "
        f"this CPU takes {each / GIB:.2f} GiB in each,",
        f"{together / GIB:,.1f} GiB in all with Python and libraries, of {here / GIB:,.1f} GiB here",
    ]


def memory_table(memory: RankMemory, *, ranks: int, on_cpu: bool) -> str:
    """The parts at each moment as aligned lines, and what the figures are worth."""
    device = "CPU" if on_cpu else "GPU"
    rows = [[f"memory per rank, GiB ({ranks} x {device})", *MOMENTS]]
    for part in PARTS:
        sizes = [memory.device[moment].get(part, 0) for moment in MOMENTS]
        if any(sizes):
            rows.append([f"  {part}", *(f"{size / GIB:.2f}" for size in sizes)])
    rows.append(["  total", *(f"{sum(memory.device[moment].values()) / GIB:.2f}" for moment in MOMENTS)])
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    for part, size in memory.host.items():
        lines.append(f"  in the host's memory: {part} {size / GIB:.2f}")
    peak = f"peak: {memory.peak / GIB:.2f} GiB, at {memory.peak_moment}; computed, not measured;"
    if on_cpu:
        lines.append(f"{peak} expect +-{CPU_MARGIN} %, and about 1 GiB more for Python and libraries")
    else:
        lines.append(f"{peak} expect +-{GPU_MARGIN} %, since no GPU was ever measured,")
        lines.append("and 1 to 2 GiB more for CUDA, NCCL and what the allocator leaves unused")
    return "\n".join(lines)


def saved_steps(
    order: SampleOrder,
    state: TrainState,
    num_epochs: int,
    save_interval: int,
    *,
    total_steps: int,
    skip_epochs: bool = False,
) -> list[int]:
    """The steps after which a run that begins at `state` saves.

    Multiples of `save_interval`; the end of each epoch, unless `skip_epochs`; and of the run.
    """
    first_end = state.step + order.steps_after(state.sample_start_index)
    saved = {total_steps, *range((state.step // save_interval + 1) * save_interval, total_steps + 1, save_interval)}
    if not skip_epochs:
        saved.update(first_end + epoch * order.steps_after(0) for epoch in range(num_epochs - state.epoch))
    return sorted(step for step in saved if state.step < step <= total_steps)


def most_kept(steps: Sequence[int], *, keep_last: int | None, keep_every: int | None) -> int:
    """Checkpoints that lie on the disk at once: an old one goes when the new one is complete."""
    most, kept = 0, []
    for step in steps:
        kept.append(step)
        most = max(most, len(kept))
        if keep_last is not None:
            kept = [old for old in kept[:-keep_last] if keep_every and old % keep_every == 0] + kept[-keep_last:]
    return most


def _disk_lines(args: argparse.Namespace, facts: ModelFacts, steps: Sequence[int]) -> str:
    """What checkpoints need, against what is free where --save_dir is or will be."""
    each = expected_bytes(facts.parameters, args.mixed_precision, trained=flags.trained_parameters(args, facts))
    count = most_kept(steps, keep_last=args.keep_last, keep_every=args.keep_every)
    folder = Path(args.save_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    lines = [
        f"disk: {len(steps)} checkpoints of {each / 1e9:,.1f} GB, at most {count} at once: "
        f"{count * each / 1e9:,.1f} GB of {free / 1e9:,.1f} GB free here"
    ]
    if free < count * each:
        lines.append(f"  there is room for {free // each} of them; make room, or keep fewer with --keep_last")
    return "\n".join(lines)
