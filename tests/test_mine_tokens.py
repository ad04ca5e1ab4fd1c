"""mine_tokens: pieces that are closed, reachable and in order of usefulness, from a bounded sample."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.bpe_model import BpeModel
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer import mine_tokens
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from colossal_llama2.tokenizer.text_sample import Sample, draw
from examples import quickstart_corpus
from tests import tiny
from tests.byte_level import make_byte_level
from tests.conftest import ROOT

DEFAULTS = {
    "num_new_tokens": 600,
    "script": "han",
    "max_piece_length": 8,
    "min_count": 2,
    "sample_bytes": 10_000_000,
    "held_out": 0.125,
    "seed": 1024,
}
PNG = b"\x89PNG\r\n\x1a\n"


def write_corpus(folder: Path, texts, name: str = "text.jsonl") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    lines = (json.dumps({"target": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def mine(corpus, tokenizer_dir, *, curve_points: int = 0, **changes) -> mine_tokens.Mined:
    places = {
        "data_input_dirs": [str(corpus)],
        "source_tokenizer_dir": str(tokenizer_dir),
        "output_file": "not written",
    }
    return mine_tokens.mine(mine_tokens.MiningSettings(**{**places, **DEFAULTS, **changes}), curve_points=curve_points)


def chinese_texts() -> list:
    """Interface strings and dialogues, about 200 kB."""
    strings = [record["target"] for record in quickstart_corpus.translation_documents()]
    conversations = quickstart_corpus.dialogues("chinese", 400)
    return strings + ["\n".join(part["content"] for part in one["messages"]) for one in conversations]


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("mine") / "zh", chinese_texts())


@pytest.fixture(scope="module")
def mined(chinese, tokenizer_dir) -> mine_tokens.Mined:
    return mine(chinese, tokenizer_dir, curve_points=6)


def chains_are_closed(pieces, known) -> bool:
    """Every piece is a character or joins two shorter known ones, so a chain of merges leads to it."""
    known = {*known, *pieces}
    return all(
        len(piece) == 1
        or any(piece[:cut] in known and piece[cut:] in known for cut in range(1, len(piece)))
        and known.issuperset(piece)
        for piece in pieces
    )


def test_pieces_are_new_closed_and_of_the_script(mined, tokenizer_dir):
    known = BpeModel.read(tokenizer_dir).scores
    assert len(mined.pieces) == len(set(mined.pieces)) == 600
    assert not known.keys() & set(mined.pieces)
    assert chains_are_closed(mined.pieces, known)
    assert all(re.fullmatch(f"[{mine_tokens.SCRIPTS['han']}]{{1,8}}", piece) for piece in mined.pieces)
    assert {"文件", "设置", "扩展"} <= set(mined.pieces)


def test_every_prefix_of_the_list_is_a_complete_list(mined, tokenizer_dir):
    model = BpeModel.read(tokenizer_dir)
    for size in (1, 7, 50, 333, 600):
        assert mine_tokens.unreached_pieces(model, mined.pieces[:size]) == []
        assert chains_are_closed(mined.pieces[:size], model.scores)
    rates = [rate for _, rate in mined.curve]
    assert [size for size, _ in mined.curve] == [0, 100, 200, 300, 400, 500, 600]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.65 * rates[0]


def test_init_tokenizer_reads_the_list_as_it_is(mined, chinese, tokenizer_dir, tmp_path, capsys):
    file = tmp_path / "pieces.jsonl"
    file.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in mined.pieces))
    expand_tokenizer(ExtensionSettings(tokenizer_dir, tmp_path / "target", file))
    assert capsys.readouterr().out.splitlines()[-1] == "requested 600, added 600"
    # The printed figure is that of the written tokenizer.
    held_out = [text for text in dict.fromkeys(chinese_texts()) if mine_tokens.is_held_out_document(text, 0.125, 1024)]
    held_out = [text for text in held_out if re.search(f"[{mine_tokens.SCRIPTS['han']}]", text)]
    assert (mined.held_out_documents, mined.held_out_characters) == (len(held_out), sum(map(len, held_out)))
    for folder, size in ((tokenizer_dir, 0), (tmp_path / "target", 600)):
        tokens = sum(map(len, load_encoder(folder).encode(held_out)))
        assert dict(mined.curve)[size] == pytest.approx(tokens / mined.held_out_characters)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("一二三四五六。，aé \n𠀀", max_size=30), min_size=1, max_size=30),
    script=st.sampled_from(sorted(mine_tokens.SCRIPTS)),
    count=st.integers(1, 60),
    length=st.integers(1, 6),
    min_count=st.integers(1, 3),
)
def test_whatever_the_text_the_pieces_are_closed(texts, script, count, length, min_count, tokenizer_dir, tmp_path):
    corpus = write_corpus(tmp_path / "zh", texts)
    try:
        found = mine(
            corpus, tokenizer_dir, script=script, num_new_tokens=count, max_piece_length=length, min_count=min_count
        )
    except UserError as error:
        assert re.search("no text|held out no document", str(error))
        return
    model = BpeModel.read(tokenizer_dir)
    assert len(found.pieces) <= count and len(found.pieces) == len(set(found.pieces))
    assert not set(found.pieces) & set(model.pieces)
    assert all(len(piece) <= length for piece in found.pieces)
    assert chains_are_closed(found.pieces, model.scores)
    assert mine_tokens.unreached_pieces(model, found.pieces) == []


def test_a_source_with_other_merges_costs_pieces_but_leaves_none_unreachable(tmp_path, tokenizer_dir):
    """With 乙丙 in the source, 甲乙丙 cannot come from 甲乙 and 丙: the source's merge is first."""
    source = tmp_path / "source"
    expand = write_corpus(tmp_path, [], name="none.jsonl") / "pieces.jsonl"
    expand.write_text('{"piece": "乙"}\n{"piece": "丙"}\n{"piece": "乙丙"}\n')
    expand_tokenizer(ExtensionSettings(tokenizer_dir, source, expand))
    texts = [f"甲乙{'丙' if number % 3 else ''}。第{number}" for number in range(90)]
    found = mine(write_corpus(tmp_path / "zh", texts), source, num_new_tokens=20)
    model = BpeModel.read(source)
    assert "甲" in found.pieces and "乙丙" not in found.pieces
    assert mine_tokens.unreached_pieces(model, found.pieces) == []
    assert mine_tokens.unreached_pieces(model, ["甲", "甲乙", "甲乙丙丁"]) == ["甲乙丙丁"]


def test_any_script_mines_words_with_their_space(tmp_path, tokenizer_dir):
    words = "Grundstück Verkehrsüberwachung Straße wählen größer".split()
    shuffle = random.Random(0)
    texts = [" ".join(shuffle.choices(words, k=12)) + f" {number}" for number in range(200)]
    found = mine(write_corpus(tmp_path / "de", texts), tokenizer_dir, script="any", max_piece_length=12)
    assert {"▁Straße", "▁größer", "ü", "ß"} <= set(found.pieces)
    assert not any(re.search(r"\s|\d.|.\d", piece) for piece in found.pieces)
    assert mine(tmp_path / "de", tokenizer_dir, script="any", max_piece_length=5).pieces != found.pieces


@pytest.mark.slow
def test_the_budget_and_the_rarest_are_respected(chinese, mined, tokenizer_dir):
    assert mine(chinese, tokenizer_dir, num_new_tokens=100).pieces == mined.pieces[:100]
    everything = mine(chinese, tokenizer_dir, num_new_tokens=100_000, min_count=30).pieces
    text = "\n".join(chinese_texts())
    assert 100 < len(everything) < 2000
    assert all(text.count(piece) >= 30 for piece in everything)
    assert len(mine(chinese, tokenizer_dir, num_new_tokens=100_000, min_count=60).pieces) < len(everything)


@pytest.mark.slow
def test_the_result_depends_on_the_seed_and_not_on_files_order_or_repetition(tmp_path, chinese, mined, tokenizer_dir):
    texts = chinese_texts()
    random.Random(3).shuffle(texts)
    write_corpus(tmp_path / "zh", texts[:1000], "b.jsonl")
    write_corpus(tmp_path / "zh", texts[1000:] + texts[:200], "a.jsonl")
    assert mine(tmp_path / "zh", tokenizer_dir, curve_points=6) == mined
    assert mine(chinese, tokenizer_dir, seed=1).pieces != mined.pieces
    sampled = {"sample_bytes": 40_000, "num_new_tokens": 200}
    assert mine(tmp_path / "zh", tokenizer_dir, **sampled) == mine(chinese, tokenizer_dir, **sampled)


def test_held_out_text_is_never_trained_on(tmp_path, tokenizer_dir):
    """Each document has its own character, three times; those of held-out documents are in no piece."""
    texts = [chr(0x6000 + number) * 3 + "的人" for number in range(400)]
    held_out = {text[0] for text in texts if mine_tokens.is_held_out_document(text, 0.25, 1024)}
    found = mine(write_corpus(tmp_path / "zh", texts), tokenizer_dir, held_out=0.25, num_new_tokens=10_000)
    assert 60 < len(held_out) < 140 and found.held_out_documents == len(held_out)
    assert not held_out & set("".join(found.pieces))
    assert {text[0] for text in texts} - held_out <= set(found.pieces) | {"的", "人"}


def test_sources_are_text_too_and_other_scripts_are_not(tmp_path, tokenizer_dir):
    folder = tmp_path / "zh"
    folder.mkdir()
    records = [{"source": f"问题{number}", "target": "an English answer ａ"} for number in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    write_corpus(folder, ["no Chinese at all"] * 50 + [f"{number} neither" for number in range(50)], "b.jsonl")
    found = mine(folder, tokenizer_dir)
    assert set(found.pieces) == {"问", "题", "问题", "ａ"}
    assert found.train_documents + found.held_out_documents == 60


# The sample.


def test_a_sample_holds_what_fits_and_each_item_equally_often():
    hits = dict.fromkeys(range(100), 0)
    for seed in range(400):
        sample = Sample(250)
        for item in range(100):
            sample.add(draw(f"{item}", seed)[1], item, 5 if item < 50 else 15)
        assert sample.size <= 250 and sample.size > 200
        for item in sample.items():
            hits[item] += 1
    small, large = sum(hits[item] for item in range(50)), sum(hits[item] for item in range(50, 100))
    assert 0.9 < large / small < 1.1  # the size of an item hardly makes it rarer
    assert all(60 < count < 140 for count in hits.values())


@pytest.mark.slow
def test_a_sample_is_as_large_for_a_large_stream_as_for_a_small_one():
    def peak(count: int) -> int:
        tracemalloc.start()
        sample = Sample(100_000)
        for number in range(count):
            text = f"{number:0100d}"
            sample.add(draw(text, 0)[1], text, len(text))
        assert 99_000 < sample.size <= 100_000
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(40_000) < 1.2 * peak(4_000)


def test_a_sample_counts_equal_keys_once_and_drops_the_highest():
    sample = Sample(2)
    for key in (5, 5, 3, 9, 4, 4, 5):
        sample.add(key, key, 1)
    assert sample.items() == [3, 4] and sample.size == 2
    assert not sample.wants(5) and not sample.wants(3) and sample.wants(1)


def test_one_long_document_cannot_fill_the_sample(tmp_path, tokenizer_dir):
    long = "".join(random.Random(0).choices("天地玄黄宇宙洪荒", k=200_000))
    assert not mine_tokens.is_held_out_document(long, DEFAULTS["held_out"], DEFAULTS["seed"])
    texts = [long, *(f"短句子{number}" for number in range(2000))]
    found = mine(write_corpus(tmp_path / "zh", texts), tokenizer_dir, sample_bytes=20_000)
    assert 19_000 < found.train_bytes <= 20_000
    assert set("天地玄黄宇宙洪荒短句子") <= set(found.pieces)


# The command.


def run_command(*words, cwd=ROOT):
    command = [sys.executable, "-m", "colossal_llama2.tokenizer.mine_tokens", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def words_for(corpus, tokenizer_dir, output, **flags):
    words = {"data_input_dirs": corpus, "source_tokenizer_dir": tokenizer_dir, "output_file": output, **flags}
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def test_the_command_writes_the_file_and_prints_what_it_saves(chinese, mined, tokenizer_dir, tmp_path):
    output = tmp_path / "new" / "pieces.jsonl"
    process = run_command(*words_for(chinese, tokenizer_dir, output, num_new_tokens=600, min_count=2))
    assert process.returncode == 0, process.stderr
    assert [json.loads(line) for line in output.read_text("utf-8").splitlines()] == [
        {"piece": piece} for piece in mined.pieces
    ]
    assert [path.name for path in output.parent.iterdir()] == ["pieces.jsonl"]
    figures = dict(re.findall(r"^(.*?) {2,}([\d.,]+%?)$", process.stdout, flags=re.MULTILINE))
    curve = dict(mined.curve)
    assert figures["tokens per character before"] == f"{curve[0]:.4f}"
    assert figures["tokens per character after"] == f"{curve[600]:.4f}"
    assert figures["what the last 600 pieces save"] == f"{1 - curve[600] / curve[0]:.2%}"
    assert process.stdout.splitlines()[-1] == "requested 600, mined 600"


@pytest.mark.parametrize(
    "length, min_count, limits, cures",
    [
        (1, 1, " of at most 1 character", "more text or a larger --max_piece_length"),
        (
            1,
            2,
            " of at most 1 character that occur at least 2 times",
            "a larger --max_piece_length or a lower --min_count",
        ),
        (64, 300, " that occur at least 300 times", "more text or a lower --min_count"),
    ],
)
@pytest.mark.parametrize("is_byte_level", [False, True])
def test_the_limits_that_left_out_pieces_are_named(
    is_byte_level, length, min_count, limits, cures, chinese, tokenizer_dir, tmp_path, capsys
):
    base = make_byte_level(tmp_path / "base") if is_byte_level else tokenizer_dir
    flags = {"num_new_tokens": 20_000, "max_piece_length": length, "min_count": min_count}
    mine_tokens.main(list(map(str, words_for(chinese, base, tmp_path / "p.jsonl", **flags))))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("the text has"))
    assert line.startswith(f"the text has no more pieces{limits}; give ") and line.endswith(cures)


@pytest.mark.slow
def test_the_command_reports_fewer_pieces_than_requested(chinese, tokenizer_dir, tmp_path):
    process = run_command(*words_for(chinese, tokenizer_dir, tmp_path / "p.jsonl", min_count=40))
    assert process.returncode == 0, process.stderr
    count = len((tmp_path / "p.jsonl").read_text("utf-8").splitlines())
    assert process.stdout.splitlines()[-1] == f"requested 37104, mined {count}"
    assert "the text has no more pieces that occur at least 40 times" in process.stdout


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"data_input_dirs": "missing"}, ["missing is not a folder"]),
        ({"source_tokenizer_dir": "missing"}, ["missing is not a folder"]),
        ({"output_file": "text.jsonl"}, ["text.jsonl already exists"]),
        ({"output_file": "text.jsonl/p"}, ["--output_file", "cannot be written"]),
        ({"plot": "curve.svg"}, ["curve.svg does not end in .png"]),
        ({"plot": "text.jsonl"}, ["already exists"]),
        ({"max_piece_length": "65"}, ["--max_piece_length 65", "at most 64"]),
        ({"min_count": "100"}, ["no text to train on", "100 times"]),
        ({"held_out": "0.0001"}, ["held out no document"]),
        ({"held_out": "1"}, ["--held_out", "below 1"]),
        ({"script": "latin"}, ["--script", "han"]),
        ({"num_new_tokens": "0"}, ["at least 1"]),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, tokenizer_dir, monkeypatch, capsys):
    write_corpus(tmp_path, ["你好，世界"] * 3 + ["你好"])
    monkeypatch.chdir(tmp_path)
    given = words_for(tmp_path, tokenizer_dir, "p.jsonl", **({"min_count": "1"} | flags))
    with pytest.raises(SystemExit) as end:
        mine_tokens.main(list(map(str, given)))
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("mine_tokens.py: error:")
    assert all(word in lines[0] for word in words), lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize(
    "line, words",
    [("{", "not JSON"), ('{"body": "a"}', '"target" is missing'), ('{"target": 3}', "must be a string")],
)
def test_a_bad_line_is_named(line, words, tmp_path, tokenizer_dir):
    (tmp_path / "a.jsonl").write_text('{"target": "你好"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{words}"):
        mine(tmp_path, tokenizer_dir)


def test_a_missing_matplotlib_is_reported_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plot needs matplotlib.*pip install matplotlib"):
        mine_tokens._check_can_plot(tmp_path / "curve.png")


@pytest.mark.slow
def test_the_curve_is_a_png(mined, tmp_path, chinese, tokenizer_dir, capsys):
    plot = tmp_path / "curve.png"
    words = words_for(chinese, tokenizer_dir, tmp_path / "p.jsonl", num_new_tokens=600, min_count=2, plot=plot)
    mine_tokens.main(list(map(str, words)))
    assert plot.read_bytes().startswith(PNG) and plot.stat().st_size > 5000
    assert "requested 600, mined 600" in capsys.readouterr().out


def test_flags_and_function_agree():
    parser = tokenizer_flags.mine_tokens_parser()
    flags = {action.dest for action in parser.actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(mine_tokens.MiningSettings)}
    assert set(tokenizer_flags.MINED_SCRIPTS) == set(mine_tokens.SCRIPTS)
    assert tiny.CHINESE and "".join(re.findall(f"[{mine_tokens.SCRIPTS['han']}]", tiny.CHINESE)) == tiny.CHINESE
