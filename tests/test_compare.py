"""compare: figures that another computation gives too, for every kind of tokenizer, and one line for what cannot be."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

from colossal_llama2 import arguments
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer import compare, init_tokenizer
from tests import tiny

# The source merges 乙丙 first, so 甲乙丙 can only come from 甲 and 乙丙, which closure="off" leaves out.
PIECES = ["甲", "乙", "丙", "乙丙", "甲乙", "甲乙丙", "甲乙丁"]
DOCUMENTS = [*tiny.english_documents()[:40], tiny.CHINESE, "甲乙丙", "  two spaces\n\n\tand a tab </s> <s>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "data"
    folder.mkdir()
    lines = (json.dumps({"source": text[:2], "target": text[2:]}) + "\n" for text in DOCUMENTS)
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def broken_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """`tokenizer_dir` with pieces as the original adds them: some of them cannot be reached."""
    folder = tmp_path_factory.mktemp("broken")
    pieces = folder / "pieces.jsonl"
    pieces.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in PIECES))
    init_tokenizer.expand_tokenizer(tokenizer_dir, folder / "tokenizer", pieces, piece_scores="zero", closure="off")
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory) -> Path:
    """A byte-level BPE as of GPT-2, with one token that no merge makes and parts of characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*tiny.english_documents()[:200], tiny.CHINESE * 50], trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    file = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][0]["id"] += 1
    content["model"]["vocab"]["Ġneverreached"] = 500
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def remote_code_dir(tmp_path_factory) -> Path:
    """A folder like ChatGLM's: its class comes with it."""
    folder = tmp_path_factory.mktemp("remote") / "chatglm"
    folder.mkdir()
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit('this code was run')")
    return folder


def row_of(path: Path) -> compare.Row:
    rows, left_out = compare.compare([str(path)], DOCUMENTS)
    assert not left_out
    return rows[0]


def ids_of(folder: Path) -> list:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(document, add_special_tokens=False)["input_ids"] for document in DOCUMENTS]


def check_figures(row: compare.Row, ids: list, vocabulary_size: int) -> None:
    """Tokens and unknown ones against ids from elsewhere."""
    count = sum(map(len, ids))
    assert row.vocabulary_size == vocabulary_size
    assert row.compression_rate == pytest.approx(count / len("".join(DOCUMENTS)))
    assert row.average_sample_tokens == pytest.approx(count / len(DOCUMENTS))
    assert row.megabytes_per_second > 0


def test_a_folder_has_the_figures_of_transformers(tokenizer_dir):
    row = row_of(tokenizer_dir)
    check_figures(row, ids_of(tokenizer_dir), 600)
    assert (row.kind, row.unknown_tokens, row.unreachable_pieces) == ("transformers fast", 0, 0)


def test_a_folder_without_a_class_or_settings_is_read_by_its_file(tokenizer_dir, tmp_path):
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    assert row_of(tmp_path).kind == "SentencePiece"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert row_of(tmp_path).kind == "SentencePiece"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert row_of(tmp_path).kind == "transformers fast"


def test_a_slow_tokenizer_is_measured_too(tokenizer_dir, tmp_path):
    """One without a fast counterpart."""
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertGenerationTokenizer"}))
    shutil.copy(tmp_path / "spiece.model", tmp_path / "tokenizer.model")
    row = row_of(tmp_path)
    check_figures(row, ids_of(tmp_path), row.vocabulary_size)
    assert (row.kind, row.unreachable_pieces) == ("transformers slow", 0)


def test_a_sentencepiece_file_has_the_figures_of_sentencepiece(tokenizer_dir, tmp_path):
    from sentencepiece import SentencePieceProcessor

    file = shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path / "any_name.spm")
    processor = SentencePieceProcessor(model_file=str(file))
    row = row_of(file)
    check_figures(row, processor.encode(DOCUMENTS), processor.get_piece_size())
    assert (row.kind, row.unknown_tokens, row.unreachable_pieces) == ("SentencePiece", 0, 0)


def test_a_tokenizer_json_has_the_figures_of_tokenizers(byte_level_file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_level_file))
    ids = [tokenizer.encode(document, add_special_tokens=False).ids for document in DOCUMENTS]
    row = row_of(byte_level_file)
    check_figures(row, ids, 502)
    assert (row.kind, row.unknown_tokens) == ("tokenizer.json", 0)


def test_truncation_and_padding_in_a_tokenizer_json_do_not_count(byte_level_file, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_level_file))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain, changed = row_of(byte_level_file), row_of(tmp_path / "tokenizer.json")
    assert plain.compression_rate == changed.compression_rate


def test_unreachable_pieces_are_found_in_the_model_and_in_the_fast_tokenizer(broken_dir, byte_level_file):
    """甲乙丁 has no 丁. The fast tokenizer knows the scores' merges and other rules for equal ones."""
    model = compare.load(broken_dir / "tokenizer.model").find_unreachable()
    assert "甲乙丁" in model and not {"甲", "乙", "丙"} & set(model)
    fast = compare.load(broken_dir).find_unreachable()
    assert "甲乙丁" in fast and not {"甲", "乙", "丙"} & set(fast)
    assert compare.load(byte_level_file).find_unreachable() == ["Ġneverreached"]


def test_what_is_not_known_is_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "and": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = [word for document in DOCUMENTS for word in re.findall(r"\w+|[^\w\s]+", document)]
    row = row_of(tmp_path / "tokenizer.json")
    assert row.unknown_tokens == sum(word != "and" for word in words)
    assert row.average_sample_tokens == pytest.approx(len(words) / len(DOCUMENTS))
    assert row.unreachable_pieces is None


def test_one_that_needs_code_gets_a_line_and_the_others_go_on(tokenizer_dir, remote_code_dir, data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "README").write_text("text")
    wrong = [tmp_path / "empty", tmp_path / "tokenizer.json", tmp_path / "README"]
    paths = [remote_code_dir, *wrong, tokenizer_dir]
    compare.main(["--tokenizer_dirs", ",".join(map(str, paths)), "--data_input_dirs", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[0].rstrip(":") for line in lines[1:6]] == [str(tokenizer_dir), *map(str, paths[:-1])]
    assert "left out: needs code of its own (tokenization_chatglm.ChatGLMTokenizer" in lines[2]
    assert "holds no tokenizer_config.json" in lines[3] and "neither a SentencePiece model" in lines[5]
    assert len(lines) == 7


def test_a_remote_code_folder_names_the_model_file_that_can_be_given(tokenizer_dir, tmp_path):
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoTokenizer": "tokenization_x.X"}}')
    with pytest.raises(UserError, match=r"tokenization_x\.X, auto_map in config\.json.*tokenizer\.model can be given"):
        compare.load(tmp_path)
    # Code for the model alone is no obstacle.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "modeling_x.X"}}')
    assert compare.load(tmp_path).vocabulary_size == 600


def test_the_table_and_the_json_agree(tokenizer_dir, broken_dir, data, tmp_path, capsys):
    output = tmp_path / "new" / "comparison.json"
    paths = [str(tokenizer_dir), str(broken_dir / "tokenizer.model")]
    compare.main(
        ["--tokenizer_dirs", ",".join(paths), "--data_input_dirs", str(data), "--output_file", str(output)]
    )
    written = json.loads(output.read_text("utf-8"))
    assert (written["documents"], written["characters"]) == (len(DOCUMENTS), len("".join(DOCUMENTS)))
    assert written["bytes"] == len("".join(DOCUMENTS).encode()) and written["left_out"] == []
    head, *lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"{len(DOCUMENTS)} documents, ") and lines[-1] == f"written to {output}"
    assert len({len(line) for line in (head, *lines[:2])}) == 1
    for line, row, path in zip(lines[:2], written["tokenizers"], paths, strict=True):
        assert row["tokenizer"] == path and set(row) == set(inspect.signature(compare.Row).parameters)
        cells = re.split(r"\s{2,}", line)
        assert cells[2:4] == [f"{row['vocabulary_size']:,}", f"{row['compression_rate']:.3f}"]
        assert cells[6] == str(row["unreachable_pieces"])
    assert [row["vocabulary_size"] for row in written["tokenizers"]] == [600, 607]


def test_few_of_many_documents_are_drawn_and_each_once(tmp_path):
    lines = (json.dumps({"target": f"text {number % 300}"}) + "\n" for number in range(600))
    (tmp_path / "a.jsonl").write_text("".join(lines) + '{"source": "", "target": ""}\n')
    everything = compare.sample_documents([str(tmp_path)], 10_000)
    assert sorted(everything) == sorted(f"text {number}" for number in range(300))
    assert compare.sample_documents([str(tmp_path)], 20) == everything[:20]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tokenizer_dirs": "missing"}, ["--tokenizer_dirs: missing does not exist"]),
        ({"tokenizer_dirs": "a,,b"}, ["empty entry"]),
        ({"data_input_dirs": "missing"}, ["missing is not a folder"]),
        ({"data_input_dirs": "blank"}, ["no text in any record"]),
        ({"output_file": "data/text.jsonl"}, ["--output_file data/text.jsonl exists already"]),
        ({"sample_documents": "0"}, ["--sample_documents", "at least 1"]),
        ({"tokenizer_dirs": "blank"}, ["no tokenizer could be compared"]),
    ],
)
def test_mistakes_are_one_line(changes, words, tokenizer_dir, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_text('{"target": ""}\n')
    monkeypatch.chdir(tmp_path)
    flags = {"tokenizer_dirs": tokenizer_dir, "data_input_dirs": "data"} | changes
    with pytest.raises(SystemExit) as end:
        compare.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("compare.py: error:")
    assert all(word in lines[0] for word in words), lines[0]


def test_flags_have_their_place():
    flags = {action.dest for action in arguments.compare_parser()._actions} - {"help"}
    assert flags == {"tokenizer_dirs", "data_input_dirs", "output_file", "sample_documents"}
