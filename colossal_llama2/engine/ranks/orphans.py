"""A rank whose launcher was killed saves and ends, as on SIGTERM.

The parent's process ID is polled. Linux can send a signal instead (PR_SET_PDEATHSIG), but sends it when the *thread*
that started the process ends, and a launcher may start processes from threads that end.

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
# The processes that become the parent of orphans, besides process 1: a user's systemd, for example.
ADOPTERS = ("systemd", "init")
# Words in the command line of a possible launcher.
LAUNCHERS = (b"python", b"torch", b"colossalai", b"slurm", b"mpi", b"prte", b"orted")


def end_with_launcher(before: Callable[[], None] = lambda: None) -> None:
    """From now on, this process gets SIGTERM when its launcher dies; at once if the launcher is already dead.

    Without a launcher nothing happens, so a run in the background outlives its shell.

    Args:
        before: called before SIGTERM is sent, in another thread.
    """
    if place().launcher not in (None, BY_HAND):
        threading.Thread(target=_wait, args=(before,), daemon=True).start()


def _wait(before: Callable[[], None]) -> None:
    parent = place().parent
    while os.getppid() == parent and not _is_adopted(parent):
        time.sleep(LOOK_SECONDS)
    if place().local_rank == 0:
        # The log shows only warnings of rank 0, which may be on another host than the launcher that died.
        here = place()
        text = f"{here.launcher}, which started this process, was killed: ending as on SIGTERM"
        show_line(f"warning: rank {here.rank}: {text}", file=sys.stderr)
    before()
    os.kill(os.getpid(), signal.SIGTERM)


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
