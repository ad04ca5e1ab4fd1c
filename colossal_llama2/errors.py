"""How a command ends when something is wrong: one line on stderr and a documented exit code.

    2    invalid input (`UserError`, argparse's own errors, and a file or folder that this user may not read or write)
    1    a fault at run time, such as a full disk (`RunError`, `OSError`)
    130  interrupted with Ctrl+C
    143  terminated (SIGTERM)
    0    ended early on request, with everything saved (SIGUSR1)

Any other exception is a bug and keeps its traceback.

With COLOSSAL_LLAMA2_DEBUG=1 in the environment, the traceback of an error is printed before its line, on every rank of
a launched job, including ranks that print no line: each may have failed in a different place.
"""

import enum
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from colossal_llama2 import interrupts
from colossal_llama2.launcher import place, report_to_torchrun, wait_for_first_of_host
from colossal_llama2.terminal_text import one_line, printable, show, show_line

DEBUG = "COLOSSAL_LLAMA2_DEBUG"
REDELIVERY_SECONDS = 0.01
PERMISSION_CURE = "; correct its permissions (chmod, chown), or run as a user who has them"


class UserError(Exception):
    """Invalid input: a flag, a file or a folder. The message has the value, what is accepted, and the fix."""


class LaunchError(UserError):
    """The ranks cannot connect. Every process reports it, since each has its own environment."""


class RunError(Exception):
    """A fault at run time that no flag caused. The message has what failed and what is left intact."""


class RankError(RunError):
    """A fault that this rank reports, whatever its number, since the others may not have noticed it."""


class Stopped(BaseException):
    """A signal ended the run in an orderly way. Not an Exception, so that `except Exception` does not catch it."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 0 if number == signal.SIGUSR1 else 128 + number


class Reporters(enum.Enum):
    """Which processes of a launched job report its error: one per host, each, or each once the ranks are connected."""

    ONE_A_HOST = enum.auto()
    EACH = enum.auto()
    EACH_IF_CONNECTED = enum.auto()


def reason(error: Exception) -> str:
    """The message of an error; for one of the operating system "FILE: REASON", without Python's "[Errno 13]"."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn the errors above into one line, prefixed with the command's name, and an exit code.

    All processes of a launched job find the same mistakes in the same flags and data, so only the first of each host
    reports them. A fault of one process, such as a full disk, is reported by that process, with its rank.
    """
    if not _is_launched() and threading.current_thread() is threading.main_thread():
        # An exception lets `finally` and `with` remove half-written output. A launcher has rules of its own.
        signal.signal(signal.SIGTERM, _raise_terminated)
    sys.excepthook, sys.unraisablehook = _print_traceback, _deliver_again
    watches_ends = interrupts.raise_from_now()
    try:
        yield
    except UserError as error:
        reported_by = Reporters.EACH if isinstance(error, LaunchError) else Reporters.ONE_A_HOST
        _end(command, str(error), code=2, reported_by=reported_by)
    except RunError as error:
        reported_by = Reporters.EACH_IF_CONNECTED if isinstance(error, RankError) else Reporters.ONE_A_HOST
        _end(command, str(error), code=1, reported_by=reported_by)
    except Stopped as stopped:
        _end(command, str(stopped), code=stopped.exit_code, kind="stopped")
    except OSError as error:
        # What this user may not read or write is found before there is a process group, and a mistake like any other.
        # Afterwards it is a fault of a host or of its file system.
        is_mistake = error.errno == errno.EACCES and error.filename is not None and not _has_process_group()
        cure, code = (PERMISSION_CURE, 2) if is_mistake else ("", 1)
        _end(command, reason(error) + cure, code=code, reported_by=Reporters.EACH_IF_CONNECTED)
    except KeyboardInterrupt:
        _end(command, "interrupted", code=130)
    except _Terminated:
        _end(command, "terminated", code=143)
    except Exception as error:
        if not _ranks_are_connected():
            raise
        # A normal exit would wait for peers, which wait for this rank in a collective.
        _print_traceback(type(error), error, error.__traceback__)
        _leave(1)
    finally:
        if watches_ends:
            interrupts.watch_end()


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print Python's traceback, escaped: its last lines may quote files that others wrote."""
    text = "".join(traceback.format_exception(kind, error, trace)).rstrip("\n")
    report_to_torchrun(f"{kind.__name__}: {printable(str(error))}", printable(text))
    show(text, file=sys.stderr)


def _deliver_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Raise a signal's exception again if its handler ran inside a `__del__`, where Python prints and drops it."""
    number = {KeyboardInterrupt: signal.SIGINT, _Terminated: signal.SIGTERM}.get(unraisable.exc_type)
    if number is not None:
        # Not from here, because exceptions of this function are dropped too. A signal also interrupts a system call.
        thread = threading.main_thread().ident
        timer = threading.Timer(REDELIVERY_SECONDS, signal.pthread_kill, (thread, number))
        timer.daemon = True
        timer.start()
    # A thread of StopSignals ends a process that has not raised Stopped.
    elif not issubclass(unraisable.exc_type, Stopped):
        sys.__unraisablehook__(unraisable)


def _show_traceback_if_asked() -> None:
    """With COLOSSAL_LLAMA2_DEBUG=1, print the traceback of the error being handled."""
    if os.environ.get(DEBUG) == "1":
        with suppress(OSError):
            heading = f"rank {place().rank}: " if _is_launched() else ""
            show(heading + traceback.format_exc().rstrip("\n"), file=sys.stderr)


class _Terminated(BaseException):
    """SIGTERM, as an exception that `except Exception` does not catch."""


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _is_launched() -> bool:
    return place().world_size > 1


def _ranks_are_connected() -> bool:
    return _is_launched() and _has_process_group()


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _end(
    command: str, message: str, *, code: int, reported_by: Reporters = Reporters.ONE_A_HOST, kind: str = "error"
) -> NoReturn:
    text = one_line(message).strip()
    if kind == "error":
        _show_traceback_if_asked()
    if code:
        report_to_torchrun(f"{command}: {kind}: {text}")
    each_reports = {Reporters.EACH: _is_launched(), Reporters.EACH_IF_CONNECTED: _ranks_are_connected()}
    # The reader of stderr may be gone.
    with suppress(OSError):
        if code == 2 and not each_reports.get(reported_by, False):
            wait_for_first_of_host()
        if each_reports.get(reported_by, False):
            show_line(f"{command}: error: rank {place().rank}: {text}", file=sys.stderr)
        elif place().local_rank == 0:
            show_line(f"{command}: {kind}: {text}", file=sys.stderr)
    if _is_launched():
        _leave(code)
    raise SystemExit(code)


def _leave(code: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
