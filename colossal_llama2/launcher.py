"""Which process of a job this is: what a launcher set in the environment, read once and checked.

    torchrun, colossalai run    TORCHELASTIC_RUN_ID and the variables below
    by hand                     RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, all four
    srun, mpirun                rank and size in variables of their own, with MASTER_ADDR and MASTER_PORT set as well

Anything less was left over by another job: it is ignored, and removed from the environment, which libraries read too.
Only commands that can be launched call `settle`. In all others, `place` is that of a process on its own.
"""

import os
import re
from dataclasses import dataclass
from typing import Optional, Tuple

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
# While this is "True", torchrun's own process serves MASTER_PORT.
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
NAMES = (*REQUIRED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", TORCHRUN_ID, AGENT_STORE)
# By launcher: its variables for rank, world size and local rank. Slurm sets the second in steps of srun alone.
OTHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
BY_HAND = "by hand"
LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|::1")
MAX_PORT = 65535


@dataclass(frozen=True)
class Place:
    """A process among those of its job.

    Attributes:
        launcher: torchrun, srun, mpirun, "by hand", or None for a process on its own.
        parent: the process that started this one.
        uses_agent_store: whether torchrun's own process serves MASTER_PORT; otherwise rank 0 must.
        note: what to log about the environment, once.
        problem: what is wrong with the environment; the other attributes are then those of a process on its own.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: Optional[str] = None
    parent: int = 0
    uses_agent_store: bool = False
    note: Optional[str] = None
    problem: Optional[str] = None


ALONE = Place()
_settled: Optional[Place] = None


def place() -> Place:
    """What `settle` found; before that, a process on its own."""
    return _settled or ALONE


def settle() -> Place:
    """Read the environment, remove what is left over in it, and complete what a launcher leaves out. Once a process."""
    global _settled
    if _settled is None:
        _settled = _read()
    return _settled


def _read() -> Place:
    for name in NAMES:
        # An empty variable says nothing.
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]
    note = None
    if "RANK" not in os.environ:
        note = _take_over_others()
    given = [name for name in NAMES if name in os.environ]
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing:
        said = ", ".join(f"{name}={os.environ.pop(name)}" for name in given)
        if said:
            note = f"No launcher started this process ({', '.join(missing)} not set), so it ignores {said}"
        return Place(note=note)
    try:
        return _launched()
    except ValueError as error:
        return Place(problem=f"{error}; start with torchrun, or unset {', '.join(given)}")


def _take_over_others() -> Optional[str]:
    """Set the usual variables from those of srun or mpirun, if there is an address to meet at; what to log if not."""
    for launcher, names in OTHERS.items():
        rank, size, local_rank = (os.environ.get(name, "") for name in names)
        if not rank.isdecimal() or not size.isdecimal() or int(size) < 2:
            continue
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            return (
                f"{launcher} started {size} processes, of which each now trains on its own; for one job of all, set "
                f"MASTER_ADDR to the host of the first and MASTER_PORT to a free port there, or start torchrun"
            )
        os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank or "0")
        return None
    return None


def _launched() -> Place:
    """Raises ValueError with what is wrong."""
    world_size = _number("WORLD_SIZE", least=1)
    rank = _number("RANK", most=world_size - 1, why=f"since WORLD_SIZE is {world_size}")
    _number("MASTER_PORT", least=1, most=MAX_PORT)
    if "LOCAL_WORLD_SIZE" in os.environ:
        _number("LOCAL_WORLD_SIZE", least=1, most=world_size, why=f"since WORLD_SIZE is {world_size}")
    note = None
    if "LOCAL_RANK" not in os.environ:
        local_rank, note = _guess_local_rank(rank, world_size)
        os.environ["LOCAL_RANK"] = local_rank
    local_rank = _number("LOCAL_RANK", most=world_size - 1, why=f"since WORLD_SIZE is {world_size}")
    return Place(
        rank, local_rank, world_size, _launcher(rank), parent=os.getppid(),
        uses_agent_store=os.environ.get(AGENT_STORE) == "True", note=note,
    )  # fmt: skip


def _launcher(rank: int) -> str:
    if TORCHRUN_ID in os.environ:
        return "torchrun"
    # What is left of torchrun would make PyTorch look for a server that nobody runs.
    os.environ.pop(AGENT_STORE, None)
    return next((name for name, names in OTHERS.items() if os.environ.get(names[0]) == str(rank)), BY_HAND)


def _guess_local_rank(rank: int, world_size: int) -> Tuple[str, Optional[str]]:
    for _, _, name in OTHERS.values():
        if os.environ.get(name, "").isdecimal():
            return os.environ[name], None
    if world_size == 1 or LOOPBACK.fullmatch(os.environ["MASTER_ADDR"].strip()):
        return str(rank), None
    return "0", "LOCAL_RANK is not set: this process takes GPU 0; with several on a host, number them with LOCAL_RANK"


def _number(name: str, *, least: int = 0, most: Optional[int] = None, why: str = "") -> int:
    text = os.environ[name].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        upwards = f"from {least} to {most}" if most is not None else f"of at least {least}"
        allowed = f"a whole number {upwards}" if most is None or most >= least else "nothing"
        raise ValueError(f"{name}={text} in the environment, {allowed} allowed{f' {why}' if why else ''}")
    os.environ[name] = str(int(text))
    return int(text)
