"""Ask one client, in the environment that has it: python -m tests.clients.worker MODULE FUNCTION JOB FOLDER."""

import importlib
import sys
from pathlib import Path

from tests.clients.exchange import Job


def main() -> None:
    """Write what the client finds to the folder."""
    module, function, job, folder = sys.argv[1:]
    ask = getattr(importlib.import_module(f"tests.clients.{module}"), function)
    ask(Job.read(Path(job)), Path(folder)).write(Path(folder))


if __name__ == "__main__":
    main()
