"""The start of a training command on each rank: which job it belongs to and what to do, before any large import.

From the moment a rank is connected to the others, they notice if it dies while it imports, checks or reads.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from colossal_llama2.engine.ranks import interfaces, meeting, orphans
from colossal_llama2.engine.ranks.liveness import watching
from colossal_llama2.train.run_folder import run_lock
from colossal_llama2.train.stepping.stopping import StopSignals


def train(args: argparse.Namespace) -> None:
    """Run train.py or train_sft.py. Called once per process of the job, with the same flags in each.

    Raises:
        UserError: a flag, or what it names, cannot be used; found before anything is written.
        RunError: too many NaN/Inf losses, or a checkpoint cannot be written.
        Stopped: a signal came.
    """
    here = meeting.settled_place()
    if args.dry_run or args.suggest:
        return _dry_run(args)
    command = Path(sys.argv[0]).name
    with contextlib.ExitStack() as around:
        stop = around.enter_context(StopSignals(has_partners=here.world_size > 1))
        orphans.end_with_launcher(before=run_lock.mark_ending)
        watch = around.enter_context(watching(command, timeout_seconds=args.dist_timeout, before_end=run_lock.release))
        interfaces.check_given()
        # Imported when signals are handled and the other ranks notice a death.
        from colossal_llama2.train.run import train_on_all
        from colossal_llama2.train.settings import from_flags

        train_on_all(from_flags.resolve(args), stop, watch)


def _dry_run(args: argparse.Namespace) -> None:
    if args.suggest:
        from colossal_llama2.train.suggest import plan_layouts

        return plan_layouts(args)
    from colossal_llama2.train.benchmark_plan import plan_benchmark
    from colossal_llama2.train.dry_run import dry_run
    from colossal_llama2.train.settings import from_flags

    config, problems = from_flags.resolve_with_problems(args)
    if config.benchmark is not None:
        plan_benchmark(config, config.benchmark, problems)
    else:
        dry_run(config, problems)
