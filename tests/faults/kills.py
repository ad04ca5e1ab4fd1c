"""Runs that are killed at random moments, repeatedly, and resumed: they end like an undisturbed run.

A moment is a seeded share of the time that the complete run takes on this machine. If a run ends before it is killed,
the next one starts from the beginning, until there were as many kills as requested.
"""

import random
import shutil
import time

from tests.faults import place as places
from tests.faults import warm
from tests.faults.place import Place
from tests.faults.rows import Row

# Two epochs of 12 steps; a save after every second one, and at the end of an epoch.
SAMPLES = 50
FLAGS = ["--micro_batch_size", 2, "--num_epochs", 2, "--save_interval", 2, "--keep_last", 2]
# After this number of kills, a run is left to finish, so that there is a result to compare.
KILLS_A_RUN = 8
MOMENTS = (0.2, 1.0)


def check(place: Place, plugin: str, *, kills: int, ranks: int, seed: int) -> list[Row]:
    """Kill runs of a plugin this many times; every run that finishes must have the same result."""
    flags = [*FLAGS, "--accumulation_steps", 2 // ranks, *places.PLUGINS[plugin]]
    begin = time.monotonic()
    job = warm.train(place.flags("whole", *flags), place.log("whole"), ranks=ranks)
    assert job.wait() == 0, job.output
    seconds = time.monotonic() - begin
    expected = places.trained(place.save_dir("whole"))
    chance = random.Random(f"{seed} {plugin}")
    row = Row(f"training killed at a random moment: {plugin}, ranks: {ranks}")
    while row.faults < kills:
        shutil.rmtree(place.folder / "killed", ignore_errors=True)
        done, problem = 0, None
        while done < min(KILLS_A_RUN, kills - row.faults):
            job = warm.train(place.flags("killed", *flags, "--resume", "auto"), place.log("killed"), ranks=ranks)
            if not _is_killed(job, seconds * chance.uniform(*MOMENTS)):
                break
            done += 1
        if done:
            problem = _end_problem(place, flags, ranks, expected)
        for number in range(done):
            row.record(f"run with {done} kills, kill {number + 1}", problem)
    return [row]


def _is_killed(job: warm.Job, seconds: float) -> bool:
    """Kill the job after that time; False if it finished before, which must be without an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and job.is_running():
        time.sleep(0.002)
    if job.is_running():
        job.kill()
        return True
    assert job.wait() == 0, job.output
    return False


def _end_problem(place: Place, flags: list, ranks: int, expected: dict) -> str | None:
    job = warm.train(place.flags("killed", *flags, "--resume", "auto"), place.log("killed"), ranks=ranks)
    if job.wait() != 0:
        return f"--resume auto failed: {job.output}"
    leftovers = [path.name for path in place.save_dir("killed").iterdir() if path.suffix in (".tmp", ".old")]
    if leftovers:
        return f"at the end there are {leftovers}"
    return None if places.trained(place.save_dir("killed")) == expected else "the result is another one"
