"""A rank whose launcher was killed saves and ends, as on SIGTERM.

The parent's process ID is polled. Linux can send a signal instead (PR_SET_PDEATHSIG), but sends it when the *thread*
that started the process ends, and a launcher may start processes from threads that end.

Only the process that started this one counts. What started torchrun may end, such as a shell, with one exception:
`colossalai run` starts a torchrun on each host as the command of an ssh connection, and waits for it. If it or such a
connection is gone, nobody sees the run any more, and a restart would find it in its way. nohup prevents this.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from colossal_llama2.launcher import BY_HAND, place
from colossal_llama2.terminal_text import report_line

LOOK_SECONDS = 0.5
# Fields of /proc/PID/stat, counted from the one after the name.
PARENT_FIELD, START_FIELD = 1, 19
MAX_DEPTH = 8
# The processes that become the parent of orphans, besides process 1: a user's systemd, for example.
ADOPTERS = ("systemd", "init")
# Words in the command line of a possible launcher.
LAUNCHERS = (b"python", b"torch", b"colossalai", b"slurm", b"mpi", b"prte", b"orted")
SHELLS = ("bash", "sh", "dash", "zsh", "ksh", "csh", "tcsh", "fish")
SSH_SERVER, COLOSSALAI = "sshd", "colossalai"


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
    starters = _starters_of(here.parent) if here.launcher == "torchrun" else []
    cause = None
    while cause is None:
        if os.getppid() != here.parent or _is_adopted(here.parent):
            cause = f"{here.launcher}, which started this process, was killed"
        elif any(_started_at(pid) != started for pid, started in starters):
            cause = "what started torchrun on this host (colossalai run, or its ssh connection) has ended"
        else:
            time.sleep(LOOK_SECONDS)
    if here.local_rank == 0:
        # The log shows only warnings of rank 0, which may be on another host than the launcher that died.
        report_line(f"warning: rank {here.rank}: {cause}: ending as on SIGTERM")
    before()
    os.kill(os.getpid(), signal.SIGTERM)


def _starters_of(torchrun: int) -> list[tuple[int, int | None]]:
    """The processes above a torchrun that is the command of `colossalai run` or of an ssh connection, with start times.

    Empty for any other torchrun, such as one of an interactive shell, and for one that ignores SIGHUP (nohup).
    """
    found: list[tuple[int, int | None]] = []
    with suppress(OSError, ValueError, IndexError, StopIteration):
        pid = torchrun
        if _ignores_hangup(torchrun):
            return []
        while len(found) < MAX_DEPTH:
            pid = int(_status_of(pid)[PARENT_FIELD])
            entry = Path("/proc", str(pid))
            name = entry.joinpath("comm").read_text().strip()
            words = [os.path.basename(word.decode()) for word in entry.joinpath("cmdline").read_bytes().split(b"\0")]
            found.append((pid, _started_at(pid)))
            if name.startswith(SSH_SERVER) or COLOSSALAI in words[:2]:
                return found
            is_command = name in SHELLS and words[1].startswith("-") and words[1].endswith("c")
            if not is_command:
                return []
    return []


def _ignores_hangup(pid: int) -> bool:
    lines = Path("/proc", str(pid), "status").read_text().splitlines()
    ignored = next(line for line in lines if line.startswith("SigIgn:"))
    return bool(int(ignored.split()[1], 16) & 1 << (signal.SIGHUP - 1))


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
