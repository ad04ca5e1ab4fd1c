"""How commands end: the documented exit codes, and one line, printed once per host."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama2 import errors, interrupts, launcher
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import RunError, UserError, one_line_errors
from colossal_llama2.launcher import Place
from tests import fork_server
from tests.launching import free_port

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


# A signal that comes while Python runs a `__del__`, whose exceptions it prints and drops.
SIGNAL_IN_FINALIZER = """
import contextlib, signal, time
from colossal_llama2.errors import one_line_errors

class Finalized:
    def __del__(self):
        signal.raise_signal({number})

with one_line_errors("tool.py"), contextlib.ExitStack() as stack:
    watch = stack.enter_context
    {before}
    stack.callback(print, "cleaned up")
    Finalized()
    time.sleep(30)
    print("ran on")
"""


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """Not launched, whatever ran before."""
    monkeypatch.setattr(launcher, "_settled", None)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("no folder x; give one"), 2, "tool.py: error: no folder x; give one"),
        (UserError("two\n  lines"), 2, "tool.py: error: two lines"),
        (RunError("rank 1 was lost"), 1, "tool.py: error: rank 1 was lost"),
        (OSError(errno.ENOSPC, "No space left", "out/f"), 1, "tool.py: error: out/f: No space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "in/f"),
            2,
            f"tool.py: error: in/f: Permission denied{errors.PERMISSION_CURE}",
        ),
        (PermissionError(errno.EPERM, "Not permitted", "in/f"), 1, "tool.py: error: in/f: Not permitted"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "tool.py: error: Permission denied"),
        (OSError("the pipe broke"), 1, "tool.py: error: the pipe broke"),
        (KeyboardInterrupt(), 130, "tool.py: error: interrupted"),
    ],
)
def test_an_error_becomes_one_line_and_its_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors("tool.py"):
        raise error
    captured = capsys.readouterr()
    assert end.value.code == code
    assert captured.out == ""
    assert captured.err == line + "\n"


def test_an_error_of_the_operating_system_reads_the_same_from_any_rank(monkeypatch):
    monkeypatch.setattr(collectives, "gather_values", lambda value: [value])
    with pytest.raises(RunError, match="^out/f: No space left$"), collectives.all_or_none():
        raise OSError(errno.ENOSPC, "No space left", "out/f")


@pytest.mark.parametrize("error", [UserError("given \x1b[2J"), RunError("lost"), OSError(errno.EIO, "I/O error", "f")])
@pytest.mark.parametrize("value, is_shown", [("1", True), ("0", False), ("", False)])
def test_on_request_the_traceback_precedes_the_line(error, value, is_shown, capsys, monkeypatch):
    monkeypatch.setenv("COLOSSAL_LLAMA2_DEBUG", value)
    with pytest.raises(SystemExit), one_line_errors("tool.py"):
        try:
            raise KeyError("what lies behind")
        except KeyError:
            raise error
    *trace, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tool.py: error: ")
    assert bool(trace) == is_shown
    if is_shown:
        assert trace[0] == "Traceback (most recent call last):"
        assert any("KeyError: 'what lies behind'" in text for text in trace)
        assert any(f"{type(error).__name__}: " in text for text in trace)
        assert not any("\x1b" in text for text in trace)


@pytest.mark.slow
def test_on_request_each_process_below_torchrun_shows_its_traceback(tmp_path):
    """Also in a process that leaves the line to the first of its host."""
    program = tmp_path / "tool.py"
    program.write_text(
        "import pathlib, sys, time\n"
        "from colossal_llama2 import launcher\n"
        "from colossal_llama2.errors import UserError, one_line_errors\n"
        "failing = pathlib.Path(sys.argv[0] + '.failing')\n"
        "if launcher.settle().rank == 1:\n"
        "    failing.touch()\n"
        # torchrun ends rank 1 as soon as rank 0 has ended.
        "while not failing.exists():\n"
        "    time.sleep(0.05)\n"
        "time.sleep(2 * (launcher.place().rank == 0))\n"
        "with one_line_errors('tool.py'):\n"
        "    raise UserError('no folder x')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLOSSAL_LLAMA2_DEBUG": "1"}
    process = subprocess.run([*command, str(program)], env=environment, capture_output=True, text=True, timeout=120)
    lines = process.stderr.splitlines()
    assert lines.count("tool.py: error: no folder x") == 1
    for rank in (0, 1):
        assert f"rank {rank}: Traceback (most recent call last):" in lines


def test_success_prints_nothing(capsys):
    with one_line_errors("tool.py"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("ours"), AssertionError("ours")])
def test_a_bug_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)), one_line_errors("tool.py"):
        raise error
    assert capsys.readouterr().err == ""


def test_an_exit_keeps_its_own_code():
    with pytest.raises(SystemExit) as end, one_line_errors("tool.py"):
        raise SystemExit(7)
    assert end.value.code == 7


def test_one_process_of_a_host_prints(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_settled", Place(rank=1, local_rank=1))
    with pytest.raises(SystemExit) as end, one_line_errors("tool.py"):
        raise UserError("already reported by rank 0")
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code, expected",
    [
        ("UserError('shared')", 2, ""),
        ("LaunchError('its own environment')", 2, "tool.py: error: rank 1: its own environment"),
        ("OSError(28, 'No space left')", 1, "tool.py: error: rank 1: No space left"),
        ("PermissionError(13, 'not allowed', 'in/f')", 1, "tool.py: error: rank 1: in/f: not allowed"),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_once_ranks_are_connected_each_reports_its_own_error(error, code, expected, tmp_path):
    """A mistake in flags or data occurs on all ranks, a full disk on one; a bug must not leave the ranks waiting."""
    program = (
        "import os, torch.distributed as dist\n"
        "from colossal_llama2 import launcher\n"
        "from colossal_llama2.errors import LaunchError, UserError, one_line_errors\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "os.environ.update(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1', MASTER_ADDR='localhost', MASTER_PORT='1')\n"
        "launcher.settle()\n"
        "with one_line_errors('tool.py'):\n"
        f"    raise {error}\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = fork_server.run([tmp_path / "program.py"])
    assert process.returncode == code
    assert process.stderr.strip().split("\n")[-1] == expected
    assert ("Traceback" in process.stderr) == ("ValueError" in error)


def test_sigterm_lets_output_be_removed(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from colossal_llama2.errors import one_line_errors\n"
        "from colossal_llama2.storage.files import temporary_folder\n"
        "with one_line_errors('tool.py'), temporary_folder(pathlib.Path(sys.argv[1]), 'out'):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (process.returncode, process.stderr) == (143, "tool.py: error: terminated\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number, code, line",
    [(signal.SIGTERM, 143, "tool.py: error: terminated"), (signal.SIGINT, 130, "tool.py: error: interrupted")],
)
def test_a_signal_during_a_finalizer_is_not_lost(number, code, line):
    process = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN_FINALIZER.format(before="", number=int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (process.returncode, process.stdout, process.stderr) == (code, "cleaned up\n", line + "\n")


def test_a_signal_to_a_starting_run_during_a_finalizer_is_not_lost():
    before = "from colossal_llama2.train.stepping.stopping import StopSignals; watch(StopSignals(has_partners=False))"
    process = subprocess.run(
        [sys.executable, "-c", SIGNAL_IN_FINALIZER.format(before=before, number=int(signal.SIGTERM))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    line = "-c: stopped: SIGTERM came before the first step; nothing was trained\n"
    assert (process.returncode, process.stderr) == (143, line)


@pytest.mark.parametrize("local_rank, expected", [("0", "tool.py: error: wrong\n"), ("1", "")])
def test_a_launched_process_does_not_wait_for_its_peers(local_rank, expected):
    """With peers the process ends at once: a normal exit would run handlers that may wait for them."""
    program = (
        "import atexit\n"
        "from colossal_llama2 import launcher\n"
        "from colossal_llama2.errors import UserError, one_line_errors\n"
        "launcher.settle()\n"
        "atexit.register(print, 'waited for the peers', flush=True)\n"
        "print('printed before')\n"
        "with one_line_errors('tool.py'):\n"
        "    raise UserError('wrong')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**ADDRESS, "RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (process.returncode, process.stdout, process.stderr) == (2, "printed before\n", expected)


def test_torchrun_is_given_our_line_for_its_report(monkeypatch, tmp_path, capsys):
    """The record as its own reader parses it: see torch.distributed.elastic.multiprocessing.errors.ProcessFailure."""
    monkeypatch.setattr(launcher, "_settled", Place(world_size=2, launcher="torchrun"))
    monkeypatch.setenv(launcher.ERROR_FILE, str(tmp_path / "error.json"))
    monkeypatch.setattr("colossal_llama2.errors._leave", lambda code: sys.exit(code))
    with pytest.raises(SystemExit), one_line_errors("train.py"):
        raise UserError("no folder x; give one")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    report = str(ChildFailedError("train.py", {0: failure})).splitlines()
    assert report[-2].endswith(f"traceback : {capsys.readouterr().err.strip()}")


@pytest.mark.parametrize("program", ["init_model.py", "-m colossal_llama2.dataset.inspect_data"])
def test_ctrl_c_while_a_command_starts_is_one_line(program, tmp_path):
    """The signal comes from inside an import, in which an exception would be printed with its traceback."""
    hook = (
        "import builtins, os, signal\n"
        "plain = builtins.__import__\n"
        "def importing(name, *rest, **named):\n"
        "    if name == 'colossal_llama2.terminal_text':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return plain(name, *rest, **named)\n"
        "builtins.__import__ = importing\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hook)
    process = subprocess.run(
        [sys.executable, *program.split()],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 130
    assert process.stderr == f"{'python ' if program.startswith('-m') else ''}{program}: error: interrupted\n"


def test_ctrl_c_is_left_alone_in_programs_of_others(tmp_path):
    """Even in a program beside the package: its `finally` must run."""
    assert set(interrupts.SCRIPTS) == {path.name for path in ROOT.glob("*.py")}
    (tmp_path / "colossal_llama2").symlink_to(ROOT / "colossal_llama2")
    program = tmp_path / "own.py"
    program.write_text("import signal\nimport colossal_llama2\nprint(signal.getsignal(signal.SIGINT).__name__)\n")
    names = {}
    for name in ("own.py", "train.py"):
        program = program.rename(tmp_path / name)
        # The package's folder is where its own file is, not where the link points.
        process = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=30)
        names[name] = process.stdout.strip()
    assert names == {"own.py": "default_int_handler", "train.py": "_leave"}
