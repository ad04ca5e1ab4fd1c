"""Files of prompts: answered several at a time, in order, and continued after a kill; mistakes are one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import inference_example
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.errors import UserError
from colossal_llama2.inference import batch
from colossal_llama2.inference.answer_file import AnswerFile
from colossal_llama2.inference.batch import answers_in_order
from colossal_llama2.inference.generation import generate
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.prompt_file import read_prompts
from colossal_llama2.inference.prompts import chat_ids, prompt_ids
from colossal_llama2.inference.settings import GenerationSettings
from tests import tiny

PROMPTS = ["the", "A longer prompt than the others, by some words", "你好", "明月", "if x", "x = 3", "a b c d e f g"]
GREEDY = GenerationSettings(10, False, 1.0, 50, 1.0, None)
DRAWN = GenerationSettings(10, True, 1.5, 50, 0.95, 7)


@pytest.fixture(scope="module")
def chat_dir(model_dir, tmp_path_factory) -> Path:
    """The tiny model with a chat template. Read only."""
    folder = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(chat_template(prefix_after_marks=False))
    return folder


@pytest.fixture(scope="module")
def loaded(chat_dir):
    return load_model(str(chat_dir), "cpu")


@pytest.fixture
def place(tmp_path, chat_dir):
    """Runs the command on a file of PROMPTS; returns the lines of the output file."""
    (tmp_path / "in.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"

    def run(*flags: str, input_name: str = "in.txt", model: Path = chat_dir) -> list[dict]:
        words = ["--model_path", str(model), "--device", "cpu", "--prompt_style", "plain", "--max_new_tokens", "10"]
        words += ["--input_file", str(tmp_path / input_name), "--output_file", str(output), *flags]
        inference_example.main(words)
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    run.folder, run.output = tmp_path, output
    return run


def error_line(call, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        call()
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if " | " not in line]
    assert end.value.code == 2 and captured.out == "" and len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_answers_are_those_of_one_by_one_in_order(place, loaded, batch_size):
    lines = place("--do_sample", "False", "--batch_size", str(batch_size))
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [line["number"] for line in lines] == list(range(1, len(PROMPTS) + 1))
    assert [line["answer"] for line in lines] == [generate(*loaded, prompt, GREEDY) for prompt in PROMPTS]
    assert all(0 <= line["tokens"] <= 10 and line["is_cut"] == (line["tokens"] == 10) for line in lines)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_batch_changes_no_seeded_sample(loaded, sequences):
    model, tokenizer = loaded
    rows = [prompt_ids(tokenizer, "plain", prompt) for prompt in PROMPTS]
    one_by_one = list(answers_in_order(model, tokenizer, rows, DRAWN, sequences=sequences, batch_size=1))
    assert len(one_by_one) == len(PROMPTS) and all(len(answers) == sequences for answers in one_by_one)
    assert len({answer.text for answers in one_by_one for answer in answers}) == sequences * len(PROMPTS)
    for size in (2, 5, 100):
        assert list(answers_in_order(model, tokenizer, rows, DRAWN, sequences=sequences, batch_size=size)) == one_by_one
    later = answers_in_order(model, tokenizer, rows, DRAWN, sequences=sequences, batch_size=2, done=4)
    assert list(later) == one_by_one[4:]


def test_several_answers_are_a_list(place, capsys):
    lines = place("--num_return_sequences", "2", "--seed", "1", "--temperature", "2")
    assert all(len(line["answers"]) == len(line["tokens"]) == 2 and "answer" not in line for line in lines)
    assert lines[0]["answers"][0] != lines[0]["answers"][1]


def test_several_answers_to_one_prompt_are_numbered(chat_dir, capsys):
    words = ["--model_path", str(chat_dir), "--device", "cpu", "--prompt_style", "plain", "--max_new_tokens", "4"]
    inference_example.main([*words, "--input_txt", "the", "--num_return_sequences", "2", "--seed", "1"])
    out = capsys.readouterr().out
    assert out.startswith("Prompt: the\nAnswer 1: ") and "\nAnswer 2: " in out
    # The first is that of the seed alone.
    inference_example.main([*words, "--input_txt", "the", "--seed", "1"])
    alone = capsys.readouterr().out
    assert out.startswith(alone.replace("Answer:", "Answer 1:"))


def test_without_an_output_file_answers_are_printed(place, chat_dir, capsys, loaded):
    words = ["--model_path", str(chat_dir), "--device", "cpu", "--prompt_style", "plain", "--do_sample", "False"]
    (place.folder / "two.txt").write_text("the\nif x")
    inference_example.main([*words, "--max_new_tokens", "5", "--input_file", str(place.folder / "two.txt")])
    settings = GenerationSettings(5, False, 1.0, 50, 1.0, None)
    answers = [generate(*loaded, prompt, settings) for prompt in ("the", "if x")]
    assert capsys.readouterr().out == f"Prompt: the\nAnswer: {answers[0]}\nPrompt: if x\nAnswer: {answers[1]}\n"


@pytest.mark.parametrize("cut", ["between lines", "in a line", "before the first", "in the first"])
def test_a_killed_command_continues_where_it_was(place, cut, capsys, monkeypatch):
    flags = ("--seed", "3", "--batch_size", "2")
    expected = place(*flags)
    content = place.output.read_bytes()
    ends = [number for number, byte in enumerate(content) if byte == 10]
    size = {"between lines": ends[2] + 1, "in a line": ends[2] + 20, "before the first": 0, "in the first": 5}[cut]
    place.output.write_bytes(content[:size])
    computed = []
    answered = batch._answered
    monkeypatch.setattr(batch, "_answered", lambda *args: computed.extend(args[-1]) or answered(*args))
    assert place("--seed", "3", "--batch_size", "4") == expected and place.output.read_bytes() == content
    assert sorted(computed) == list(range(3 if "first" not in cut else 0, len(PROMPTS)))
    monkeypatch.setattr(batch, "answer_prompts", None)
    assert place(*flags) == expected
    assert "all 7 prompts are answered already" in capsys.readouterr().err


def test_each_answer_is_in_the_file_as_soon_as_it_is_there(place, monkeypatch):
    seen = []
    answered = batch._answered

    def watched(*args):
        seen.append(place.output.read_text().count("\n"))
        return answered(*args)

    monkeypatch.setattr(batch, "_answered", watched)
    place("--batch_size", "1")
    assert seen[0] == 0 and seen[4:] == [4, 5, 6]


def test_an_interrupted_command_leaves_whole_lines(place, monkeypatch, capsys):
    expected = place("--seed", "3", "--batch_size", "1")
    place.output.unlink()
    answered = batch._answered

    def interrupted(*args):
        if args[-1][0] == 5:
            raise KeyboardInterrupt
        return answered(*args)

    monkeypatch.setattr(batch, "_answered", interrupted)
    with pytest.raises(SystemExit) as end:
        place("--seed", "3", "--batch_size", "1")
    assert end.value.code == 130
    lines = place.output.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 7 and lines[-1].endswith("\n")
    monkeypatch.setattr(batch, "_answered", answered)
    assert place("--seed", "3") == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "4"), "another seed: 3, now 4"),
        (("--seed", "3", "--prompt_style", "sft"), 'another prompt_style: "plain", now "sft"'),
        (("--seed", "3", "--dtype", "bf16"), 'another dtype: "fp32", now "bf16"'),
        (("--seed", "3", "--num_return_sequences", "2"), "another num_return_sequences: 1, now 2"),
    ],
)
def test_other_settings_do_not_continue_a_file(place, flags, words, capsys):
    place("--seed", "3")
    before = place.output.read_bytes()
    capsys.readouterr()
    assert words in error_line(lambda: place(*flags), capsys)
    assert place.output.read_bytes() == before


def test_another_input_or_model_does_not_continue_a_file(place, capsys, chat_dir, tmp_path):
    place("--seed", "3")
    before = place.output.read_bytes()
    capsys.readouterr()
    (place.folder / "other.txt").write_text("else\n")
    assert "another input" in error_line(lambda: place("--seed", "3", input_name="other.txt"), capsys)
    model = shutil.copytree(chat_dir, tmp_path / "other")
    (model / "chat_template.jinja").write_text("{{ 1 }}")
    assert "another model" in error_line(lambda: place("--seed", "3", model=model), capsys)
    assert place.output.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(place, capsys):
    place.output.write_text("mine\n")
    assert "with the settings of its answers, does not; give a new file" in error_line(place, capsys)
    assert place.output.read_text() == "mine\n"
    place.output.unlink()
    place("--seed", "3")
    lines = place.output.read_text().splitlines(keepends=True)
    place.output.write_text("".join([lines[1], *lines[1:]]))
    capsys.readouterr()
    assert "is not the answer to prompt 1" in error_line(lambda: place("--seed", "3"), capsys)


def test_conversations_are_answered_in_their_template(place, loaded, capsys):
    question, answer = {"from": "human", "value": "你好"}, {"from": "gpt", "value": "Hello!"}
    records = [
        {"prompt": "the"},
        {"input_txt": "if x"},
        {"conversations": [question, answer, {"from": "human", "value": "and?"}], "system": "Be kind."},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]},
        {"instruction": "Say", "input": "it", "output": "it"},
    ]
    (place.folder / "in.jsonl").write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    lines = place("--do_sample", "False", "--prompt_style", "sft", input_name="in.jsonl")
    system = {"role": "system", "content": "Be kind."}
    talks = [
        [{"role": "user", "content": "the"}],
        [{"role": "user", "content": "if x"}],
        [
            system,
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "and?"},
        ],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}],
        [{"role": "user", "content": "Say\nit"}],
    ]
    rows = [chat_ids(loaded[1], talk) for talk in talks]
    found = answers_in_order(*loaded, rows, GREEDY, sequences=1, batch_size=1)
    assert [line["answer"] for line in lines] == [answers[0].text for answers in found]
    assert [line.get("messages") for line in lines] == [None, None, *talks[2:]]
    assert [line.get("reference") for line in lines] == [None] * 4 + ["it"]
    assert "1 conversation with an answer at the end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n \n", "has no prompt"),
        ("a.txt", b"ok\nbad \xff\n", "a.txt:2: not UTF-8 at byte 5"),
        ("a.csv", b"x", "*.txt with a prompt per line, or *.jsonl"),
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"prompt": 3}', 'a.jsonl:1: "prompt" is a JSON number; give a string'),
        ("a.jsonl", b'{"prompt": "x", "input_txt": "y"}', 'both "prompt" and "input_txt" given'),
        ("a.jsonl", b'{"text": "x"}', '"prompt" and "input_txt" are missing, and there is no conversation'),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}', "no question of the human"),
        ("a.jsonl", b'{"messages": [{"role": "wizard", "content": "x"}]}', "is from 'wizard'"),
    ],
)
def test_a_broken_input_is_one_line_before_anything_is_loaded(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert words in str(error.value)


def test_lines_of_a_text_file_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.TXT").write_bytes("\ufeff one \r\n\u2028two\x85three\n\n四".encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.TXT")] == [" one ", "\u2028two\x85three", "四"]


def test_a_conversation_needs_a_chat_template(place, capsys):
    (place.folder / "in.jsonl").write_text('{"prompt": "x"}\n{"messages": [{"role": "user", "content": "x"}]}\n')
    line = error_line(lambda: place(input_name="in.jsonl"), capsys)
    assert "in.jsonl:2: a conversation needs prompt style sft, and this is plain" in line
    assert not place.output.exists()


def test_a_prompt_that_does_not_fit_is_named_before_the_first_answer(place, capsys):
    (place.folder / "long.txt").write_text("short\n" + tiny.CHINESE * 40 + "\n", encoding="utf-8")
    line = error_line(lambda: place(input_name="long.txt"), capsys)
    assert "long.txt:2: the prompt has" in line and "shorten it" in line
    assert not place.output.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--input_file f --input_txt x", "--input_file and --input_txt both given"),
        ("--interactive --input_file f", "leave out --input_file"),
        ("--interactive --num_return_sequences 2", "leave out --num_return_sequences"),
        ("--output_file f", "--output_file needs --input_file"),
        ("--batch_size 2", "--batch_size has no effect on one answer"),
        ("--input_file f --no_stream", "--no_stream has no effect on --input_file"),
        ("--num_return_sequences 2 --no_stream", "--no_stream has no effect with --num_return_sequences"),
        ("--num_return_sequences 2 --do_sample False", "all answers are the same"),
        ("--input_file /no/such.txt", "--input_file /no/such.txt: there is no such file"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(flags, words, capsys):
    assert words in error_line(lambda: inference_example.main(flags.split()), capsys)


def test_a_second_process_that_has_written_meanwhile_is_continued(tmp_path):
    path = tmp_path / "answers.jsonl"
    first, second = (AnswerFile(path, {"dtype": None, "input": "a"}, prompts=4) for _ in range(2))
    second.open("fp32")
    second.add({"answer": "1"})
    second.add({"answer": "2"})
    with pytest.raises(UserError, match="another process is writing it"):
        first.open("fp32")
    second.close()
    first.open("fp32")
    assert first.done == 2
    first.add({"answer": "3"})
    first.close()
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "Hi", "messages": [{"role": "user", "content": "Ho"}]}, '"prompt" and "messages" given; keep one'),
        ({"prompt": " "}, '"prompt" is empty'),
    ],
)
def test_a_prompt_beside_a_conversation_and_an_empty_one(record, problem, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"prompts.jsonl:1: {problem}"):
        read_prompts(path)


def test_a_repeated_key_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "note": 1, "note": 2}\n{"prompt": "a", "prompt": "b"}\n')
    with pytest.raises(UserError, match="prompts.jsonl:2: the key 'prompt' is repeated"):
        read_prompts(path)


def test_answers_are_not_lost_in_a_closed_stdout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert "stdout, where answers are printed, is closed" in error_line(lambda: inference_example.main([]), capsys)
