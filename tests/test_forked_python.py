"""Processes that a forked command starts as sys.executable: they work like started ones, and end with their parent."""

import os
import time

import pytest

from tests import fork_server

pytestmark = pytest.mark.slow

START = """
import os, signal, subprocess, sys

def run(*words, **settings):
    done = subprocess.run([sys.executable, *words], text=True, capture_output=True, **settings)
    print(done.returncode, repr(done.stdout), repr(done.stderr))
"""


def printed(tmp_path, code: str) -> list[str]:
    done = fork_server.run(["-c", START + code], cwd=tmp_path, forks_children=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_words_streams_environment_and_exit_code_are_passed_on(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(__name__, sys.argv[1:], file=sys.stderr)")
    child = "import os, sys; print(sys.argv[1:], sys.stdin.read(), os.environ['WORD'], os.getcwd()); sys.exit(3)"
    code = f"""
run('-c', {child!r}, 'one', '--two', input='text', env={{**os.environ, 'WORD': 'b'}}, cwd='/')
run('-u', 'script.py', 'a b')
run('-m', 'script')
run('-c', 'import sys; sys.exit("a message")')
run('-c', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
"""
    first, *rest = printed(tmp_path, code)
    assert first == """3 "['one', '--two'] text b /\\n" ''"""
    assert rest == [
        '''0 '' "__main__ ['a b']\\n"''',
        "0 '' '__main__ []\\n'",
        "1 '' 'a message\\n'",
        "-9 '' ''",
    ]


def test_a_child_already_has_the_libraries_and_can_start_others(tmp_path):
    inner = "import sys; print('torch' in sys.modules, 'colossalai' in sys.modules)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert printed(tmp_path, f"run('-c', {outer!r})") == ["0 'True True\\n' ''"]


def test_a_child_is_killed_with_the_program_that_stands_for_it(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"""
started = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True)
print(started.stdout.readline(), end='')
started.kill()
print(started.wait())
"""
    pid, ended = map(int, printed(tmp_path, code))
    assert ended == -9
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_program_that_is_killed_at_once_does_no_harm(tmp_path):
    code = """
import shlex, socket
# The last word of the program's line before its own arguments.
address = shlex.split(open(sys.executable).read().splitlines()[1])[-2]
with socket.socket(socket.AF_UNIX) as silent:
    silent.connect(address)
run('-c', 'print(1)')
"""
    assert printed(tmp_path, code) == ["0 '1\\n' ''"]
