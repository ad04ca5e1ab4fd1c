"""A chat: what the model gets, what is printed, every command, and one session in a pseudo-terminal."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

import inference_example
from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.templates import ChatTemplate
from colossal_llama2.corpus.conversation import chat_template, read_conversation
from colossal_llama2.corpus.message_formats import recognize
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.inference import chat_template as inference_template
from colossal_llama2.inference import console
from colossal_llama2.inference.answer import Answer
from colossal_llama2.inference.chat import Chat
from colossal_llama2.inference.history import History, append_conversation
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.terminal_text import printable
from tests import tiny
from tests.conftest import ROOT
from tests.terminal import COLUMNS, CONTROL_C, CONTROL_D, Terminal

GREEDY = GenerationSettings(8, do_sample=False, temperature=0.3, top_k=50, top_p=0.95, seed=None)
CONTEXT = 1024
# Each character is three tokens of the English tokenizer.
LONG = tiny.CHINESE * 3


@pytest.fixture(scope="module")
def chat_dir(model_dir, tmp_path_factory) -> Path:
    """The tiny model as fine-tuning leaves it, with a short context. Read only."""
    folder = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("chat") / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": CONTEXT, "trained_for": {"stage": "sft", "chat_template": "colossal"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(chat_template(prefix_after_marks=False))
    return folder


@pytest.fixture(scope="module")
def loaded(chat_dir):
    return load_model(str(chat_dir), "cpu")


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """Types lines into a chat; returns what it answered, the notices, and the chat."""

    def run(*lines: str, style: str = "sft", settings: GenerationSettings = GREEDY, streams: bool = True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat = Chat(*loaded, style, settings, streams=streams)
        chat.run()
        captured = capsys.readouterr()
        notices = captured.err.splitlines()
        assert all(cell_len(line) < COLUMNS for line in notices)
        return captured.out, notices, chat

    return run


def expected(loaded, messages: list, count: int = 8) -> str:
    """The greedy answer to a conversation, by the template and `generate` of transformers."""
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    stream = TextStream(tokenizer)
    return "".join(map(stream.push, new[0, ids.shape[1] :].tolist())) + stream.end()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_the_model_gets_the_whole_conversation(talk, loaded):
    out, notices, _ = talk("你好", "and then?", "  /not a command", "/quit", "never")
    first = expected(loaded, [user("你好")])
    talked = [user("你好"), assistant(first), user("and then?")]
    second = expected(loaded, talked)
    third = expected(loaded, [*talked, assistant(second), user("  /not a command")])
    typed = ("你好", "and then?", "  /not a command")
    exchanges = zip(typed, (first, second, third), strict=True)
    assert out == "".join(f"> {question}\n{printable(answer)}\n" for question, answer in exchanges) + "> /quit\n"
    assert re.fullmatch(r"\[8 tokens, [\d.]+ tokens/s; cut at max_new_tokens 8, /set changes it\]", notices[1])
    assert talk("你好", "and then?", "  /not a command", "/quit", streams=False)[0] == out


def test_system_reset_and_undo(talk, loaded):
    lines = (
        "你好",
        "more",
        "/undo",
        "/system 你是一个助手",
        "again",
        "/reset",
        "你好",
        "/system",
        "/reset",
        "/undo",
        "你好",
    )
    out, notices, _ = talk(*lines)
    system = {"role": "system", "content": "你是一个助手"}
    first = expected(loaded, [user("你好")])
    assert f"> again\n{printable(expected(loaded, [system, user('你好'), assistant(first), user('again')]))}\n" in out
    assert f"> /reset\n> 你好\n{printable(expected(loaded, [system, user('你好')]))}\n" in out
    assert out.endswith(f"> /undo\n> 你好\n{printable(first)}\n")
    shown = " ".join(notices)
    for words in (
        "the last question and its answer are removed; 1 exchange left",
        "system text set",
        "2 exchanges removed, the system text is kept",
        "system text removed",
        "new conversation; 1 exchange removed",
        "nothing to undo",
    ):
        assert words in shown


def test_messages_of_several_lines(talk, loaded):
    out, _, chat = talk("one\\", "two", '"""three', '/four"""', '"""', "  five", "", "six", '"""', "", "last\\")
    questions = [exchange.question for exchange in chat._state.history.exchanges]
    assert questions == ["one\ntwo", "three\n/four", "  five\n\nsix", "last"]
    assert "> one\\\n. two\n" in out


def test_settings_are_those_of_the_flags(talk):
    lines = ("/set temperature 0.7", "/set --top_k 3", "/set do_sample True", "/set seed 7", "/set max_new_tokens 3")
    out, notices, chat = talk(*lines, "/set repetition_penalty 1.2", "hi", "/set seed none", "/set")
    settings = chat._state.settings
    assert settings == GenerationSettings(3, True, 0.7, 3, 0.95, None, 1.2)
    listed = ["max_new_tokens 3", "do_sample True", "temperature 0.7", "top_k 3", "top_p 0.95", "seed none"]
    assert set(listed) | {"repetition_penalty 1.2"} == set(notices[-7:])
    assert len(chat._state.history.exchanges) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "/set temperature 0",
            "temperature: '0' given, a number above 0 allowed; for greedy decoding type /set do",
        ),
        ("/set temperature", "give a value, such as /set temperature 0.3"),
        ("/set top_p 2", "top_p: '2' given, a number above 0 and at most 1 allowed"),
        ("/set max_new_tokens none", "a whole number of at least 1 allowed"),
        ("/set warmth 1", "warmth is unknown; settings are max_new_tokens, do_sample"),
        ("/jump", "unknown command /jump; /help lists the commands"),
        ("/save", "give a file, such as /save chat.jsonl"),
        ("/save x.jsonl", "there is nothing to save yet"),
        ("/set seed -1", "a whole number from 0 to 4294967295 allowed"),
    ],
)
def test_a_mistake_is_reported_and_changes_nothing(talk, line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, notices, chat = talk(line)
    assert words in " ".join(notices)
    assert chat._state.settings == GREEDY and chat._state.history.exchanges == [] and os.listdir() == []


def test_help_lists_every_command(talk):
    _, notices, _ = talk("/help")
    for name in ("/system", "/reset", "/undo", "/save", "/set", "/help", "/quit"):
        assert sum(line.startswith(f"{name} ") for line in notices[1:]) == 1


def test_a_saved_chat_is_input_of_prepare_sft_dataset(talk, tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = ["/system 你是\u2028助手", "你好", "and?", f"/save {path}", "/undo", f"/save {path}"]
    _, notices, chat = talk(*lines)
    shown = " ".join(notices)
    assert "saved 2 exchanges as" in shown and "a new file" in shown and "earlier lines are unchanged" in shown
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert len(records) == 2
    for record, count in zip(records, (2, 1), strict=True):
        found = recognize(record)
        conversation = read_conversation(found.turns, system_text=found.system_text)
        assert conversation.system_text == "你是\u2028助手" and len(conversation.exchanges) == count
        assert conversation.exchanges[0][0].text == "你好"
    assert found.turns[-1].text == chat._state.history.exchanges[0].answer


@pytest.mark.parametrize("content", ["not JSON\n", '{"prompt": "x"}\n', "[1]"])
def test_another_file_is_never_appended_to(talk, tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    others = (f"/save {tmp_path}", f"/save {path}/x", "/save ~no-such-user/x", "/save a\0b")
    _, notices, _ = talk("hi", f"/save {path}", *others)
    assert sum(line.startswith("/save") for line in notices) == 5
    assert path.read_text() == content
    assert "is a folder" in " ".join(notices)


def test_a_line_without_its_end_is_completed_before_another_is_added(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}')
    history = History()
    history.add("a", "b")
    assert append_conversation(path, history.record()) == 2
    assert len(path.read_text().splitlines()) == 2


def test_the_oldest_exchanges_are_dropped_when_the_context_is_full(talk, loaded):
    """They are dropped from what the model sees; /save and /undo still have them."""
    _, notices, chat = talk(LONG, "short", LONG, LONG)
    history = chat._state.history
    (line,) = [line for line in notices if "the context of" in line]
    assert line == "[the context of 1,024 tokens is full; dropped: the oldest 1 exchange]"
    assert history.forgotten == 1 and len(history.exchanges) == 4
    talked = [message for old in history.exchanges[1:3] for message in (user(old.question), assistant(old.answer))]
    assert history.exchanges[3].answer == expected(loaded, [*talked, user(LONG)])
    for left in (3, 2, 1):
        history.undo()
        assert history.forgotten == 1 and len(history.exchanges) == left


def test_a_message_that_cannot_fit_is_not_sent(talk):
    _, notices, chat = talk("hi", LONG * 4, "hi")
    assert any("the message has 1," in line for line in notices)
    assert [exchange.question for exchange in chat._state.history.exchanges] == ["hi", "hi"]
    assert chat._state.history.forgotten == 0


def test_a_message_that_the_template_refuses_is_not_sent(talk, loaded, monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
    folder = loaded[1].name_or_path
    parts = ChatTemplate("strict", template, "strict.jinja"), load_encoder(folder), folder
    strict = ChatTokenizer(*parts, prefix_after_marks=False)
    monkeypatch.setattr(inference_template, "_chat_of", lambda folder: strict)
    _, notices, chat = talk("/system x", "hi", "/system", "hi")
    assert "no system" in " ".join(notices) and len(chat._state.history.exchanges) == 1


def test_without_a_template_each_line_is_continued_by_itself(talk, loaded):
    model, tokenizer = loaded
    out, notices, _ = talk("the", "the", "/undo", style="plain")
    first, second = out.removesuffix("> /undo\n").split("> the\n")[1:]
    assert first == second
    shown = " ".join(notices)
    assert "each line is continued by itself" in shown and "/undo needs a conversation" in shown
    assert not any(line.startswith("/undo ") and "remove" in line for line in notices)


def press_control_c(monkeypatch, presses: int, *, at_token: int) -> None:
    """Press Ctrl-C several times at once while a token becomes text, and once more when the answer is reported."""
    push, speed = TextStream.push, Answer.speed
    count = iter(range(1000))

    def pushed(stream, token):
        if next(count) == at_token:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        return push(stream, token)

    def reported(answer):
        if presses > 1:
            os.kill(os.getpid(), signal.SIGINT)
        return speed(answer)

    monkeypatch.setattr(TextStream, "push", pushed)
    monkeypatch.setattr(Answer, "speed", reported)


@pytest.mark.parametrize("presses", [1, 2])
def test_a_stopped_answer_is_kept_as_far_as_it_came(talk, loaded, monkeypatch, presses):
    press_control_c(monkeypatch, presses, at_token=5)
    settings = GenerationSettings(300, False, 0.3, 50, 0.95, None)
    out, notices, chat = talk("你好", "/set max_new_tokens 8", "more", settings=settings)
    first, second = chat._state.history.exchanges
    assert first.answer and expected(loaded, [user("你好")], 20).startswith(first.answer)
    assert "stopped, what there is of the answer is kept" in " ".join(notices)
    assert second.answer == expected(loaded, [user("你好"), assistant(first.answer), user("more")])
    assert f"> 你好\n{printable(first.answer)}\n> /set" in out


def test_nothing_is_kept_if_an_answer_is_stopped_before_its_first_character(talk, monkeypatch):
    def stop(stream, token):
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    monkeypatch.setattr(TextStream, "push", stop)
    _, notices, chat = talk("hi")
    assert chat._state.history.exchanges == [] and "the question is not kept" in " ".join(notices)


def test_a_line_that_is_not_utf8_is_not_sent(talk):
    _, notices, chat = talk("a \udce4", "hi")
    assert "not valid UTF-8" in notices[1] and len(chat._state.history.exchanges) == 1


def test_notices_fit_on_the_screen(capsys):
    console.notice("一" * 60 + " " + "word " * 30 + "x" * 200)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5 and all(cell_len(line) < COLUMNS for line in lines)


def test_interactive_and_a_prompt_contradict_each_other(chat_dir, capsys):
    with pytest.raises(SystemExit) as end:
        inference_example.main(["--model_path", str(chat_dir), "--interactive", "--input_txt", "hi"])
    assert end.value.code == 2 and "leave out --input_txt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_session_in_a_terminal(chat_dir, tmp_path):
    """In Chinese: streamed answers, Ctrl-C in an answer and at the prompt, a full context, /reset, history, Ctrl-D."""
    flags = ["--model_path", str(chat_dir), "--device", "cpu", "--do_sample", "False", "--max_new_tokens", "8"]
    argv = [sys.executable, str(ROOT / "inference_example.py"), "--interactive", *flags]
    terminal = Terminal(argv, cwd=str(tmp_path), env={**os.environ, "LC_ALL": "C.UTF-8"})
    try:
        place = terminal.wait_for("Ctrl-D quits.\n> ", timeout=180)
        terminal.type("你好，世界！\n")
        place = terminal.wait_for("tokens/s; cut at max_new_tokens 8, /set changes it]\n> ", after=place)
        terminal.type("/set max_new_tokens 2000\n")
        place = terminal.wait_for("max_new_tokens 2000\n> ", after=place)
        terminal.type("请讲一个故事\n")
        place = terminal.wait_for("故事\n", after=place)
        while len(terminal.written) < place + 5:
            terminal._read(5)
        terminal.type(CONTROL_C)
        place = terminal.wait_for("stopped, what there is of the answer is kept]\n> ", after=place)
        # The up arrow brings back the last line.
        terminal.type("/set max_new_tokens 8\n")
        place = terminal.wait_for("max_new_tokens 8\n> ", after=place)
        for _ in range(3):
            terminal.type(LONG + "\n")
            place = terminal.wait_for("tokens/s", after=place)
            place = terminal.wait_for("\n> ", after=place)
        assert "[the context of 1,024 tokens is full; dropped: the oldest" in terminal.written
        terminal.type("/reset\n")
        place = terminal.wait_for("5 exchanges removed\n> ", after=place)
        terminal.type("半行")
        terminal.wait_for("半行", after=place)
        # Python's `input` overlooks a signal at the moment between two keys, until the next one.
        time.sleep(0.5)
        terminal.type(CONTROL_C)
        place = terminal.wait_for("\n> ", after=place)
        time.sleep(0.5)
        terminal.type(CONTROL_C)
        place = terminal.wait_for("Ctrl-C again, or Ctrl-D, quits.\n> ", after=place)
        # The next one clears a line, and does not end the chat.
        terminal.type("又")
        terminal.wait_for("又", after=place)
        time.sleep(0.5)
        terminal.type(CONTROL_C)
        place = terminal.wait_for("\n> ", after=place)
        terminal.type("\x1b[A\n")
        place = terminal.wait_for("/reset\nnew conversation; 0 exchanges removed\n> ", after=place)
        terminal.type(CONTROL_D)
        assert terminal.wait() == 0
        answer = terminal.written.split("你好，世界！\n")[1].split("\n[")[0]
        assert answer == printable(expected(load_model(str(chat_dir), "cpu"), [user("你好，世界！")]))
    finally:
        terminal.close()
