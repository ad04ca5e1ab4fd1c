"""Which process of a job this is: the launcher's environment variables, read once and checked.

    torchrun, colossalai run    TORCHELASTIC_RUN_ID and the variables below
    by hand                     RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, all four
    srun, mpirun                rank and size in variables of their own, with MASTER_ADDR and MASTER_PORT set as well

An incomplete set was left over by another job. It is ignored, and removed from the environment, since libraries read it
too. Several processes of srun or mpirun without an address are refused: all would write to the same folders.
Only commands that can be launched call `settle`. In all others, `place` describes a single process.
"""

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
# While this is "True", torchrun's own process serves MASTER_PORT.
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
# How often torchrun started the processes again.
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
# Where torchrun reads why a process of its own ended, for its report.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
NAMES = (*REQUIRED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", TORCHRUN_ID, AGENT_STORE)
# By launcher: its variables for rank, world size and local rank. Slurm sets the second only in steps of srun.
OTHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
BY_HAND = "by hand"
LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")
MAX_PORT = 65535
# The processes of a host check the same flags; their times differ by less than this.
FIRST_OF_HOST_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    """The place of a process in its job.

    Attributes:
        launcher: torchrun, srun, mpirun, "by hand", or None for a single process.
        parent: the process that started this one.
        uses_agent_store: whether torchrun's own process serves MASTER_PORT; otherwise rank 0 must.
        note: what to log about the environment, once.
        problem: what is wrong with the environment; the other attributes are then those of a single process.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str | None = None
    parent: int = 0
    uses_agent_store: bool = False
    note: str | None = None
    problem: str | None = None


ALONE = Place()
_settled: Place | None = None


def place() -> Place:
    """The result of `settle`; before it is called, a single process."""
    return _settled or ALONE


def settle() -> Place:
    """Read the environment once, remove leftovers from it, and complete what the launcher omits.

    Also keeps PyTorch from starting compiler processes in each rank, which must happen before parts of it are imported.
    """
    global _settled
    _start_no_compilers()
    if _settled is None:
        _settled = _read()
    return _settled


def _start_no_compilers() -> None:
    """ColossalAI's import would start as many as there are cores, for functions that are not called here.

    torch._inductor.config reads the number when it is imported, which many parts of PyTorch and transformers do.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def stand_for(world_size: int) -> None:
    """Act as rank 0 of a job of `world_size` processes that is not launched yet, to check it."""
    global _settled
    _settled = Place(world_size=world_size)


def report_to_torchrun(message: str, trace: str = "") -> None:
    """Write the reason why this process ends to torchrun's error file, so that its report shows it.

    The format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler. Does nothing under other
    launchers, or if the file cannot be written: the message is on stderr as well.
    """
    path = os.environ.get(ERROR_FILE)
    if not path or place().launcher != "torchrun":
        return
    # torchrun shows the call stack if there is one, and reports the record with the earliest time as the root cause.
    extra = {"py_callstack": trace or message, "timestamp": str(int(time.time()))}
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def wait_for_first_of_host() -> None:
    """Under torchrun, give the first process of this host time to report why all of them end.

    torchrun ends all processes as soon as one has ended: without this, a silent one could end the one that reports.
    """
    here = place()
    if here.launcher == "torchrun" and here.local_rank > 0:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_OF_HOST_SECONDS)


def _read() -> Place:
    for name in NAMES:
        # An empty variable counts as unset.
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]
    try:
        taken_over = _take_over_others()
    except ValueError as error:
        return Place(problem=str(error))
    given = [name for name in NAMES if name in os.environ]
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing:
        ignored = ", ".join(f"{name}={os.environ.pop(name)}" for name in given)
        note = f"No launcher started this process ({', '.join(missing)} not set); ignoring {ignored}"
        return Place(note=note if ignored else None)
    try:
        here = _launched()
        return replace(here, note="; ".join(filter(None, (taken_over, here.note))) or None)
    except ValueError as error:
        return Place(problem=f"{error}; start with torchrun, or unset {', '.join(given)}")


def _take_over_others() -> str | None:
    """If RANK or WORLD_SIZE is missing, set the usual variables from those of srun or mpirun.

    Returns:
        What to log, if variables of another job were replaced.

    Raises:
        ValueError: several processes were started without an address to connect to. Each would train alone, and all
            would write to the same folders.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return None
    for launcher, (rank_name, size_name, local_name) in OTHERS.items():
        rank, size = os.environ.get(rank_name, ""), os.environ.get(size_name, "")
        if not rank.isdecimal() or not size.isdecimal() or int(size) < 2:
            continue
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"{launcher} started {size} processes without {' and '.join(missing)}, so they cannot connect; export "
                f"MASTER_ADDR, the host of the first, and MASTER_PORT, a free port there, or start torchrun; for a "
                f"single process, unset {size_name}"
            )
        values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": os.environ.get(local_name) or "0"}
        left = [name for name in NAMES if name in os.environ and name not in ("MASTER_ADDR", "MASTER_PORT")]
        other = ", ".join(f"{name}={os.environ.pop(name)}" for name in left if os.environ[name] != values.get(name))
        os.environ.update(values)
        return f"{launcher} started this process as rank {rank} of {size}; ignoring {other}" if other else None
    return None


def _launched() -> Place:
    """The place that the variables describe. Raises ValueError with what is wrong."""
    world_size = _number("WORLD_SIZE", least=1)
    rank = _number("RANK", most=world_size - 1, why=f"since WORLD_SIZE is {world_size}")
    _number("MASTER_PORT", least=1, most=MAX_PORT)
    os.environ["MASTER_ADDR"] = os.environ["MASTER_ADDR"].strip()
    if "LOCAL_WORLD_SIZE" in os.environ:
        _number("LOCAL_WORLD_SIZE", least=1, most=world_size, why=f"since WORLD_SIZE is {world_size}")
    note = None
    if "LOCAL_RANK" not in os.environ:
        guessed, note = _guess_local_rank(rank, world_size)
        os.environ["LOCAL_RANK"] = guessed
    local_rank = _number("LOCAL_RANK", most=world_size - 1, why=f"since WORLD_SIZE is {world_size}")
    return Place(
        rank,
        local_rank,
        world_size,
        _launcher(rank, world_size),
        parent=os.getppid(),
        uses_agent_store=os.environ.get(AGENT_STORE) == "True",
        note=note,
    )


def _launcher(rank: int, world_size: int) -> str:
    if TORCHRUN_ID in os.environ:
        return "torchrun"
    # A leftover of torchrun would make PyTorch connect to a server that does not run.
    os.environ.pop(AGENT_STORE, None)
    for launcher, (rank_name, size_name, _) in OTHERS.items():
        # In the shell of a batch job, Slurm's rank is 0 too, but there is no job step, so no size.
        if (os.environ.get(rank_name), os.environ.get(size_name)) == (str(rank), str(world_size)):
            return launcher
    return BY_HAND


def _guess_local_rank(rank: int, world_size: int) -> tuple[str, str | None]:
    for rank_name, _, name in OTHERS.values():
        # In the shell of a batch job, all ranks started there see Slurm's rank 0.
        if os.environ.get(name, "").isdecimal() and os.environ.get(rank_name, str(rank)) == str(rank):
            return os.environ[name], None
    if world_size == 1 or LOOPBACK.fullmatch(os.environ["MASTER_ADDR"]):
        return str(rank), None
    return (
        "0",
        "LOCAL_RANK is not set, so this process uses GPU 0; for several processes on a host, set LOCAL_RANK in each",
    )


def _number(name: str, *, least: int = 0, most: int | None = None, why: str = "") -> int:
    text = os.environ[name].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        upwards = f"from {least} to {most}" if most is not None else f"of at least {least}"
        allowed = f"a whole number {upwards}" if most is None or most >= least else "nothing"
        raise ValueError(f"{name}={text} in the environment, {allowed} allowed{f' {why}' if why else ''}")
    os.environ[name] = str(int(text))
    return int(text)
