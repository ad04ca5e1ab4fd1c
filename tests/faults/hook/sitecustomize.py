"""Python imports this at its start if this folder is in PYTHONPATH: unpickled files are then reported."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

from tests.faults import network, unpickling  # noqa: E402

unpickling.install(os.environ[unpickling.REPORT_VARIABLE])
network.install(os.environ[unpickling.REPORT_VARIABLE])
