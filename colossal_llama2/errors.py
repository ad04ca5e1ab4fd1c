"""How a command ends when something is wrong: one line on stderr and a documented exit code.

    2    a mistake in what the user gave (`UserError`, and argparse's own errors)
    1    a fault at run time, such as a full disk (`RunError`, `OSError`)
    130  interrupted with Ctrl+C

Anything else is a bug of ours and keeps its traceback.
"""

import os
import sys
from contextlib import contextmanager
from typing import Iterator


class UserError(Exception):
    """A mistake in a flag, a file or a folder. The message says what was given, what is allowed and what cures it."""


class RunError(Exception):
    """A fault at run time that no flag caused. The message says what failed and what is left intact."""


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn the errors above into one line, prefixed with the command's name, and an exit code.

    Under a launcher only the first process of each host prints, since all of them read the same flags.
    """
    try:
        yield
    except UserError as error:
        _end(command, str(error), code=2)
    except RunError as error:
        _end(command, str(error), code=1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(command, f"{where}{error.strerror or error}", code=1)
    except KeyboardInterrupt:
        _end(command, "interrupted", code=130)


def _end(command: str, message: str, *, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{command}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A normal exit would wait for peers that wait for this rank in a collective; the launcher ends them instead.
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)
