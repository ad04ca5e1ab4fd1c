"""One rank of a test job: an optimizer saved by ColossalAI's own gathers, and by engine/patches/gathered_states.py.

    torchrun --standalone --nproc_per_node 3 tests/saving_worker.py NAME.job

NAME.job is JSON: {"name", "flags"}, flags of train.py --benchmark. Rank 0 writes NAME.json: "differing", the files that
the two saves wrote differently, "files", the names of all, "largest", bytes of the largest file, and "ours" and
"theirs", the most resident memory that a save took on any rank.
"""

import ctypes
import filecmp
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import launcher, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.patches import checkpoint_io, gathered_states, patching
from colossal_llama2.engine.process_group import launch, leave
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.train import benchmark
from colossal_llama2.train.settings.from_flags import resolve
from colossal_llama2.train.stepping.step_timer import NoTimer
from colossal_llama2.train.stepping.stopping import NoSignals

M_MMAP_THRESHOLD = -3


def return_freed_memory() -> None:
    """Let glibc return freed memory, so that resident memory is what is in use."""
    # Read by cpu_device.keep_freed_memory, which then changes nothing.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_of_saving(engine: Engine, folder: Path) -> int:
    """Save the optimizer into a new folder; the most memory that it took on a rank besides what the rank held."""
    if engine.rank == 0:
        folder.mkdir()
    engine.barrier()
    ctypes.CDLL(None).malloc_trim(0)
    # Resets VmHWM.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    engine.save_optimizer(str(folder))
    return max(collectives.gather_values(resident("VmHWM") - before))


def theirs():
    """A context in which ColossalAI's own gathers run."""
    targets = [target for target in gathered_states.TARGETS if target in patching._installed]
    return patching.replaced({target: patching.original_of(target) for target in targets})


def compare(engine: Engine, folder: Path) -> dict:
    """Save in both ways."""
    if engine.rank == 0:
        folder.mkdir()
    with theirs():
        # What is imported and allocated once is not counted.
        peak_of_saving(engine, folder / "first")
        found = {"theirs": peak_of_saving(engine, folder / "theirs")}
    found["ours"] = peak_of_saving(engine, folder / "ours")
    names = [{path.name for path in (folder / side).iterdir()} for side in ("ours", "theirs")]
    files = sorted(names[0] | names[1])
    same, _, _ = filecmp.cmpfiles(folder / "ours", folder / "theirs", files, shallow=False)
    largest = max(path.stat().st_size for path in (folder / "ours").iterdir())
    return {**found, "files": files, "differing": sorted(set(files) - set(same)), "largest": largest}


def run_job(measure: Callable[[Any, dict, Path], dict]) -> None:
    """Build what train.py --benchmark measures, call `measure` instead, and write what it returns on rank 0.

    Args:
        measure: takes the benchmark's parts, the job and its file.
    """
    path = Path(sys.argv[1])
    return_freed_memory()
    launcher.settle()
    logs.configure_logging()
    launch(seed=1024)
    job = json.loads(path.read_text())
    found = {}

    def measure_instead(parts, **options):
        found.update(measure(parts, job, path))
        raise StopIteration

    benchmark.measure = measure_instead
    try:
        config = resolve(train_flags.train_parser().parse_args(job["flags"]))
        benchmark.benchmark(config, config.benchmark, NoSignals())
    except StopIteration:
        if logs.is_first_rank():
            path.with_suffix(".json").write_text(json.dumps(found))
    leave()


def saved_twice(parts: Any, job: dict, path: Path) -> dict:
    """Make a step, and save in both ways."""
    # So that a parameter is gathered in several pieces and is in a file with few others.
    checkpoint_io.SHARD_MIB, gathered_states.PIECE_BYTES = 4, 2**18
    benchmark._Steps(parts, parts.loader.steps(0, 0), NoTimer()).run_one(logs.SilentProgress())
    return compare(parts.engine, path.with_suffix(""))


if __name__ == "__main__":
    run_job(saved_twice)
