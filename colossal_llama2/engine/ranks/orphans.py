"""A rank whose launcher was killed saves and ends, as on SIGTERM.

The parent's process ID is polled. Linux can send a signal instead (PR_SET_PDEATHSIG), but sends it when the *thread*
that started the process ends, and a launcher may start processes from threads that end.

Only the process that started this one counts. What started torchrun may end, such as a shell. `colossalai run` is an
exception: it waits for its torchruns, each in a shell on its own host. If that shell is gone, or the connection through
which it was started, nobody sees the run any more, and a restart would find it in its way.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from colossal_llama2.launcher import BY_HAND, TORCHRUN_ID, place
from colossal_llama2.terminal_text import show_line

LOOK_SECONDS = 0.5
# Fields of /proc/PID/stat, counted from the one after the name.
PARENT_FIELD, START_FIELD = 1, 19
MAX_DEPTH = 8
# The processes that become the parent of orphans, besides process 1: a user's systemd, for example.
ADOPTERS = ("systemd", "init")
# Words in the command line of a possible launcher.
LAUNCHERS = (b"python", b"torch", b"colossalai", b"slurm", b"mpi", b"prte", b"orted")
# `colossalai run` gives this id to torchrun. Above its torchrun are shells, and then one of these: the server of the
# connection on a remote host, its own process on the local one.
COLOSSALAI_ID = "colossalai-default-job"
SHELLS, STARTERS = ("bash", "sh", "dash", "zsh", "ksh", "csh", "tcsh", "fish", "env"), ("sshd", "colossalai", "python")


def end_with_launcher(before: Callable[[], None] = lambda: None) -> None:
    """From now on, this process gets SIGTERM when its launcher dies; at once if the launcher is already dead.

    Without a launcher nothing happens, so a run in the background outlives its shell.

    Args:
        before: called before SIGTERM is sent, in another thread.
    """
    if place().launcher not in (None, BY_HAND):
        threading.Thread(target=_wait, args=(before,), daemon=True).start()


def _wait(before: Callable[[], None]) -> None:
    here = place()
    shells = _shells_above(here.parent) if os.environ.get(TORCHRUN_ID) == COLOSSALAI_ID else []
    cause = None
    while cause is None:
        if os.getppid() != here.parent or _is_adopted(here.parent):
            cause = f"{here.launcher}, which started this process, was killed"
        elif not all(_started_at(pid) == started for pid, started in shells):
            cause = "the shell or connection of colossalai run on this host has ended"
        else:
            time.sleep(LOOK_SECONDS)
    if here.local_rank == 0:
        # The log shows only warnings of rank 0, which may be on another host than the launcher that died.
        show_line(f"warning: rank {here.rank}: {cause}: ending as on SIGTERM", file=sys.stderr)
    before()
    os.kill(os.getpid(), signal.SIGTERM)


def _shells_above(pid: int) -> list[tuple[int, int | None]]:
    """The shells above a process, up to what started them, each with its start time; none if that is something else."""
    found: list[tuple[int, int | None]] = []
    with suppress(OSError, ValueError, IndexError):
        while len(found) < MAX_DEPTH:
            pid = int(_status_of(pid)[PARENT_FIELD])
            name = Path("/proc", str(pid), "comm").read_text().strip()
            found.append((pid, _started_at(pid)))
            if name.startswith(STARTERS):
                return found
            if name not in SHELLS:
                return []
    return []


def _status_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which is in parentheses and may contain spaces. Raises OSError."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()


def _started_at(pid: int) -> int | None:
    """When a process started, in ticks of the system; None if it has ended."""
    try:
        status = _status_of(pid)
    except OSError:
        return None
    return None if status[0] in "ZX" else int(status[START_FIELD])


def _is_adopted(parent: int) -> bool:
    """Whether the launcher died before the first poll, so that the parent is another process.

    In a container, process 1 may be the launcher itself; it counts as one if its command line is that of a launcher.
    """
    entry = Path("/proc", str(parent))
    with suppress(OSError):
        if parent != 1:
            return entry.joinpath("comm").read_text().strip() in ADOPTERS
        words = entry.joinpath("cmdline").read_bytes()
        return not any(name in words for name in LAUNCHERS)
    return False
