"""What the lock file of a run's folder contains: the process that holds it, and signs that it still runs.

Earlier versions wrote only `host`, `pid`, `since` and `ending`. The file may come from elsewhere, so its content is
only a reason to wait, to refuse, or to take the lock over.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# All records have this length, so that one write replaces the whole of another.
RECORD_BYTES = 1024
# The longest text of a record that is read, in characters.
MAX_TEXT, MAX_JOB = 300, 200
# Run ids of torchrun that are not chosen for one job.
COMMON_RUN_IDS = ("", "none", "colossalai-default-job")


@dataclass(frozen=True)
class LockRecord:
    """A process that holds the lock of a folder.

    Attributes:
        since: local time at which it took the lock.
        ending: it saves and then ends.
        token: identifies this holder; None in the record of an earlier version.
        beat: grows every few seconds while the process runs.
        kernel: identifies the running kernel, which containers and network namespaces of one machine share; None if
            unknown. `processes` identifies the namespace in which `pid` is a process.
        file_system: the type of the folder's file system on its host.
        reach: "hosts" if flock was seen to lock out another host, "host" if another host could lock too, else
            "untested".
        job: the ids of its job; None if it belongs to none. `attempt` counts how often the job was restarted.
    """

    host: str
    pid: int
    since: str
    ending: bool = False
    token: str | None = None
    beat: int = 0
    kernel: str | None = None
    processes: str | None = None
    file_system: str | None = None
    reach: str = "untested"
    job: str | None = None
    attempt: tuple[int, ...] = ()

    def as_bytes(self) -> bytes:
        """The content of the lock file."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_BYTES)

    @property
    def is_on_this_host(self) -> bool:
        """Whether the process runs, or ran, under the same kernel; only the host's name decides for old records."""
        if self.kernel is None or kernel_id() is None:
            return self.host == socket.gethostname()
        return self.kernel == kernel_id()

    def is_restarted_by(self, other: "LockRecord") -> bool:
        """Whether `other` is a later attempt of the same job, which the launcher starts when this one has ended."""
        return self.job is not None and self.job == other.job and self.attempt < other.attempt

    def named(self) -> str:
        """The process, as messages name it."""
        return f"process {self.pid} on {self.host} since {self.since}"


def own_record(file_system: str | None) -> LockRecord:
    """The record of this process."""
    job, attempt = _job_of(os.environ)
    return LockRecord(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=secrets.token_hex(8),
        kernel=kernel_id(),
        processes=process_namespace(),
        file_system=file_system,
        job=job,
        attempt=attempt,
    )


def read_record(descriptor: int) -> LockRecord | None:
    """The record in an open lock file; None if it has none, or one that cannot be understood."""
    try:
        content = json.loads(os.pread(descriptor, RECORD_BYTES, 0))
        place = _text(content["host"]), int(content["pid"]), _text(content["since"]), content.get("ending") is True
        return LockRecord(*place) if content.get("token") is None else LockRecord(*place, **_signs(content))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _signs(content: dict[str, Any]) -> dict[str, Any]:
    """The fields that earlier versions did not write."""
    attempt = content["attempt"]
    if not isinstance(attempt, list) or not all(type(number) is int for number in attempt):
        raise TypeError("attempt is not a list of numbers")
    optional = ("kernel", "processes", "file_system", "job")
    return {
        "token": _text(content["token"]),
        "beat": int(content["beat"]),
        "reach": _text(content["reach"]),
        "attempt": tuple(attempt),
        **{name: None if content[name] is None else _text(content[name]) for name in optional},
    }


def _text(value: Any) -> str:
    return str(value)[:MAX_TEXT]


def kernel_id() -> str | None:
    """A random id that the kernel chose when it started; None where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def process_namespace() -> str | None:
    """The namespace of this process's process IDs; None where there are no namespaces."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _job_of(environment: Any) -> tuple[str | None, tuple[int, ...]]:
    """The ids of the job that the launcher set, and how often it was restarted."""
    slurm, run_id = environment.get("SLURM_JOB_ID", ""), environment.get("TORCHELASTIC_RUN_ID", "")
    ids = [f"slurm {slurm}"] if slurm else []
    ids += [] if run_id in COMMON_RUN_IDS else [f"torchrun {run_id}"]
    counts = [environment.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    return ", ".join(ids)[:MAX_JOB] or None, _numbers(counts)


def _numbers(texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(text) if text.isdecimal() and len(text) < 10 else 0 for text in texts)
