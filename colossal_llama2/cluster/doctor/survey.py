"""Ask all hosts of a job for their reports, in parallel: over ssh and over the launcher's own library, or by srun."""

import fcntl
import importlib.util
import json
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from colossal_llama2.cluster.doctor import remote
from colossal_llama2.cluster.doctor.host_report import MARK
from colossal_llama2.cluster.doctor.remote import Answer
from colossal_llama2.cluster.hostfile import SSH_PORT, Host, is_this_host

REPORT_PROGRAM = "colossal_llama2.cluster.doctor.host_report"
# For the parts of a report; the port of the first host is served as long.
REPORT_SECONDS = 10.0
PORT_SECONDS = 5.0
# This host starts the connections one after the other.
SECONDS_PER_HOST = 0.1
# Beyond the report: connecting, and Python's start on a busy host.
LOGIN_SECONDS = 10.0
# In --save_dir, see train/run_folder.
LOCK_NAME = ".lock"
HELLO = "colossal_llama2.hello"
GREETING = f"echo {HELLO}\n"
PASSED = ("PYTHONPATH", "PYTHONSAFEPATH")
END = "END_OF_THE_PROGRAM"


@dataclass(frozen=True)
class Question:
    """What the hosts are asked about.

    Attributes:
        folder: where training is going to be started, an absolute path.
        python, path: the interpreter and PATH, the same on every host.
        scripts: files in `folder` that have to be the same everywhere.
        paths: files and folders that have to be the same everywhere, relative to `folder` or absolute.
        hash_bytes: files up to this size are compared by their contents, larger ones by size.
        path_seconds: how long `paths` may be read.
        save_dir: the folder of the checkpoints.
        lock_owner: who has locked it: `host`, `pid`, `since`, `ending`.
        port: MASTER_PORT.
        launcher: "colossalai", "ssh" or "slurm": by what processes are going to be started there.
    """

    folder: str
    python: str
    path: str
    scripts: Sequence[str] = ()
    paths: Sequence[str] = ()
    hash_bytes: int = 0
    path_seconds: float = REPORT_SECONDS
    save_dir: Path | None = None
    lock_owner: dict | None = None
    port: int | None = None
    launcher: str = "colossalai"


@dataclass
class Reply:
    """What came back from a host.

    Attributes:
        report: the host's report, None if there is none.
        problem: why there is no report, or None.
        needs_ssh: False for this host, if the launcher starts processes here without ssh.
        ssh_problem, fabric_problem: why one of the two does not reach the host; None if it does or was not tried.
        sent, received: between which times of this host's clock the report was made.
    """

    host: Host
    report: dict[str, Any] | None = None
    problem: str | None = None
    ssh_problem: str | None = None
    fabric_problem: str | None = None
    needs_ssh: bool = True
    sent: float = 0.0
    received: float = 0.0


@dataclass(frozen=True)
class Probe:
    """A file of this host in the nearest existing parent of --save_dir, or why there is none."""

    folder: Path
    path: Path | None
    problem: str | None = None


@contextmanager
def probe_file(save_dir: Path) -> Iterator[Probe]:
    """Write a file for the other hosts to find, with a lock on it, and remove it at the end."""
    folder = save_dir.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    # Runs remove files of this name, if this process is killed.
    path = folder / f".token-{secrets.token_hex(4)}"
    try:
        file = open(path, "xb")
    except OSError as error:
        yield Probe(folder, None, error.strerror)
        return
    try:
        with file, suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Probe(folder, path)
    finally:
        path.unlink(missing_ok=True)


def ask_all(hosts: Sequence[Host], question: Question, probe: Probe | None) -> list[Reply]:
    """The replies of all hosts, in their order. The first of them serves MASTER_PORT to the others."""
    token = secrets.token_hex(8)
    uses_fabric = question.launcher == "colossalai"
    fabric_missing = remote.prepare_fabric() if uses_fabric else None
    scripts = [_script(question, _request(question, probe, hosts, number, token)) for number in range(len(hosts))]
    # When the first host has stopped serving the port.
    late = _script(question, {**_request(question, probe, hosts, 0, token), "port": None})
    seconds = question.path_seconds + LOGIN_SECONDS + SECONDS_PER_HOST * len(hosts)
    tasks: list[Callable[[], Any]] = [
        partial(_ask, host, script, question.launcher, seconds) for host, script in zip(hosts, scripts, strict=True)
    ]
    if uses_fabric and not fabric_missing:
        tasks += [partial(_greet, host) for host in hosts]
    results = _together(tasks)
    replies = results[: len(hosts)]
    greetings = results[len(hosts) :] or [fabric_missing] * len(hosts)
    for reply, greeting in zip(replies, greetings, strict=True):
        reply.fabric_problem = greeting
        if reply.report is None and reply.ssh_problem and uses_fabric and not greeting:
            _take_report(reply, remote.by_fabric(reply.host, late, seconds=seconds))
    return replies


def _together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all tasks, each of which runs in a thread: the first host has to serve while others call it.

    The threads of an executor would delay the end of a process that is interrupted.
    """
    results: list[Any] = [None] * len(tasks)
    failures: list[Exception] = []

    def run(number: int) -> None:
        try:
            results[number] = tasks[number]()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def starts_without_ssh(name: str, launcher: str) -> bool:
    """Whether a launcher starts the processes of a host without ssh, because it is this one.

    For colossalai, as in its cli/launcher/hostinfo.py, which does not recognize every name of this host.
    """
    if launcher != "colossalai" or not is_this_host(name):
        return is_this_host(name)
    try:
        own, target = socket.gethostname(), socket.getfqdn(name)
        return socket.getaddrinfo(own, SSH_PORT) == socket.getaddrinfo(target, SSH_PORT)
    except OSError:
        return False


def ask_here(question: Question, probe: Probe | None) -> Reply:
    """The reply of this host, without ssh."""
    host = Host(socket.gethostname())
    script = _script(question, _request(question, probe, [host], 0, secrets.token_hex(8)))
    reply = Reply(host, sent=time.time())
    _take_report(reply, remote.by_here(script, seconds=question.path_seconds + LOGIN_SECONDS))
    return reply


def _ask(host: Host, script: str, launcher: str, seconds: float) -> Reply:
    reply = Reply(host, sent=time.time(), needs_ssh=launcher != "slurm" and not starts_without_ssh(host.name, launcher))
    if launcher == "slurm":
        answer = remote.by_srun(host, script, seconds=seconds)
    elif reply.needs_ssh:
        answer = remote.by_openssh(host, script, seconds=seconds)
        reply.ssh_problem = answer.problem
    else:
        by_ssh = partial(remote.by_openssh, host, GREETING, seconds=LOGIN_SECONDS)
        answer, greeting = _together([partial(remote.by_here, script, seconds=seconds), by_ssh])
        reply.ssh_problem = _greeting_problem(greeting)
    _take_report(reply, answer)
    return reply


def _greet(host: Host) -> str | None:
    return _greeting_problem(remote.by_fabric(host, GREETING, seconds=LOGIN_SECONDS))


def _greeting_problem(answer: Answer) -> str | None:
    if answer.output is None:
        return answer.problem
    return None if HELLO in answer.output else "runs no command; its login shell has to"


def _take_report(reply: Reply, answer: Answer) -> None:
    """Read the report from what a host answered."""
    reply.received = time.time()
    reply.report, reply.problem = None, answer.problem
    for line in (answer.output or "").splitlines():
        if line.startswith(MARK):
            with suppress(ValueError):
                reply.report = json.loads(line.removeprefix(MARK))
    if reply.report is None and answer.output is not None:
        last = [line.strip() for line in answer.output.splitlines() if line.strip()][-1:]
        reply.problem = f"sent no report ({last[0] if last else 'no output'}); run a command there and read why"


def _request(question: Question, probe: Probe | None, hosts: Sequence[Host], number: int, token: str) -> dict:
    save, patience = None, SECONDS_PER_HOST * len(hosts)
    if probe is not None and probe.path is not None:
        lock = Path(question.folder, question.save_dir or "", LOCK_NAME)
        save = {
            "folder": str(probe.folder),
            "probe": str(probe.path),
            "lock": str(lock),
            "owner": question.lock_owner,
        }
    port = None
    if question.port is not None:
        callers = len(hosts) - 1 if number == 0 else None
        port = {"number": question.port, "callers": callers, "token": token, "seconds": PORT_SECONDS + patience}
    return {
        "seconds": REPORT_SECONDS + patience,
        "path_seconds": question.path_seconds,
        "path": question.path,
        "scripts": list(question.scripts),
        "paths": list(question.paths),
        "hash_bytes": question.hash_bytes,
        "save": save,
        "port": port,
        "master": hosts[0].name,
    }


def _script(question: Question, request: dict) -> str:
    """A script for sh that goes to the folder and sends the program of the report to its Python."""
    source = importlib.util.find_spec(REPORT_PROGRAM)
    assert source is not None and source.origin is not None
    program = Path(source.origin).read_text(encoding="utf-8")
    return "\n".join(
        [
            *entering(question),
            f"{shlex.quote(question.python)} - <<'{END}'",
            program,
            f"main({json.dumps(request)!r})",
            END,
            "",
        ]
    )


def entering(question: Question) -> list[str]:
    """Lines for sh that go to the folder and set what Python needs, or report what is missing and end."""

    def missing(what: str) -> str:
        text = shlex.quote(MARK + json.dumps({"missing": what}))
        return f"{{ printf '%s\\n' {text}; exit 0; }}"

    return [
        f"PATH={shlex.quote(question.path)}; export PATH",
        # Where Python looks for the package; launchers pass it on.
        *(f"{name}={shlex.quote(os.environ[name])}; export {name}" for name in PASSED if name in os.environ),
        f"cd {shlex.quote(question.folder)} 2>/dev/null || {missing('folder')}",
        f"[ -x {shlex.quote(question.python)} ] || {missing('python')}",
    ]


def here(launcher: str) -> Question:
    """A question about this host's own folder, interpreter and PATH."""
    return Question(folder=os.getcwd(), python=sys.executable, path=os.environ.get("PATH", ""), launcher=launcher)
