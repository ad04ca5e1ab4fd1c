"""The two prepare commands: the requested bins, equal bytes twice, every token accounted for, every refusal."""

import os
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from colossal_llama2 import errors
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write import bins, prepare
from colossal_llama2.dataset.write.unit_counts import MASKED_PIECES
from colossal_llama2.encoding.registry import load_encoder
from tests import tiny
from tests.preparing import contents, flags, read_jsonl, settings, write_lines

MESSI = {
    "source": "",
    "target": "Lionel Andrés Messi(Spanish pronunciation: [ljoˈnel anˈdɾes ˈmesi] (i); born 24 June 1987), also known "
    "as Leo Messi, is an Argentine professional footballer who plays as a forward for and captains both Major League "
    "Soccer club Inter Miami and the Argentina national team.",
    "category": "sports",
}
RIDDLE = {
    "source": "猜谜语:一身卷卷细毛,吃的青青野草,过了数九寒冬,无私献出白毛。(打一动物)",
    "target": "白羊",
    "category": "riddle",
}
COLORS = {
    "messages": [
        {"from": "human", "content": "What are the three primary colors?"},
        {"from": "assistant", "content": "The three primary colors are red, blue, and yellow."},
    ]
}
ZH = {
    "messages": [
        {"from": "human", "content": "解释个人电脑和服务器之间的区别。"},
        {"from": "assistant", "content": "个人电脑和服务器是两种不同类型的计算机系统。"},
    ]
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two folders of documents: the README's, English paragraphs, long ones, and one with a source over max_length."""
    folder = tmp_path_factory.mktemp("corpus")
    paragraphs = tiny.english_documents()[:90]
    rows = [{"target": text, "category": f"topic-{number % 3}"} for number, text in enumerate(paragraphs)]
    long_source = {"source": "\n".join(paragraphs[:5]), "target": "Thus ends the source."}
    write_lines(folder / "en" / "b.jsonl", rows[:40])
    write_lines(folder / "en" / "a.jsonl", [*rows[40:], b"", b"  ", long_source, {"target": "\n".join(paragraphs)}])
    write_lines(folder / "zh" / "z.jsonl", [RIDDLE, MESSI])
    (folder / "en" / "notes.txt").write_text("not read")
    return folder


def test_readme_rows_of_pretraining(run_forked, tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [MESSI, RIDDLE])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=4096)
    done = run_forked("prepare_pretrain_dataset.py", *flags(keywords), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    encoder = load_encoder(tokenizer_dir)
    messi = [1, *encoder.encode([MESSI["target"]])[0], 2]
    source = [1, *encoder.encode([RIDDLE["source"]])[0]]
    target = [*encoder.encode([RIDDLE["target"]], dummy_prefix=False)[0], 2]
    parts = [(messi, messi), (source + target, [IGNORE_INDEX] * len(source) + target)]
    (row,) = read_jsonl(tmp_path / "jsonl")
    orders = [(a[0] + b[0], a[1] + b[1]) for a, b in (parts, parts[::-1])]
    assert (row["input_ids"], row["labels"]) in orders
    assert sorted(row["sequence_lengths"]) == sorted([len(messi), len(source + target)])
    messi_first = row["sequence_lengths"][0] == len(messi)
    ordered = (lambda *values: list(values)) if messi_first else (lambda *values: list(values[::-1]))
    assert row["document_categories"] == ordered("sports", "riddle")
    assert row["document_sources"] == ["in", "in"]
    assert row["document_target_bytes"] == ordered(*(len(each["target"].encode()) for each in (MESSI, RIDDLE)))
    part = datasets.load_from_disk(str(tmp_path / "arrow" / "part-00000"))
    assert part.to_list() == [row]
    assert all(part.features[name].feature.dtype == "int32" for name in ("input_ids", "labels", "sequence_lengths"))
    assert re.search(rf"tokens in +{len(row['input_ids']):,}\n", done.stdout), done.stdout
    assert re.search(rf"masked +{len(source):,} ", done.stdout), done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"in", "cache", "jsonl", "arrow"}


def test_readme_rows_of_fine_tuning(run_forked, tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [COLORS, {**ZH, "category": "computers"}])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=4096)
    done = run_forked("prepare_sft_dataset.py", *flags(keywords), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["seq_category"]: row for row in read_jsonl(tmp_path / "jsonl")}
    assert set(rows) == {"None", "computers"}
    colors = rows["None"]
    assert colors["labels_decode"] == [COLORS["messages"][1]["content"] + "</s>"]
    assert colors["inputs_decode"].startswith("<s>A chat between a curious human")
    assert colors["inputs_decode"].endswith("yellow.</s>")
    assert colors["seq_length"] == len(colors["input_ids"]) == len(colors["labels"])
    part = datasets.load_from_disk(str(tmp_path / "arrow" / "part-00000"))
    assert part.to_list() == read_jsonl(tmp_path / "jsonl")
    assert part.features["input_ids"].feature.dtype == part.features["labels"].feature.dtype == "int32"


@pytest.mark.slow
@pytest.mark.parametrize("num_bins", [1, 7, 10, 30, 64, 128])
def test_as_many_bins_as_asked_and_no_token_lost(corpus, tokenizer_dir, tmp_path, capsys, num_bins):
    keywords = settings([corpus / "en", corpus / "zh"], tokenizer_dir, tmp_path, bins=num_bins)
    prepare.prepare_pretrain(**keywords)
    names = [f"part-{number:05d}" for number in range(num_bins)]
    assert sorted(path.name for path in (tmp_path / "arrow").iterdir()) == ["manifest.json", *names]
    assert sorted(path.name for path in (tmp_path / "jsonl").iterdir()) == [f"{name}.jsonl" for name in names]
    parts = [datasets.load_from_disk(str(tmp_path / "arrow" / name)) for name in names]
    assert all(len(part) for part in parts)
    samples = [sample for part in parts for sample in part.to_list()]
    assert samples == read_jsonl(tmp_path / "jsonl")
    assert max(len(sample["input_ids"]) for sample in samples) <= 128
    table = capsys.readouterr().out
    tokens_in = int(re.search(r"tokens in +([\d,]+)", table)[1].replace(",", ""))
    dropped = int(re.search(r"dropped +([\d,]+)", table)[1].replace(",", ""))
    assert sum(len(sample["input_ids"]) for sample in samples) + dropped == tokens_in
    assert dropped and re.search(rf"{dropped:,} +in \d+ {MASKED_PIECES}", table)
    assert re.search(r"documents +94 +2 empty lines skipped", table)


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(run_script, corpus, tokenizer_dir, tmp_path):
    for name in ("1", "2"):
        keywords = settings([corpus / "en"], tokenizer_dir, tmp_path / name, bins=7)
        environment = {**os.environ, "PYTHONHASHSEED": name}
        done = run_script("prepare_pretrain_dataset.py", *flags(keywords), cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    first, second = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert len(first) >= 28 and first == second


def test_fine_tuning_counts_what_it_drops(tokenizer_dir, tmp_path, capsys):
    unanswered = {"messages": [{"from": "human", "content": "Hello?"}]}
    trailing = {"messages": [*COLORS["messages"], {"from": "human", "content": "And then?"}]}
    too_long = {"messages": [{"from": "human", "content": "long " * 300}, *COLORS["messages"]]}
    cut = {"messages": [*COLORS["messages"], {"from": "user", "content": "long " * 300}, *COLORS["messages"]]}
    write_lines(tmp_path / "in" / "rows.jsonl", [COLORS, unanswered, trailing, too_long, cut])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=256, bins=3)
    prepare.prepare_sft(**keywords)
    table = capsys.readouterr().out
    reasons = ("without an answer", "whose last messages have", "whose first exchange is over", "cut after the last")
    for reason in reasons:
        assert re.search(rf"[\d,]+ +in 1 conversations {reason}", table), table
    rows = read_jsonl(tmp_path / "jsonl")
    assert len(rows) == 3 and all(row["input_ids"] == rows[0]["input_ids"] for row in rows)


def test_marks_in_text_stay_text(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "<s>struck</s> out <s>"}])
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path))
    (row,) = read_jsonl(tmp_path / "jsonl")
    assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1
    assert load_encoder(tokenizer_dir).decode(row["input_ids"][1:-1]) == "<s>struck</s> out <s>"


BAD_LINES = [
    ("pretrain", b'{"target": ', "not JSON"),
    ("pretrain", b'{"target": NaN}', '"target" is missing'),
    ("pretrain", b'{"target": "a", "m": NaN, }', "not JSON"),
    ("pretrain", b'{"target": "\\ud800"}', "surrogate"),
    ("pretrain", b'{"target": "\xff"}', "not UTF-8 at byte 13"),
    ("pretrain", b'["target"]', "a JSON list given"),
    ("pretrain", b"null", "null given; each line"),
    ("pretrain", b'{"data": [{"text": "a"}], "v": "1"}', "the records are inside 'data'; write only that list"),
    ("pretrain", b'{"1": {"text": "a"}, "2": {"text": "b"}}', "each value of this object is a record"),
    ("pretrain", b'{"source": "a"}', '"target" is missing'),
    ("pretrain", b'{"target": 3}', '"target" must be a string'),
    ("sft", b'{"target": "a"}', '"messages" is missing'),
    ("sft", b'{"messages": [{"from": "bot", "content": "a"}]}', "'bot'; roles are human, user"),
    ("sft", b'{"messages": [{"from": "human"}]}', "message 1 must be"),
]


@pytest.mark.parametrize("stage, line, reason", BAD_LINES)
def test_bad_lines_name_file_and_line(tokenizer_dir, tmp_path, stage, line, reason):
    good = MESSI if stage == "pretrain" else COLORS
    path = write_lines(tmp_path / "in" / "rows.jsonl", [good, b"", line])
    command = {"pretrain": prepare.prepare_pretrain, "sft": prepare.prepare_sft}[stage]
    with pytest.raises(errors.UserError, match=re.escape(f"{path}:3: ")) as caught:
        command(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_both_commands_with_one_line(run_forked, assert_user_error, tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "in" / "rows.jsonl", [{"source": "a"}])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    for script, word in (("prepare_pretrain_dataset.py", '"target"'), ("prepare_sft_dataset.py", '"messages"')):
        done = run_forked(script, *flags(keywords), cwd=tmp_path)
        assert_user_error(done, f"{script}: error: {path}:1: {word} is missing")
    assert not (tmp_path / "out").exists()


def make_mistake(name: str, keywords: dict, folder: Path) -> None:
    """Change `keywords` or the files so that the command must refuse."""
    if name == "missing input":
        keywords["data_input_dirs"].append(str(folder / "nowhere"))
    elif name == "a file as input":
        keywords["data_input_dirs"] = [str(folder / "in" / "rows.jsonl")]
    elif name == "input twice":
        keywords["data_input_dirs"].append(str(folder / "in" / ".." / "in"))
    elif name == "no jsonl":
        (folder / "empty").mkdir()
        keywords["data_input_dirs"].append(str(folder / "empty"))
    elif name == "no rows":
        write_lines(folder / "in" / "rows.jsonl", [b"", b" "])
    elif name == "more bins than rows":
        keywords["num_spliced_dataset_bins"] = 30
    elif name == "output exists":
        (folder / "out" / "jsonl").mkdir(parents=True)
    elif name == "outputs nested":
        keywords["data_arrow_output_dir"] = str(folder / "out" / "jsonl" / "arrow")
    elif name == "output below a file":
        keywords["data_cache_dir"] = str(folder / "in" / "rows.jsonl" / "cache")
    elif name == "no tokenizer":
        keywords["tokenizer_dir"] = str(folder / "in")


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing input", ["nowhere is not a folder"]),
        ("a file as input", ["rows.jsonl is a file", "give a folder, all of whose data files are read, ", "/in"]),
        ("input twice", ["given twice"]),
        ("no jsonl", ["empty has no data file"]),
        ("no rows", ["nothing to prepare", "0 records gave 0 pieces"]),
        ("more bins than rows", ["--num_spliced_dataset_bins 30", "2 records gave 3 pieces", "at most 3"]),
        ("output exists", ["--data_jsonl_output_dir", "already exists", "remove it"]),
        ("outputs nested", ["--data_arrow_output_dir", "inside"]),
        ("output below a file", ["--data_cache_dir", "cannot be written"]),
        ("no tokenizer", ["tokenizer.model"]),
    ],
)
def test_refused_before_anything_is_written(tokenizer_dir, tmp_path, name, words):
    write_lines(tmp_path / "in" / "rows.jsonl", [MESSI, RIDDLE])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    make_mistake(name, keywords, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.UserError) as caught:
        prepare.prepare_pretrain(**keywords)
    assert all(word in str(caught.value) for word in words), caught.value
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_usable_row_the_reason_and_its_cure_are_reported(tokenizer_dir, tmp_path):
    opening, question = {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "q"}
    too_long = {"role": "assistant", "content": "word " * 500}
    bad, cut = {"messages": [{"role": "oracle", "content": "a"}]}, {"messages": [opening, question, too_long]}
    for name, row, words in (
        ("bad", bad, r"1 bad row skipped, most often \(1\): a message of an unknown role; give folders"),
        ("cut", cut, "1 dropped: conversations whose first trained answer ends over max_length; give a larger --max_l"),
    ):
        write_lines(tmp_path / name / "rows.jsonl", [row])
        keywords = settings([tmp_path / name], tokenizer_dir, tmp_path / "out", max_length=256, on_bad_row="skip")
        with pytest.raises(errors.UserError, match=words):
            prepare.prepare_sft(**keywords)


def test_a_lost_token_is_an_error_of_the_run(monkeypatch, tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [MESSI, RIDDLE])
    splice = bins.splice

    def lose_a_piece(lengths, documents, **keywords):
        order, counts = splice(lengths, documents, **keywords)
        return order[:-1], np.array([len(order) - 1])

    monkeypatch.setattr(bins, "splice", lose_a_piece)
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", max_length=4096)
    with pytest.raises(errors.RunError, match="do not balance"):
        prepare.prepare_pretrain(**keywords)
    assert not (tmp_path / "out" / "arrow").exists() and not (tmp_path / "out" / "jsonl").exists()
