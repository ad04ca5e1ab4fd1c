"""Ask one client, in the environment that has it: python -m tests.clients.worker CLIENT JOB FOLDER."""

import importlib
import sys
from pathlib import Path

from tests.clients.exchange import Job


def main() -> None:
    """Write what the client finds to the folder."""
    client, job, folder = sys.argv[1:]
    found = importlib.import_module(f"tests.clients.ask_{client}").ask(Job.read(Path(job)), Path(folder))
    found.write(Path(folder))


if __name__ == "__main__":
    main()
