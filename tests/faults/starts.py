"""Many runs that start at the same time in one folder, and signals at random moments of a run."""

import os
import random
import re
import shutil
import signal
import time

from colossal_llama2.train.run_folder import checkpoint_files, file_names
from tests.faults import place as places
from tests.faults import warm
from tests.faults.place import Place
from tests.faults.rows import Row

FLAGS = ["--micro_batch_size", 1, "--num_epochs", 40, "--save_interval", 5, "--keep_last", 2, *places.PLUGINS["zero2"]]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


def check_starts(place: Place, *, starts: int) -> list[Row]:
    """Start several runs in one --save_dir at the same time: one trains, the others name it."""
    row = Row(f"{starts} runs started at once in one --save_dir: one wins")
    flags = place.flags("together", *FLAGS, "--num_epochs", 1)
    # The winner waits until all others were refused, so that none of them starts after it has finished.
    ready = place.folder / "refused"

    def hold_lock() -> None:
        from colossal_llama2.train import run

        launch = run.launch

        def launch_later(*args, **kwargs):
            while not ready.exists():
                time.sleep(0.01)
            return launch(*args, **kwargs)

        run.launch = launch_later

    jobs = [warm.train(flags, place.log(f"start-{number}"), before=hold_lock) for number in range(starts)]
    deadline = time.monotonic() + warm.END_SECONDS
    while sum(job.is_running() for job in jobs) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    ready.touch()
    codes = [job.wait() for job in jobs]
    for number, (job, code) in enumerate(zip(jobs, codes, strict=True)):
        refused = code == 2 and "is writing to it" in job.output and job.output.count(": error:") == 1
        row.record(f"start {number}", None if code == 0 or refused else f"exit code {code}: {job.output}")
    if codes.count(0) != 1:
        row.problems.append(f"{codes.count(0)} have won")
    return [row]


def check_signals(place: Place, *, signals: int, seed: int) -> list[Row]:
    """Send a signal at random moments: the exit code is right, and the saved state is complete and can be resumed."""
    row = Row("SIGTERM, SIGINT or SIGUSR1 at a random moment: saved, and the right exit code")
    chance = random.Random(seed)
    for number in range(signals):
        kind, moment = chance.choice(list(CODES)), chance.uniform(0.02, 1.5)
        shutil.rmtree(place.folder / "stopped", ignore_errors=True)
        job = warm.train(place.flags("stopped", *FLAGS), place.log("stopped"), before=_take_over)
        while "handlers are there" not in job.output:
            time.sleep(0.002)
        time.sleep(moment)
        os.kill(job.pids[0], kind)
        row.record(f"{number}: {kind.name} after {moment:.2f} s", _problem(place, job, kind))
    return [row]


def _take_over() -> None:
    """Report when the signal handlers are installed: before that, the system's defaults apply."""
    from colossal_llama2.train.settings import from_flags

    resolve = from_flags.resolve

    def announce_and_resolve(args):
        print("handlers are there", flush=True)
        return resolve(args)

    from_flags.resolve = announce_and_resolve


def _problem(place: Place, job: warm.Job, kind: signal.Signals) -> str | None:
    code = job.wait()
    save_dir = place.save_dir("stopped")
    if code != CODES[kind] or "Traceback" in job.output:
        return f"exit code {code}: {job.output}"
    found = re.search(rf"stopped: {kind.name} after step (\d+), which is saved", job.output)
    if found is None:
        early = "came before the first step; nothing was trained" in job.output
        complete = checkpoint_files.complete_checkpoints(save_dir)
        return None if early and not complete else f"not reported: {job.output}"
    newest = checkpoint_files.complete_checkpoints(save_dir)[-1]
    problem = checkpoint_files.sizes_problem(newest) or next(checkpoint_files.content_problems(newest), None)
    if checkpoint_files.step_of(newest) != int(found[1]) or problem:
        return f"{newest}: {problem}"
    left = [path.name for path in save_dir.iterdir() if path.suffix == ".tmp" or path.name == file_names.LOCK_NAME]
    return f"left: {left}" if left else None
