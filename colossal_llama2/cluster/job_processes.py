"""The processes of one launch, on this host and on others, found by a variable that only they have.

A launcher does not end what it has started on other hosts, and forwards no signals there. ssh without a terminal does
not either. So every process of a launch inherits MARK with a value of its own, and only processes with it get signals.
"""

import os
import signal
import subprocess
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import psutil

from colossal_llama2.cluster import ssh

MARK = "COLOSSAL_LLAMA2_LAUNCH"
# What this takes on a host that answers is far less.
REMOTE_SECONDS = 15
# A process this old starts no other program in its place.
NEW_SECONDS = 10.0
# Old processes of no launch: reading the environments of all processes again and again would cost time.
_others: "weakref.WeakSet[psutil.Process]" = weakref.WeakSet()
# For sh, whatever the login shell is. Prints how many processes it has signalled.
SIGNAL_SCRIPT = """
exec 2>/dev/null
belongs() {{
    variables="
$(tr "\\\\0" "\\\\n" <"$1/environ")
"
    case "$variables" in
        *"
{mark}={value}
"*) ;;
        *) return 1 ;;
    esac
}}
is_rank() {{
    belongs "$1" || return 1
    case "$variables" in
        *"
LOCAL_RANK="*) ;;
        *) return 1 ;;
    esac
}}
count=0
for folder in /proc/[0-9]*; do
    if [ {only_ranks} = yes ]; then
        is_rank "$folder" || continue
        # What a rank has started is no rank.
        parent=$(sed -n "s/^PPid:[[:space:]]*//p" "$folder/status")
        is_rank "/proc/$parent" && continue
    else
        belongs "$folder" || continue
    fi
    kill -{number} "${{folder#/proc/}}" && count=$((count + 1))
done
echo $count
"""


@dataclass
class Processes:
    """The processes of a launch on this host.

    Attributes:
        ranks: those that torchrun or srun has started, without what they have started themselves.
        agents: torchrun itself.
    """

    ranks: list[psutil.Process]
    agents: list[psutil.Process]

    @classmethod
    def of(cls, value: str) -> "Processes":
        """Find the processes whose MARK has this value."""
        found = cls([], [])
        environments = dict(_marked(value))
        ids = {process.pid for process, environment in environments.items() if "LOCAL_RANK" in environment}
        for process, environment in environments.items():
            with suppress(psutil.Error):
                if "LOCAL_RANK" not in environment:
                    words = process.cmdline()
                    if any(word.endswith("torchrun") or word == "torch.distributed.run" for word in words[:4]):
                        found.agents.append(process)
                elif process.ppid() not in ids:
                    found.ranks.append(process)
        return found


def signal_here(value: str, number: int, *, only_ranks: bool) -> int:
    """Send a signal to the processes of a launch on this host. Returns how many got it."""
    if only_ranks:
        targets = Processes.of(value).ranks
    else:
        targets = [process for process, _ in _marked(value) if process.pid != os.getpid()]
    count = 0
    for process in targets:
        with suppress(psutil.Error):
            process.send_signal(number)
            count += 1
    return count


def signal_hosts(destinations: Sequence[str], value: str, number: int, *, only_ranks: bool) -> list[str]:
    """Send a signal to the processes of a launch on other hosts, all at once. Returns the hosts that do not answer."""
    script = SIGNAL_SCRIPT.format(mark=MARK, value=value, number=number, only_ranks="yes" if only_ranks else "no")

    def send(destination: str) -> bool:
        # Through stdin: no quoting is the same in every shell.
        with suppress(subprocess.TimeoutExpired, OSError):
            process = subprocess.run(
                ssh.command(destination, "sh"), input=script, capture_output=True, text=True, timeout=REMOTE_SECONDS
            )
            return process.returncode == 0
        return False

    if not destinations:
        return []
    with ThreadPoolExecutor(min(len(destinations), 64)) as pool:
        answers = list(pool.map(send, destinations))
    return [destination for destination, answered in zip(destinations, answers, strict=True) if not answered]


def _marked(value: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    for process in psutil.process_iter():
        # psutil returns the same object as long as a process lives.
        if process in _others:
            continue
        # Ended in the meantime.
        with suppress(psutil.Error, OSError):
            try:
                environment = process.environ()
            except psutil.AccessDenied:
                # Of another user.
                _others.add(process)
                continue
            if environment.get(MARK) == value:
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process, environment
            elif MARK not in environment and time.time() - process.create_time() > NEW_SECONDS:
                _others.add(process)


def name_of(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
