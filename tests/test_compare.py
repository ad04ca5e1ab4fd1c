"""compare: one table for tokenizers of every kind, with correct figures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama2.encoding.bpe_model import BpeModel, scores_below, with_pieces
from colossal_llama2.encoding.byte_level_file import byte_characters
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.tokenizer import compare
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from examples import quickstart_corpus
from tests.conftest import ROOT
from tests.tiny import CHINESE, english_documents

REMOTE = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}


@pytest.fixture(scope="module")
def documents() -> list:
    chinese = [record["target"] for record in quickstart_corpus.translation_documents()][:150]
    return list(dict.fromkeys([*chinese, CHINESE, *english_documents()[:100], *english_documents()[2000:2100]]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, documents) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "text"
    folder.mkdir()
    lines = (json.dumps({"source": text[:5], "target": text[5:]}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def extended_dir(tokenizer_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    pieces = "".join(json.dumps({"piece": piece}) + "\n" for piece in ("设置", "文件", "扩展", "插件"))
    (folder / "pieces.jsonl").write_text(pieces)
    expand_tokenizer(ExtensionSettings(tokenizer_dir, folder / "tokenizer", folder / "pieces.jsonl"))
    return folder / "tokenizer"


def byte_level_file(path: Path, documents, **settings) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def word_piece_file(path: Path, documents) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def unigram_model(folder: Path, documents) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(text.split()) for text in documents),
        model_prefix=str(folder / "unigram"),
        vocab_size=600,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "unigram.model"


def remote_folder(folder: Path, tokenizer_dir) -> Path:
    """A tokenizer with its own code, which would leave a file behind if it ran."""
    shutil.copytree(tokenizer_dir, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(REMOTE))
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass ChatGLMTokenizer: pass\n"
    (folder / "tokenization_chatglm.py").write_text(code)
    return folder


def row_of(path, documents) -> compare.Row:
    rows, left_out = compare.compare([str(path)], documents)
    assert not left_out, left_out
    return rows[0]


def reason_of(path, documents) -> str:
    rows, left_out = compare.compare([str(path)], documents)
    assert not rows and left_out[0].tokenizer == str(path)
    return left_out[0].error


def test_the_figures_are_those_of_the_tokenizer(documents, tokenizer_dir, extended_dir):
    for folder, size in ((tokenizer_dir, 600), (extended_dir, len(BpeModel.read(extended_dir).pieces))):
        tokens = sum(map(len, load_encoder(folder).encode(documents)))
        kinds = {
            folder: "transformers fast",
            folder / "tokenizer.json": "tokenizer.json",
            folder / "tokenizer.model": "SentencePiece",
        }
        for path, kind in kinds.items():
            row = row_of(path, documents)
            assert (row.kind, row.vocabulary_size, row.unknown_tokens) == (kind, size, 0)
            assert row.compression_rate == pytest.approx(tokens / sum(map(len, documents)), rel=0.002)
            assert row.average_sample_tokens == pytest.approx(tokens / len(documents), rel=0.002)
            assert row.unreachable_pieces == 0
            assert row.megabytes_per_second > 0


def test_an_extended_vocabulary_needs_fewer_tokens(documents, tokenizer_dir, extended_dir):
    before, after = (row_of(folder, documents) for folder in (tokenizer_dir, extended_dir))
    assert after.compression_rate < before.compression_rate


def test_unreachable_pieces_are_found_in_every_kind(documents, tokenizer_dir, tmp_path):
    model = BpeModel.read(tokenizer_dir)
    pieces = ["甲", "乙", "丙", "甲乙丙"]  # nothing joins two of them
    (tmp_path / "plain").mkdir()
    path = tmp_path / "plain" / "tokenizer.model"
    path.write_bytes(with_pieces(model.content, pieces, scores_below(model.lowest_merge, 4)))
    assert row_of(path, documents).unreachable_pieces == 1
    assert row_of(tmp_path / "plain", documents).kind == "SentencePiece"

    whole = shutil.copytree(tokenizer_dir, tmp_path / "whole")
    fast = json.loads((whole / "tokenizer.json").read_text())
    fast["model"]["vocab"] |= {piece: 600 + index for index, piece in enumerate(pieces)}
    (whole / "tokenizer.json").write_text(json.dumps(fast))
    assert row_of(whole, documents).unreachable_pieces == 1


def test_byte_level_vocabularies(documents, tmp_path):
    path = byte_level_file(tmp_path / "bytes.json", [*documents, *[CHINESE] * 50])
    row = row_of(path, documents)
    assert (row.kind, row.vocabulary_size, row.unreachable_pieces) == ("tokenizer.json", 800, 0)
    content = json.loads(path.read_text())
    # Characters cut in two, which no text contains: one that merges make, and one that they do not.
    content["model"]["vocab"] |= {"ĠåĨĥ": 800, "åĨĥł": 801, "zqzq": 802}
    path.write_text(json.dumps(content))
    assert row_of(path, documents).unreachable_pieces == 3
    shutil.copyfile(path, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert row_of(tmp_path, documents).kind == "transformers fast"


def test_the_alphabet_of_bytes_is_that_of_tokenizers():
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert compare._text_of("Ġthe") == " the" and compare._text_of("ä½łå¥½") == "你好"
    assert compare._text_of("ä½") is None and compare._text_of("你") is None


def test_a_lossy_tokenizer_shows_what_it_cannot_encode(documents, tmp_path):
    row = row_of(word_piece_file(tmp_path / "words.json", english_documents()[:300]), documents)
    assert row.unknown_tokens > 100 and row.unreachable_pieces is None


def test_unigram_models_and_slow_tokenizers(documents, tmp_path):
    path = unigram_model(tmp_path, documents)
    row = row_of(path, documents)
    assert row.kind == "SentencePiece" and row.unreachable_pieces <= 10
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b": 2, "c</w>": 3, "bc</w>": 4}))
    (slow / "merges.txt").write_text("#version: 0.2\nb c</w>\n")
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    row = row_of(slow, ["a", "bc"])
    assert (row.kind, row.vocabulary_size, row.unreachable_pieces) == ("transformers slow", 5, None)


def test_code_that_comes_with_a_tokenizer_is_never_run(documents, tokenizer_dir, tmp_path):
    folder = remote_folder(tmp_path / "chatglm", tokenizer_dir)
    reason = reason_of(folder, documents)
    assert "needs its own code (tokenization_chatglm.ChatGLMTokenizer" in reason and "never run" in reason
    assert "its tokenizer.model can be given as a file" in reason
    assert not (folder / "ran").exists()
    (folder / "tokenizer_config.json").rename(folder / "config.json")  # the place in older folders
    assert "auto_map in config.json" in reason_of(folder, documents)
    assert row_of(folder / "tokenizer.model", documents).vocabulary_size == 600


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", "{", "Exception"),
        ("tokenizer.model", "text", "neither a SentencePiece model nor"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "{}", ""),
        ("README", "", "holds no tokenizer.json, no tokenizer.model and no tokenizer_config.json that names a class"),
    ],
)
def test_what_cannot_be_loaded_is_left_out(name, content, words, documents, tmp_path):
    (tmp_path / name).write_text(content)
    reason = reason_of(tmp_path, documents)
    assert words in reason and 10 < len(reason) < 400


def test_the_environment_stays(documents, tokenizer_dir, monkeypatch):
    for before in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if before:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        compare.compare([str(tokenizer_dir / "tokenizer.model")], documents[:3])
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(corpus, documents, tokenizer_dir, extended_dir, tmp_path):
    remote = remote_folder(tmp_path / "chatglm", tokenizer_dir)
    paths = [tokenizer_dir, remote, extended_dir / "tokenizer.model"]
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "colossal_llama2.tokenizer.compare",
            "--tokenizer_dirs",
            ",".join(map(str, paths)),
            "--data_input_dirs",
            str(corpus),
            "--output_file",
            str(tmp_path / "table.json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert not (remote / "ran").exists()
    head, first, second, left_out, total, _ = process.stdout.splitlines()
    assert len({len(head), len(first), len(second)}) == 1
    assert first.startswith(str(tokenizer_dir)) and second.startswith(str(extended_dir))
    assert left_out.startswith(f"{remote}: left out: needs its own code")
    assert total.startswith(f"{len(documents)} documents, {sum(map(len, documents)):,} characters")
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["tokenizer"] for row in table["tokenizers"]] == [str(paths[0]), str(paths[2])]
    assert table["left_out"][0]["tokenizer"] == str(remote)
    expected = row_of(paths[0], documents)
    assert table["tokenizers"][0]["compression_rate"] == pytest.approx(expected.compression_rate)
    assert table["documents"] == len(documents) and f"{expected.compression_rate:.3f}" in first


def test_a_sample_of_documents_is_drawn_by_hash(corpus, documents):
    some = compare.sample_documents([str(corpus)], 20)
    assert len(set(some)) == 20 and set(some) < set(documents)
    assert compare.sample_documents([str(corpus)], 20) == some
    assert set(compare.sample_documents([str(corpus)], 10_000)) == set(documents)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"--tokenizer_dirs": "missing"}, ["missing does not exist"]),
        ({"--tokenizer_dirs": ","}, ["empty entry"]),
        ({"--data_input_dirs": "missing"}, ["missing is not a folder"]),
        ({"--output_file": "text.jsonl"}, ["text.jsonl already exists"]),
        ({"--data_input_dirs": "empty"}, ["no text in any record"]),
        ({"--tokenizer_dirs": "empty"}, ["no tokenizer could be compared"]),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, tokenizer_dir, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text('{"target": ""}\n')
    (tmp_path / "text.jsonl").write_text('{"target": "text"}\n')
    monkeypatch.chdir(tmp_path)
    given = {"--tokenizer_dirs": str(tokenizer_dir), "--data_input_dirs": str(tmp_path)} | flags
    with pytest.raises(SystemExit) as end:
        compare.main([word for pair in given.items() for word in pair])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("compare.py: error:")
    assert all(word in lines[0] for word in words), lines[0]


def test_a_tiktoken_file_is_left_out_with_its_conversion(tmp_path, documents):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    rows, left_out = compare.compare([str(tmp_path / "tokenizer.model")], documents[:1])
    assert not rows and "convert_tiktoken" in left_out[0].error
