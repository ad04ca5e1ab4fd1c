"""Report every file that this process unpickles, with pickle or torch, except those that libraries include."""

import os
import pickle
import sys
from typing import Any

REPORT_VARIABLE = "FAULTS_UNPICKLED_REPORT"
OWN_FOLDERS = tuple({os.path.realpath(place) for place in (sys.prefix, sys.base_prefix)})


def install(report: str) -> None:
    """Wrap pickle's functions for files, torch's if torch is imported, and watch the files that torch.load opens later.

    Args:
        report: gets a line per file.
    """

    def log_use(way: str, file: Any) -> None:
        name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", None)
        if isinstance(name, (str, os.PathLike)) and not os.path.realpath(name).startswith(OWN_FOLDERS):
            with open(report, "a") as lines:
                lines.write(f"{way} {os.fspath(name)}\n")

    def wrapped(way: str, function):
        def logging_use(file, *args, **kwargs):
            log_use(way, file)
            return function(file, *args, **kwargs)

        return logging_use

    class LoggingUnpickler(pickle.Unpickler):
        def __init__(self, file, *args, **kwargs):
            log_use("pickle.Unpickler", file)
            super().__init__(file, *args, **kwargs)

    pickle.load, pickle.Unpickler = wrapped("pickle.load", pickle.load), LoggingUnpickler
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.load, torch.jit.load = wrapped("torch.load", torch.load), wrapped("torch.jit.load", torch.jit.load)
        return

    def watch(event: str, arguments: tuple) -> None:
        is_file = event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[0] != report
        if is_file and _is_in_torch_load(sys._getframe()):
            log_use("torch.load", os.fsdecode(arguments[0]))

    sys.addaudithook(watch)


def _is_in_torch_load(frame) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "load" and frame.f_code.co_filename.endswith("torch/serialization.py"):
            return True
        frame = frame.f_back
    return False
