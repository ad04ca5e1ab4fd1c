"""Run a shell script on another host: by OpenSSH; by fabric, with which `colossalai run` starts its processes; by srun.

OpenSSH and fabric read the same ~/.ssh/config, but differ in keys, known hosts and more, so either may fail alone.
Neither asks for a password. The script is sent on standard input of `sh`, so the login shell may be any, and no quoting
is lost.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from colossal_llama2.cluster import ssh
from colossal_llama2.cluster.hostfile import Host

SHELL = "sh -s"
# What the job has asked for all its nodes or tasks, and srun would ask for one: it reads these variables as its flags.
SIZES_OF_A_STEP = re.compile(
    r"SLURM_(NTASKS.*|NPROCS|NNODES|NUM_NODES|GPUS|GPUS_PER_(TASK|SOCKET)|CPUS_PER_(TASK|GPU)|TRES_PER_TASK|DISTRIBUTION)"
)
SRUN_END_SECONDS = 3.0
LOGIN_REFUSED = r"account is (currently )?not available|nologin"
MAX_REFUSAL = 500
# What ssh and paramiko report, and what it means with the cure.
REASONS = (
    (r"permission denied|authentication failed|authenticationexception|no existing session|no authentication methods",
     "refuses this user's key; ssh-copy-id {login} from here, or load the key into ssh-agent"),
    (r"passwordrequired|private key file is encrypted",
     "needs a key with a passphrase; load it into ssh-agent (ssh-add)"),
    (r"host key verification failed|badhostkey|remote host identification|does not match",
     "has an unknown or changed host key; connect once by hand (ssh {login}) and accept it, or correct known_hosts"),
    (r"connection refused", "accepts no connection on ssh's port; start sshd there, or name its port"),
    (r"could not resolve|name or service not known|nodename nor servname",
     "cannot be found by its name; correct /etc/hosts or DNS"),
    (r"timed out|timeout|no route to host|network is unreachable|unable to connect|host is down",
     f"does not answer within {ssh.CONNECT_SECONDS} s; check that it is up, its cable, its firewall, and the hostfile"),
    (r"incompatiblepeer|incompatible ssh peer",
     "accepts none of the algorithms that are offered; allow more of them in its sshd_config"),
    (LOGIN_REFUSED,
     "has a login shell that refuses logins; chsh -s /bin/bash there"),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What a host answered.

    Attributes:
        output: what the script printed, as text; None if it did not run.
        problem: why it did not run, as a predicate with its cure; None if it ran.
    """

    output: str | None
    problem: str | None = None


def by_openssh(host: Host, script: str, *, seconds: float) -> Answer:
    """Run a script by `ssh`, for at most `seconds`."""
    if shutil.which("ssh") is None:
        return Answer(None, "cannot be reached, since this host has no ssh; install openssh-client")
    try:
        done = subprocess.run(
            ssh.command(host.destination, SHELL),
            input=script.encode(errors="surrogateescape"),
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, _too_slow(seconds))
    output, trouble = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode == ssh.FAILED:
        return Answer(None, explained(trouble, host))
    if done.returncode and not output.strip():
        return Answer(None, explained(trouble or f"exit code {done.returncode}", host))
    return _allowed(output, host)


def _allowed(output: str, host: Host) -> Answer:
    """The output, unless it is that of a login shell that runs nothing."""
    refused = re.search(LOGIN_REFUSED, output, re.IGNORECASE)
    return Answer(None, explained(refused[0], host)) if refused and len(output) < MAX_REFUSAL else Answer(output)


def _too_slow(seconds: float) -> str:
    return (
        f"was reached, but did not report within {seconds:g} s; check there for a file system that hangs (df), and "
        "what its login shell runs"
    )


def by_srun(host: Host, script: str, *, seconds: float) -> Answer:
    """Run a script by `srun` on a node of the present Slurm job, for at most `seconds`."""
    options = [f"--nodelist={host.name}", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--export=ALL"]
    # Beside a step that an interrupted command has left.
    options += ["--overlap", "--mpi=none", "--job-name=doctor"]
    variables = {name: value for name, value in os.environ.items() if not SIZES_OF_A_STEP.fullmatch(name)}
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            ["srun", *options, *SHELL.split()],
            env=variables,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, f"cannot be asked, since srun does not run here ({error.strerror}); mend Slurm's commands")
    limit = ""
    try:
        output, trouble = process.communicate(script.encode(errors="surrogateescape"), timeout=seconds)
    except subprocess.TimeoutExpired:
        limit = f" within {seconds:g} s"
        # Unlike SIGKILL, it ends the step too.
        process.terminate()
        try:
            output, trouble = process.communicate(timeout=SRUN_END_SECONDS)
        except subprocess.TimeoutExpired:
            # With what it has started, which has its pipes too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, trouble = process.communicate()
    if output.strip():
        return Answer(output.decode(errors="replace"))
    cause = _last_line(trouble.decode(errors="replace"))
    return Answer(None, f"runs nothing by srun{limit} ({cause}); look at sinfo, and at the log of slurmd there")


def by_here(script: str, *, seconds: float) -> Answer:
    """Run a script on this host, without ssh."""
    try:
        done = subprocess.run(
            ["sh", "-s"], input=script.encode(errors="surrogateescape"), capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Answer(None, _too_slow(seconds))
    output = done.stdout.decode(errors="replace")
    return Answer(output) if output.strip() else Answer(None, _last_line(done.stderr.decode(errors="replace")))


def prepare_fabric() -> str | None:
    """Import fabric, silently. Returns why it cannot be used, or None. Call it before threads use `by_fabric`."""
    with warnings.catch_warnings():
        # cryptography warns of old ciphers that paramiko lists.
        warnings.simplefilter("ignore")
        try:
            import fabric  # noqa: F401
        except ImportError as error:
            return f"fabric, with which colossalai run starts its processes, cannot be imported ({error})"
    # Without handlers of its own, paramiko's log would appear on stderr with tracebacks.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)
    return None


def by_fabric(host: Host, script: str, *, seconds: float) -> Answer:
    """Run a script by fabric, as `colossalai run` reaches the host, for at most `seconds`."""
    import fabric

    limits = {"banner_timeout": ssh.CONNECT_SECONDS, "auth_timeout": ssh.CONNECT_SECONDS}
    connection: Any = None
    try:
        connection = fabric.Connection(
            host.name, user=host.user, port=host.port, connect_timeout=ssh.CONNECT_SECONDS, connect_kwargs=limits
        )
        connection.open()
        stdin, stdout, _ = connection.client.exec_command(SHELL, timeout=seconds)
        stdin.write(script.encode(errors="surrogateescape"))
        stdin.channel.shutdown_write()
        output = stdout.read().decode(errors="replace")
    except TimeoutError:
        return Answer(None, explained("timed out", host))
    # paramiko raises errors of many kinds, and none of them may end the doctor.
    except Exception as error:
        return Answer(None, explained(f"{type(error).__name__}: {error}", host))
    finally:
        if connection is not None:
            connection.close()
    return _allowed(output, host)


def explained(trouble: str, host: Host) -> str:
    """What an error message of ssh or paramiko means, as a predicate of the host, with the message and the cure."""
    for pattern, meaning in REASONS:
        if re.search(pattern, trouble, re.IGNORECASE):
            verb_phrase, _, cure = meaning.format(login=shlex.quote(host.destination)).partition("; ")
            return f"{verb_phrase} ({_last_line(trouble)}); {cure}"
    return f"cannot be reached ({_last_line(trouble)}); try ssh {shlex.quote(host.destination)} by hand"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no message"
