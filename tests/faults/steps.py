"""A run of 50 steps that is resumed from each of its steps, and the same samples on other numbers of ranks."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.train import verify
from colossal_llama2.train.run_folder import checkpoint_files, file_names
from tests.faults import place as places
from tests.faults import warm
from tests.faults.place import Place
from tests.faults.rows import Row

# 25 steps an epoch; the last sample of each is left over.
SAMPLES = 51
FLAGS = ["--micro_batch_size", 2, "--num_epochs", 2, *places.PLUGINS["zero2"]]
STEPS = 50
WORLD_SIZES = (1, 2, 4)


def check_each_step(place: Place, *, every: int = 1, last: int = STEPS) -> list[Row]:
    """Resume from each step, or from every n-th up to `last`, and compare the ends."""
    job = warm.train(place.flags("whole", *FLAGS, "--save_interval", every), place.log("whole"))
    assert job.wait() == 0, job.output
    expected = places.trained(place.save_dir("whole"))
    complete = checkpoint_files.complete_checkpoints(place.save_dir("whole"))
    saved = {checkpoint_files.step_of(path): path for path in complete}
    # The end of an epoch is saved too.
    assert sorted(saved) == sorted({*range(every, STEPS + 1, every), STEPS // 2, STEPS})
    row = Row("resumed from each step of 50, equal at the end")
    for step in range(every, last + 1, every):
        row.record(saved[step].name, _problem(place, saved[step], expected))
    return [row]


def _problem(place: Place, folder: Path, expected: dict, common: Sequence = FLAGS) -> str | None:
    shutil.rmtree(place.folder / "resumed", ignore_errors=True)
    shutil.copytree(folder, place.save_dir("resumed") / folder.name)
    # The history of the model has the last losses, which come from the log.
    shutil.copy(folder.with_name(file_names.LOG_NAME), place.save_dir("resumed"))
    # Every second run passes the end of the first epoch, after step 25, without a checkpoint.
    step = checkpoint_files.step_of(folder)
    skips = ["--skip_save_each_epoch"] if step % 20 == 0 else []
    flags = place.flags("resumed", *common, *skips, "--save_interval", STEPS, "--resume", "auto")
    job = warm.train(flags, place.log("resumed"))
    if job.wait() != 0:
        return job.output
    if skips and common is FLAGS and [*place.save_dir("resumed").glob("*_step-25")] and step != STEPS // 2:
        return "a checkpoint was saved because an epoch ended"
    return None if places.trained(place.save_dir("resumed")) == expected else "the result is another one"


def check_orders() -> list[Row]:
    """Every change of the number of ranks, after every step of an epoch: no sample twice, none left out."""
    row = Row("resumed on another number of ranks (1, 2, 4): same samples in the same order")
    for before in WORLD_SIZES:
        for after in WORLD_SIZES:
            for step in range(1, 8) if before != after else ():
                whole = _taken(before, 0, 8)
                mixed = _taken(before, 0, 8)[:step] + _taken(after, step * 16, 8 - step)
                seen = sorted(sample for samples in mixed for sample in samples)
                good = mixed == whole and seen == list(range(128))
                row.record(f"{before} -> {after} after step {step}", None if good else f"{mixed}, not {whole}")
    return [row]


def _taken(ranks: int, consumed: int, steps: int) -> list[list[int]]:
    """The samples of each step, in order, of 16 a step."""
    order = SampleOrder(num_samples=128, micro_batch_size=2, data_size=ranks, accumulation_steps=8 // ranks, seed=7)
    ranked = [list(order.steps(0, consumed, rank)) for rank in range(ranks)]
    return [
        [int(i) for micro in range(8 // ranks) for rank in range(ranks) for i in ranked[rank][step][0][micro]]
        for step in range(steps)
    ]


def check_ranks(place: Place) -> list[Row]:
    """A real run on one rank that continues on two, and the other way round; losses must equal those on one rank."""
    row = Row("run resumed on another number of ranks (1 -> 2, 2 -> 1): equal losses but for rounding")
    fp32 = ["--plugin", "zero2", "--mixed_precision", "fp32", "--micro_batch_size", 2, "--save_interval", 5]
    for before, after in ((1, 2), (2, 1)):
        name = f"from_{before}"
        for ranks, more in ((before, ()), (after, ("--resume", "auto"))):
            flags = place.flags(name, *fp32, "--accumulation_steps", 2 // ranks, *more)
            job = warm.train(flags, place.log(name), ranks=ranks)
            assert job.wait() == 0, job.output
            if not more:
                expected = _losses(place, name)
                _keep_first(place, name)
        found = _losses(place, name)
        gaps = [abs(found[step] / loss - 1) for step, loss in expected.items() if step > 5]
        good = len(gaps) == 7 and max(gaps) < 1e-5
        row.record(f"{before} -> {after}", None if good else f"{found}, not {expected}")
    return [row]


def _keep_first(place: Place, name: str) -> None:
    """Leave only the first checkpoint of a run."""
    for path in [*checkpoint_files.complete_checkpoints(place.save_dir(name))[1:], place.save_dir(name) / "modeling"]:
        shutil.rmtree(path)
    shutil.rmtree(place.folder / name / "tb")


def _losses(place: Place, name: str) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place.folder / name / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("Loss")}


FP16 = {
    "ddp": ["--plugin", "ddp"],
    "zero2": ["--plugin", "zero2"],
    "zero2_cpu": ["--plugin", "zero2_cpu"],
    "gemini": ["--plugin", "gemini"],
    "gemini accumulating": ["--plugin", "gemini", "--micro_batch_size", "2", "--accumulation_steps", "2"],
    "3d": ["--plugin", "3d"],
    "3d without ZeRO": ["--plugin", "3d", "--zero", "0"],
}


def check_overflow(place: Place, *, plugins: list[str]) -> list[Row]:
    """In fp16, with a loss scale so high that the first steps overflow: save, verify, resume before any update."""
    row = Row("fp16 overflows from the first step: saved, verified, resumed, equal at the end")
    for name in plugins:
        flags = ["--mixed_precision", "fp16", "--micro_batch_size", 4, "--save_interval", 1, *FP16[name]]
        job = warm.train(place.flags(name, *flags), place.log(name), before=_raise_scale)
        if job.wait() != 0:
            row.record(name, job.output)
            continue
        assert 0 < job.output.count("gradients overflowed") < 6, job.output
        first = checkpoint_files.complete_checkpoints(place.save_dir(name))[0]
        check = warm.Job(lambda first=first: verify.main([str(first)]), place.log("verified"))
        problem = None if check.wait() == 0 else check.output
        row.record(name, problem or _problem(place, first, places.trained(place.save_dir(name)), flags))
    return [row]


def _raise_scale() -> None:
    from colossal_llama2.engine import loss_scale

    loss_scale.INITIAL_SCALE = 2.0**20
