"""Training without drawing: a picture takes a seventh of the time of a small run, and most tests do not look at it.

test_charts.py and test_reporting.py test the drawing; commands of the README, test_stopping.py and test_console.py
draw in real runs.
"""

import contextlib
from unittest import mock

# The start of a PNG.
PLACEHOLDER = b"\x89PNG\r\n\x1a\n"


def undrawn() -> contextlib.AbstractContextManager:
    """Within it, a run writes PLACEHOLDER as its loss.png."""
    from colossal_llama2.train.report import loss_plot

    return mock.patch.object(loss_plot, "draw", lambda curves, *, title: PLACEHOLDER)
