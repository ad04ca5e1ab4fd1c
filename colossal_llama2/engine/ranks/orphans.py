"""What becomes of a rank whose launcher was killed: it saves and ends, as on SIGTERM.

The parent's number is looked at now and then. Linux can send a signal instead (PR_SET_PDEATHSIG), but sends it when
the *thread* that started the process ends, and a launcher may well start processes from threads that end.

Only the process that started this one counts. What started torchrun, such as `colossalai run` or a shell, may end.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from colossal_llama2.launcher import BY_HAND, place
from colossal_llama2.terminal_text import show_line

LOOK_SECONDS = 0.5
# What takes over processes whose parent is gone, besides process 1: a user's systemd does.
ADOPTERS = ("systemd", "init")
# Words in the command line of what may be a launcher.
LAUNCHERS = (b"python", b"torch", b"colossalai", b"slurm", b"mpi", b"prte", b"orted")


def end_with_launcher(before: Callable[[], None] = lambda: None) -> None:
    """From now on, this process gets SIGTERM when its launcher dies; at once, if it is dead already.

    Without a launcher nothing happens: a run in the background outlives its shell.

    Args:
        before: called before that, in another thread.
    """
    if place().launcher not in (None, BY_HAND):
        threading.Thread(target=_wait, args=(before,), daemon=True).start()


def _wait(before: Callable[[], None]) -> None:
    parent = place().parent
    while os.getppid() == parent and not _is_adopted(parent):
        time.sleep(LOOK_SECONDS)
    if place().local_rank == 0:
        # The log shows warnings of rank 0 alone, and the launcher of another host may be the one that is gone.
        here = place()
        text = f"{here.launcher} is gone, which started this process: ending as on SIGTERM"
        show_line(f"warning: rank {here.rank}: {text}", file=sys.stderr)
    before()
    os.kill(os.getpid(), signal.SIGTERM)


def _is_adopted(parent: int) -> bool:
    """Whether the launcher had died before anybody looked, so that another process is the parent.

    In a container, process 1 may be the launcher itself, so one that may be is taken for it.
    """
    entry = Path("/proc", str(parent))
    with suppress(OSError):
        if parent != 1:
            return entry.joinpath("comm").read_text().strip() in ADOPTERS
        words = entry.joinpath("cmdline").read_bytes()
        return not any(name in words for name in LAUNCHERS)
    return False
