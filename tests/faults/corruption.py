"""Every file of a checkpoint cut, flipped, deleted, replaced, exchanged with another: all of it must be detected."""

import random
import re
import shutil
from pathlib import Path

from colossal_llama2.train import verify
from colossal_llama2.train.run_folder import checkpoint_files
from tests.faults import damage, warm
from tests.faults import place as places
from tests.faults.place import Place
from tests.faults.rows import Row

FLAGS = ["--micro_batch_size", 4, "--save_interval", 2, *places.PLUGINS["zero2"]]
KINDS = ("cut", "flip", "delete", "swap")


def check(place: Place, *, sample: int | None, seed: int) -> list[Row]:
    """Damage each file in each way, or `sample` of these; verify and train.py --load_checkpoint must name the file."""
    job = warm.train(place.flags("whole", *FLAGS), place.log("whole"))
    assert job.wait() == 0, job.output
    checkpoint = checkpoint_files.complete_checkpoints(place.save_dir("whole"))[0]
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    faults = [(kind, name, None) for name in names for kind in KINDS]
    faults += [("exchange", name, names[index - 1]) for index, name in enumerate(names)]
    if sample is not None:
        faults = random.Random(seed).sample(faults, sample)
    row = Row("file of a checkpoint cut, flipped, deleted, replaced, exchanged: found and named")
    for kind, name, other in faults:
        copy = shutil.copytree(checkpoint, place.folder / "damaged" / checkpoint.name)
        if other is None:
            damage.KINDS[kind](copy / name)
        else:
            damage.exchange(copy / name, copy / other)
        row.record(f"{kind} {name}", _problem(place, copy, {name, other} - {None}))
        shutil.rmtree(place.folder / "damaged")
    return [row]


def _problem(place: Place, checkpoint: Path, names: set[str]) -> str | None:
    resuming = place.flags("resumed", *FLAGS, "--load_checkpoint", checkpoint)
    jobs = [
        warm.Job(lambda: verify.main([str(checkpoint)]), place.log("verified")),
        warm.train(resuming, place.log("resumed")),
    ]
    for job in jobs:
        code = job.wait()
        errors = re.findall(r"^\S.*: error: .*", job.output, re.M)
        if code != 2 or len(errors) != 1 or "Traceback" in job.output:
            return f"exit code {code}: {job.output}"
        if not any(name in errors[0] for name in names):
            return f"the file is not named: {errors[0]}"
    if place.save_dir("resumed").exists():
        return "train.py has written something"
    return None
