"""Ctrl-C while a command starts: no traceback, exit code 130.

A KeyboardInterrupt inside an import leaves libraries half loaded, and some of them swallow it. Nothing is written at
that time, so the process exits at once. Once a command is running, `errors.one_line_errors` takes over, so that
`finally` and `with` can remove half-written output.
"""

# The module `signal` imports enum, during which Ctrl-C would still raise. This one is built in.
import _signal as signal
import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))
# The commands beside the package, where other programs may be too.
SCRIPTS = (
    "inference_example.py",
    "init_model.py",
    "init_tokenizer.py",
    "prepare_pretrain_dataset.py",
    "prepare_sft_dataset.py",
    "train.py",
    "train_sft.py",
)
EXIT_CODE = 130


def watch_start() -> None:
    """Make Ctrl-C exit at once if this process is one of our commands; other programs that import us are unaffected."""
    if _is_free() and _is_our_command():
        _set(_leave)


def raise_from_now() -> bool:
    """Make Ctrl-C raise KeyboardInterrupt again; returns whether `watch_start` had changed that."""
    return signal.getsignal(signal.SIGINT) is _leave and _set(signal.default_int_handler)


def watch_end() -> None:
    """The same as `watch_start`, while Python shuts down; for a process that called `watch_start`."""
    from contextlib import suppress

    if _is_free():
        # `_leave` would lose buffered output.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        _set(_leave)


def _is_free() -> bool:
    """Whether Ctrl-C has Python's default effect, which `nohup` and a shell's "&" change."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _set(handler) -> bool:
    """Set the handler; returns False outside of the main thread, where Python does not allow it."""
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:
        return False
    return True


def _is_our_command() -> bool:
    words = sys.orig_argv
    # Started by multiprocessing: its parent ends it.
    if "-c" in words:
        return False
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1].partition(".")[0] == os.path.basename(PACKAGE)
    folder, name = os.path.split(os.path.realpath(sys.argv[0])) if sys.argv and sys.argv[0] else ("", "")
    return (folder == os.path.dirname(PACKAGE) and name in SCRIPTS) or (folder + os.sep).startswith(PACKAGE + os.sep)


def _command() -> str:
    words = sys.orig_argv
    return f"python -m {words[words.index('-m') + 1]}" if "-m" in words[:-1] else os.path.basename(sys.argv[0])


def _leave(number, frame) -> None:
    try:
        # In a launched job, one process per host reports it.
        if "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{_command()}: error: interrupted\n".encode(errors="replace"))
    finally:
        os._exit(EXIT_CODE)
