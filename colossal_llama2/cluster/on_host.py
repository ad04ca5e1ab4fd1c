"""One host's part of a launch: starts torchrun or colossalai run, and ends it when the launch on the first host ends.

    python -m colossal_llama2.cluster.on_host

is started by cluster/launchers.py, over ssh on other hosts. The first line of its input is a JSON object with the
command and the environment, so that neither appears in a command line; after how many seconds of silence the launch
counts as cut off (null: never); and how long ranks may take to save (--dist_timeout, after which a rank that waits for
others ends by itself). Each further line is a signal's name for the ranks, or empty as a sign of life. When
the input ends, or is silent for so long, everything that was started here ends. The exit code is that of the command.
"""

import json
import os
import select
import signal
import subprocess
import threading
import time

from colossal_llama2.cluster import job_processes
from colossal_llama2.terminal_text import report_line

# How often the launch gives a sign of life, and after how long without one its host counts as cut off.
SIGN_SECONDS = 5.0
SILENT_SECONDS = 30.0
LOOK_SECONDS = 0.2


def main() -> None:
    """Start the command of the first line, and end with it."""
    # A signal of the terminal reaches the launch, which passes it on.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    task = json.loads(_read_line())
    environment = {**os.environ, **task["environment"]}
    process = subprocess.Popen(
        task["command"],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Ignored signals are inherited.
        preexec_fn=_default_signals,
    )
    mark = environment[job_processes.MARK]
    threading.Thread(target=_obey, args=(mark, task["silent_seconds"], task["save_seconds"]), daemon=True).start()
    code = process.wait()
    # A rank whose torchrun was killed lives on.
    if code < 0:
        _end_all(mark, task["save_seconds"])
    os._exit(code if code >= 0 else 128 - code)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _read_line() -> bytes:
    """A line of the input, read without looking ahead: what follows is awaited with a limit."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line


def _obey(mark: str, silent_seconds: float | None, save_seconds: float) -> None:
    while select.select([0], [], [], silent_seconds)[0]:
        line = _read_line()
        if not line:
            break
        if name := line.decode().strip():
            job_processes.signal_here(mark, signal.Signals[name], only_ranks=True)
    else:
        report_line(f"on_host: no contact with the launch for {silent_seconds:g} s; ending its processes")
    _end_all(mark, save_seconds)
    os._exit(1)


def _end_all(mark: str, save_seconds: float) -> None:
    """End the command and all that it has started, when the ranks, which get SIGTERM, have saved and ended."""
    end = time.monotonic() + save_seconds
    job_processes.signal_here(mark, signal.SIGTERM, only_ranks=True)
    while time.monotonic() < end and job_processes.Processes.of(mark).ranks:
        time.sleep(LOOK_SECONDS)
    job_processes.signal_here(mark, signal.SIGKILL, only_ranks=False)


if __name__ == "__main__":
    main()
