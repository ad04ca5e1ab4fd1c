"""Text of unknown origin cannot control the terminal: hostile strings through every route by which text is printed."""

import ast
import contextlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from colossal_llama2 import errors, logs
from colossal_llama2.cli import inference_flags, train_flags
from colossal_llama2.errors import UserError
from colossal_llama2.inference import loading, run
from colossal_llama2.inference.settings import InferenceSettings
from colossal_llama2.terminal_text import one_line, printable, show, show_line
from tests.test_import_rules import PACKAGE, tree_of

ROOT = Path(__file__).resolve().parents[1]
# Text, and how it is shown where line feeds and tabs may stay.
HOSTILE = {
    "\x1b[31mred\x1b[0m": "␛[31mred␛[0m",
    "\x1b]0;new title\x07": "␛]0;new title␇",
    "\x1bP+q544e\x1b\\": "␛P+q544e␛\\",
    "\x9b2J": "<U+009B>2J",
    "\x85next line": "<U+0085>next line",
    "good\rbad": "good␍bad",
    "secret\b\b\b\b\b\bpublic": "secret␈␈␈␈␈␈public",
    "nul\x00 form\x0c shift\x0e": "nul␀ form␌ shift␎",
    "delete\x7f": "delete␡",
    "\u202egpj.exe": "<U+202E>gpj.exe",
    "a\u2066b\u2069c": "a<U+2066>b<U+2069>c",
    "two\u2028three\u2029": "two<U+2028>three<U+2029>",
    "\ufeffname": "<U+FEFF>name",
    "half \ud83d of a pair, not UTF-8 \udcff": "half <U+D83D> of a pair, not UTF-8 <U+DCFF>",
}
ORDINARY = (
    "a  b",
    "明月松间照，清泉石上流。",
    "naïve cafe\u0301",
    "👩\u200d👩\u200d👧 👍🏽",
    "می\u200cخواهم",
    "क्\u200dष",
    "שלום\u200f!",
    "ภาษา\u200bไทย",
    "🏴\U000e0067\U000e0062\U000e007f",
    "so\u00adft <s> ␛ \\x1b",
)
EVERY_HOSTILE = pytest.mark.parametrize("text", HOSTILE)


@EVERY_HOSTILE
def test_control_characters_are_escaped(text):
    assert printable(text) == one_line(text) == HOSTILE[text] == printable(HOSTILE[text])
    printable(text).encode()


def test_every_control_is_shown_and_ordinary_text_is_left_alone():
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        assert (printable(chr(code)) == chr(code)) is (chr(code) in "\n\t"), hex(code)
        assert not set(one_line(f"a{chr(code)}b")) & set(map(chr, (*range(0x20), *range(0x7F, 0xA0)))), hex(code)
    for text in ORDINARY:
        assert printable(text) == one_line(text) == text
    assert printable("a\n\tb\r\nc") == "a\n\tb␍\nc"
    assert one_line("\na \n\n  b\r\nc\td\n") == "a b c␉d"


def raise_user_error(text: str) -> None:
    with errors.one_line_errors("tool.py"):
        raise UserError(text)


def raise_os_error(text: str) -> None:
    with errors.one_line_errors("tool.py"):
        raise OSError(28, "No space left", text)


def raise_as_one_rank(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        patch.setattr(errors, "_ranks_are_connected", lambda: True)
        raise_os_error(text)


def mistake_in_a_flag(text: str) -> None:
    train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d", "--lr", text])


def unknown_flag(text: str) -> None:
    train_flags.train_parser().parse_args([f"--{text.replace(' ', '')}"])


def log_a_line(text: str) -> None:
    logs.configure_logging()
    logs.get_logger().warning("a folder is called %s", text)


def log_a_message(text: str) -> None:
    logs.configure_logging()
    logs.get_logger().info(f"a folder is called {text}")


def log_progress(text: str) -> None:
    logs.configure_logging()
    with logs.progress(total=1, description=text, unit="row") as progress:
        progress.update(1, name=text)


def draw_a_bar(text: str) -> None:
    progress = logs.BarProgress(total=1, description=text, unit="row", initial=0, unit_scale=False)
    progress.update(1, name=text)
    progress.close()


def log_by_a_library(text: str) -> None:
    logs.configure_logging()
    logger, handler = logging.getLogger("some_library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.warning("config.json says %s", text)
    logger.removeHandler(handler)


def warn_by_a_library(text: str) -> None:
    logs.configure_logging()
    sys.stderr.write(warnings.formatwarning(f"config.json says {text}", UserWarning, "x.py", 1, ""))


def a_bug_of_ours(text: str) -> None:
    try:
        with errors.one_line_errors("tool.py"):
            raise ValueError(f"no such thing: {text}")
    except ValueError:
        sys.excepthook(*sys.exc_info())


ROUTES = (
    show,
    show_line,
    raise_user_error,
    raise_os_error,
    raise_as_one_rank,
    mistake_in_a_flag,
    unknown_flag,
    log_a_line,
    log_a_message,
    log_progress,
    draw_a_bar,
    log_by_a_library,
    warn_by_a_library,
    a_bug_of_ours,
)
MANY_LINES = (show, draw_a_bar, log_by_a_library, warn_by_a_library, a_bug_of_ours)


@pytest.fixture
def plain_process(monkeypatch):
    """Not launched by torchrun, and restored at the end."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_every_route_shows_it(route, plain_process, capsys):
    for text, shown in HOSTILE.items():
        # argparse itself quotes what it refuses.
        try:
            route(text)
        except SystemExit as end:
            assert end.code in (1, 2)
        output = "".join(capsys.readouterr())
        printed = output.replace("\r", "") if route is draw_a_bar else output
        assert not set(printed) & (set(text) - set(shown)), (text, output)
        assert shown.replace(" ", "") in printed.replace(" ", "") or repr(text)[1:-1] in printed, (text, output)
        if route not in MANY_LINES:
            assert output.count("\n") == 1, (text, output)
    if route not in MANY_LINES:
        with contextlib.suppress(SystemExit):
            route("first\nsecond")
        assert "".join(capsys.readouterr()).count("\n") == 1


@pytest.mark.parametrize("no_stream", [False, True])
def test_prompt_and_answer_keep_their_lines(no_stream, monkeypatch, capsys, model_dir):
    class HostileAnswer(list):
        seconds = 1.0

        def speed(self) -> str:
            return ""

    answer = HostileAnswer(["one\n\ttwo\x1b", "[2J\rthr", "ee\u202e 👩\u200d👧"])
    monkeypatch.setattr(loading, "load_folder", lambda *args, **keys: (None, None))
    monkeypatch.setattr(run, "prompt_ids", lambda *args: [])
    monkeypatch.setattr(run, "log_short_room", lambda *args, **keys: None)
    monkeypatch.setattr(run, "Answer", lambda *args: answer)
    words = ["--device", "cpu", "--model_path", str(model_dir), "--input_txt", "say\n\x07it"]
    flags = vars(inference_flags.inference_parser().parse_args(words)) | {"no_stream": no_stream}
    run.run(InferenceSettings.from_flags(flags))
    assert capsys.readouterr().out == "Prompt: say\n␇it\nAnswer: one\n\ttwo␛[2J␍three<U+202E> 👩\u200d👧\n"


def test_each_line_is_one_write_so_that_those_of_several_processes_do_not_mix():
    """Also where Python does not buffer. Each write to this socket is a packet."""
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = """
from colossal_llama2.terminal_text import report_line, show, show_line
show("one")
show_line("two")
report_line("three")
"""
    with reader, writer:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer, env=environment, check=True)
        writer.close()
        packets = [reader.recv(4096) for _ in range(3)]
    assert packets == [b"one\n", b"two\n", b"three\n"]


def test_only_one_module_prints():
    """inspect_data colours its lines itself, and uses the stricter `visible`.

    host_report prints JSON for the doctor, on a host where this package may be missing.
    """
    allowed = {PACKAGE / "dataset" / "inspect_data.py": 1}
    allowed[PACKAGE / "cluster" / "doctor" / "host_report.py"] = 1
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert len(prints) == allowed.get(path, 0), path
        writes = [call for call in calls if ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write")]
        assert not writes, path


NAME = "m\x1b[31m\u202e\rx\x9b"


@pytest.mark.parametrize(
    "command",
    [
        [
            "init_model.py",
            "--source_model_and_tokenizer_path",
            NAME,
            "--target_tokenizer_path",
            NAME,
            "--target_model_path",
            "new",
        ],
        ["inference_example.py", "--model_path", NAME, "--input_txt", "x"],
        ["train.py", "--pretrained", NAME, "--dataset", NAME, "--load_config", "settings.json"],
        ["-m", "colossal_llama2.train.verify", NAME],
    ],
    ids=lambda command: command[-2] if command[0] == "-m" else command[0],
)
def test_commands_quote_names_harmlessly(command, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({f"fl\x1b[31mag{NAME}": 1}))
    script = [str(ROOT / command[0])] if command[0] != "-m" else ["-m"]
    process = subprocess.run(
        [sys.executable, *script, *command[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        timeout=120,
    )
    output = (process.stdout + process.stderr).decode()
    assert process.returncode == 2 and output.count("\n") == 1
    assert not set(output) & set("\x1b\u202e\r\x9b") and "␛[31m" in output


def test_an_ascii_terminal_is_shown_it_too():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    show_line("\x1b \ud800 é", file=stream)
    assert stream.buffer.getvalue() == b"\\u241b <U+D800> \\xe9\n"
