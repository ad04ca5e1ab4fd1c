"""One rank of a training command of a test that saves, damages and resumes.

    torchrun --standalone --nproc_per_node 2 tests/resume_worker.py NAME.job

NAME.job is JSON: {"name", "script", "flags"}, and perhaps
    damage    a list of [kind, path] that rank 0 applies first, by tests/faults/damage.py
    poison    (rank, step, kind), for tests/faults/poison.py
    fault     a kind of tests/faults/one_rank.py
    views     a folder with rank-0 and rank-1, in which each rank works, so that relative paths differ by rank
Rank 0 writes <name>.json with "error" (null, or the message), "log" (its lines) and "ranks": the error of each rank,
and the half-written files in --save_dir when it occurred.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import launcher, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.engine import loss_scale
from colossal_llama2.engine.process_group import launch, leave
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.train import run
from colossal_llama2.train.settings.from_flags import resolve
from tests.faults import damage, one_rank, poison
from tests.pictures import undrawn

PARSERS = {"train.py": train_flags.train_parser, "train_sft.py": train_flags.train_sft_parser}


class LineKeeper(logging.Handler):
    """Collects log messages."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run_job(job: dict, is_first: bool) -> dict:
    """Run one command in the open process group."""
    keeper = LineKeeper()
    logs.get_logger().addHandler(keeper)
    error, left = None, []
    try:
        for kind, path in job.get("damage", ()) if is_first else ():
            damage.KINDS[kind](Path(path))
        collectives.gather_values(None)
        args = PARSERS[job["script"]]().parse_args(job["flags"])
        with contextlib.ExitStack() as around:
            around.enter_context(undrawn())
            if job.get("views"):
                around.enter_context(contextlib.chdir(Path(job["views"], f"rank-{collectives.place()[0]}")))
            if job.get("poison"):
                around.enter_context(poison.poisoned(*job["poison"]))
            if job.get("fault"):
                around.enter_context(one_rank.befalling(job["fault"]))
            run.run(resolve(args))
    except (UserError, RunError) as caught:
        error, left = str(caught), [path.name for path in Path(args.save_dir).glob("epoch-*.tmp")]
    finally:
        logs.get_logger().removeHandler(keeper)
    return {"error": error, "log": keeper.lines, "ranks": collectives.gather_values([error, left])}


def main() -> None:
    """Run the job that the command line names."""
    path = Path(sys.argv[1])
    launcher.settle()
    logs.configure_logging()
    # High enough that fp16 overflows, also in a resumed run that starts with it.
    loss_scale.INITIAL_SCALE = 2**21
    launch(seed=1024)
    is_first = logs.is_first_rank()
    job = json.loads(path.read_text())
    result = run_job(job, is_first)
    if is_first:
        path.with_name(f"{job['name']}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main()
