"""Kill a process at its k-th change of the files in a folder, or in the middle of a write.

The parent traces the system calls of the child's main thread (ptrace), from any library: Python's own writes, the
hard-linked and copied files, the temporary file and the rename of safetensors. Only on Linux on x86-64.
"""

import ctypes
import os
import platform
import signal
import struct
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tests.faults.warm import Job

TRACEME, GETREGS, SETREGS, SYSCALL, SETOPTIONS = 0, 12, 13, 24, 0x4200
MARK_SYSCALLS, SYSCALL_STOP = 1, signal.SIGTRAP | 0x80
AT_FDCWD = -100
FIELDS = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es"
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
WRITES_TO = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Registers(ctypes.Structure):
    """The registers of a stopped thread."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in f"{FIELDS} fs gs".split()]


class Call(NamedTuple):
    """A system call that changes files: which of its arguments are descriptors, paths, and the number of bytes."""

    name: str
    descriptor: int | None = None
    path: int | None = None
    folder: int | None = None
    count: int | None = None
    flags: int | None = None
    target: int | None = None


CALLS = {
    1: Call("write", descriptor=0, count=2),
    2: Call("open", path=0, flags=1),
    18: Call("write", descriptor=0, count=2),
    40: Call("write", descriptor=0, count=3),
    74: Call("fsync", descriptor=0),
    75: Call("fsync", descriptor=0),
    77: Call("truncate", descriptor=0),
    82: Call("rename", path=0, target=1),
    83: Call("mkdir", path=0),
    84: Call("rmdir", path=0),
    86: Call("link", path=1),
    87: Call("unlink", path=0),
    90: Call("chmod", path=0),
    257: Call("open", folder=0, path=1, flags=2),
    258: Call("mkdir", folder=0, path=1),
    263: Call("unlink", folder=0, path=1),
    264: Call("rename", folder=0, path=1, target=3),
    265: Call("link", folder=2, path=3),
    268: Call("chmod", folder=0, path=1),
    316: Call("rename", folder=0, path=1, target=3),
    326: Call("write", descriptor=2, count=4),
}
# vectors of buffers, which are not cut
CALLS[20] = CALLS[296] = Call("write", descriptor=0)


class Operation(NamedTuple):
    """One change: its kind, its file (relative to the folder), and for a rename the new name."""

    kind: str
    path: str
    target: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (f" -> {self.target}" if self.target else "")


@dataclass
class Trace:
    """What a process did. `code` is its exit code, 137 if it was killed as planned."""

    operations: list[Operation] = field(default_factory=list)
    code: int = 0
    was_torn: bool = False


def can_trace() -> str | None:
    """None, or the reason why no process can be traced here."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"tracing is for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _libc().ptrace(TRACEME, 0, None, None) == 0 else 1)
    return None if os.waitpid(pid, 0)[1] == 0 else "this system lets no process trace another (ptrace)"


def begin() -> None:
    """Called in the child's main thread: from then on the parent traces it."""
    assert _libc().ptrace(TRACEME, 0, None, None) == 0
    # To this thread, for another one could take a signal to the process.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def watch(job: Job, folder: Path, *, crash_at: int | None = None, torn: bool = False) -> Trace:
    """Follow a job of one process, which calls `begin`, to its end.

    Args:
        folder: changes below it are counted.
        crash_at: kill the process instead of its change of that number, counted from 1.
        torn: do half of the write of that number first, or of the first write after it.
    """
    trace, pid, root = Trace(), job.pids[0], os.fspath(folder.resolve())
    libc, passed_on, enters, is_ready = _libc(), 0, True, False
    while True:
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status)
            trace.code = code if code >= 0 else 128 - code
            job.record_end(trace.code)
            return trace
        stopped_by = os.WSTOPSIG(status)
        passed_on = 0
        if not is_ready and stopped_by == signal.SIGSTOP:
            libc.ptrace(SETOPTIONS, pid, None, ctypes.c_void_p(MARK_SYSCALLS))
            is_ready = True
        elif stopped_by != SYSCALL_STOP:
            passed_on = stopped_by
        else:
            if enters:
                _count(trace, pid, root, crash_at, torn)
            elif trace.was_torn:
                os.kill(pid, signal.SIGKILL)
            enters = not enters
        libc.ptrace(SYSCALL, pid, None, ctypes.c_void_p(passed_on))


def _count(trace: Trace, pid: int, root: str, crash_at: int | None, torn: bool) -> None:
    registers = Registers()
    _libc().ptrace(GETREGS, pid, None, ctypes.byref(registers))
    call = CALLS.get(registers.orig_rax)
    operation = _operation(call, pid, registers, root) if call else None
    if operation is None:
        return
    trace.operations.append(operation)
    if crash_at is None or len(trace.operations) < crash_at:
        return
    if not torn:
        os.kill(pid, signal.SIGKILL)
    elif call.count is not None:
        _halve(pid, call, registers)
        trace.was_torn = True


def _halve(pid: int, call: Call, registers: Registers) -> None:
    count = getattr(registers, ARGUMENTS[call.count])
    if count > 2**24:
        # The length in the call is a maximum; the size of the source decides how much is copied.
        source = {40: "rsi", 326: "rdi"}[registers.orig_rax]
        count = os.stat(f"/proc/{pid}/fd/{getattr(registers, source)}").st_size
    setattr(registers, ARGUMENTS[call.count], count // 2)
    _libc().ptrace(SETREGS, pid, None, ctypes.byref(registers))


def _operation(call: Call, pid: int, registers: Registers, root: str) -> Operation | None:
    """The change that a call makes; None if it makes none below `root`."""
    values = [getattr(registers, name) for name in ARGUMENTS]
    if call.flags is not None and not values[call.flags] & WRITES_TO:
        return None
    if call.descriptor is not None:
        path = _link(f"/proc/{pid}/fd/{values[call.descriptor]}")
    else:
        path = _path(pid, values, call.folder, call.path)
    if path is None or not (path == root or path.startswith(root + "/")):
        return None
    target = None
    if call.target is not None:
        folder = None if call.folder is None else call.target - 1
        target = os.path.relpath(_path(pid, values, folder, call.target), root)
    return Operation(call.name, os.path.relpath(path, root), target)


def _path(pid: int, values: list[int], folder: int | None, path: int) -> str:
    text = _string(pid, values[path])
    number = AT_FDCWD if folder is None else struct.unpack("i", struct.pack("I", values[folder] & 0xFFFFFFFF))[0]
    base = _link(f"/proc/{pid}/cwd") if number == AT_FDCWD else _link(f"/proc/{pid}/fd/{number}")
    return os.path.normpath(os.path.join(base or "/", text))


def _string(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        content = b""
        while b"\0" not in content:
            # Never beyond the end of a page, since there may be no next one.
            place = address + len(content)
            memory.seek(place)
            content += memory.read(4096 - place % 4096)
    return os.fsdecode(content.split(b"\0")[0])


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


@lru_cache
def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return libc
