"""The options of the prepare commands: workers, shares, splicing, cutting, held-out part, bad rows, compression."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.cells import cell_len

from colossal_llama2.cli import data_flags as command_lines
from colossal_llama2.corpus import conversation as talks
from colossal_llama2.corpus import data_files
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.dataset.layout.prepare_settings import Settings, WorkSizes
from colossal_llama2.dataset.write import choose_encoder, prepare, tokenization
from colossal_llama2.dataset.write.local_workers import run_tasks
from colossal_llama2.dataset.write.prepare_config import PrepareConfig
from colossal_llama2.encoding.fast_encoder import FastEncoder
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.lines import MAX_LINE_BYTES
from tests import tiny
from tests.preparing import contents, expected_pieces, manifest, pieces_of, read_jsonl, settings, write_lines

TEXTS_OF_THEIR_OWN = [f"{number}: {text[:90]}" for number, text in enumerate(tiny.english_documents()[:60])]
COMMANDS = {"pretrain": prepare.prepare_pretrain, "sft": prepare.prepare_sft}
UNIT_BYTES = 4000


# With these, small data makes several units of work.
SMALL_UNITS = WorkSizes(unit_bytes=UNIT_BYTES)


def documents(count: int) -> list:
    return [
        {"target": text, "category": f"topic-{number % 3}", **({"source": "Why? "} if number % 5 == 0 else {})}
        for number, text in enumerate(tiny.english_documents()[:count])
    ]


def conversations(count: int) -> list:
    texts = tiny.english_documents()[: 2 * count]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """One folder for each stage, with large files and small ones, plain, compressed and of other forms."""
    folder = tmp_path_factory.mktemp("inputs")
    for stage, rows in (("pretrain", documents(120)), ("sft", conversations(60))):
        write_lines(folder / stage / "large.jsonl", rows[:40])
        write_lines(folder / stage / "small.jsonl", rows[40:42])
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows[42:])
        (folder / stage / "packed.jsonl.zst").write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
        (folder / stage / "again.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        lines = b"".join(json.dumps(row).encode() + b"\r" for row in rows[10:40])
        (folder / stage / "returns.jsonl").write_bytes(lines)
        (folder / stage / "array.json").write_text(json.dumps(rows[5:25], indent=1))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[30:50]), folder / stage / "table.parquet")
    return {stage: folder / stage for stage in COMMANDS}


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_bytes_do_not_depend_on_the_workers(stage, inputs, tokenizer_dir, tmp_path):
    for num_workers in (1, 2, 5):
        output = tmp_path / str(num_workers)
        keywords = settings([inputs[stage]], tokenizer_dir, output, max_length=300, bins=3, eval_fraction=0.2)
        COMMANDS[stage](**{**keywords, "num_workers": num_workers, "sizes": SMALL_UNITS})
    one, two, five = (contents(tmp_path / name) for name in ("1", "2", "5"))
    assert one == two == five
    assert len(one) >= 4 * 4 + 1 and not list((tmp_path / "1" / "cache").iterdir())


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_write_the_same_bytes_as_one_run(order, inputs, tokenizer_dir, tmp_path):
    keywords = settings([inputs["pretrain"]], tokenizer_dir, tmp_path / "whole", bins=2, eval_fraction=0.2)
    prepare.prepare_pretrain(**keywords, sizes=SMALL_UNITS)
    keywords = settings([inputs["pretrain"]], tokenizer_dir, tmp_path / "shared", bins=2, eval_fraction=0.2)
    for number in order:
        assert not (tmp_path / "shared" / "arrow").exists()
        prepare.prepare_pretrain(**keywords, shard=(number, 3), sizes=SMALL_UNITS)
    assert contents(tmp_path / "whole") == contents(tmp_path / "shared")


def test_the_manifest_accounts_for_everything(inputs, tokenizer_dir, tmp_path):
    keywords = settings([inputs["pretrain"]], tokenizer_dir, tmp_path, bins=3)
    prepare.prepare_pretrain(**keywords)
    written = manifest(tmp_path)
    total = written["total"]
    dropped = sum(drop["tokens"] for drop in total["dropped"].values())
    assert total["tokens_in"] == total["trained"] + total["masked"] + total["truncated"] + dropped
    for name in ("documents", "bytes", "characters", "tokens_in", "trained", "masked", "pieces"):
        assert sum(file[name] for file in written["inputs"]) == total[name]
        assert sum(tally[name] for tally in written["categories"].values()) == total[name]
    assert written["tokenizer"]["sha256"] == fingerprint(tokenizer_dir)
    assert written["tokenizer"]["sample_differing"] == 0
    assert set(written["categories"]) == {"topic-0", "topic-1", "topic-2"}
    assert [Path(file["path"]).name for file in written["inputs"]] == [
        "again.jsonl.gz",
        "array.json",
        "large.jsonl",
        "packed.jsonl.zst",
        "returns.jsonl",
        "small.jsonl",
        "table.parquet",
    ]
    for file in written["inputs"]:
        content = Path(file["path"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), prepare.manifest.sha256_of(file["path"]))
    samples = read_jsonl(tmp_path / "jsonl")
    assert written["samples"] == len(samples)
    assert sum(each["tokens"] for each in written["bins"]) == total["trained"] + total["masked"]
    assert written["settings"]["splicing"] == "best_fit" and written["settings"]["seed"] == 1024
    tokens = [entry["tokens"] for entry in written["bins"]]
    assert max(tokens) - min(tokens) <= 128


TEXTS = st.text(st.sampled_from("ab the <s>/人工😀\n▁"), max_size=60)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"target": TEXTS.filter(bool)}, optional={"source": TEXTS, "category": st.sampled_from(["x", "y"])}
    ),
    min_size=3,
    max_size=12,
)


@pytest.mark.slow
@given(
    rows=ROWS,
    max_length=st.integers(8, 40),
    splicing=st.sampled_from(["best_fit", "sequential", "none"]),
    overlong=st.sampled_from(["split", "truncate"]),
    eval_fraction=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9),
)
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_piece_of_any_documents_is_there_once(
    rows, max_length, splicing, overlong, eval_fraction, seed, tokenizer_dir, encoder
):
    options = {"splicing": splicing, "overlong": overlong, "eval_fraction": eval_fraction, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        write_lines(output / "in" / "rows.jsonl", rows)
        keywords = settings([output / "in"], tokenizer_dir, output, max_length=max_length, **options)
        expected = expected_pieces(rows, encoder=encoder, max_length=max_length, overlong=overlong)
        try:
            prepare.prepare_pretrain(**keywords)
        except UserError as error:
            assert "nothing to prepare" in str(error) or "holds out nothing" in str(error) or "at most 0" in str(error)
            assert eval_fraction or not expected
            return
        samples = read_jsonl(output / "jsonl")
        total = manifest(output)["total"]
    assert Counter(pieces_of(samples)) == expected
    assert all(len(sample["input_ids"]) <= max_length for sample in samples)
    trained = sum(label != -100 for sample in samples for label in sample["labels"])
    dropped = sum(drop["tokens"] for drop in total["dropped"].values())
    assert total["trained"] == trained
    assert total["tokens_in"] == trained + total["masked"] + total["truncated"] + dropped
    assert splicing != "none" or all(len(sample["sequence_lengths"]) == 1 for sample in samples)


@pytest.fixture(scope="module")
def encoder(tokenizer_dir) -> SentencePieceEncoder:
    return load_encoder(tokenizer_dir)


def test_truncate_is_counted(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "word " * 100}, {"target": "short"}])
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=32, overlong="truncate"))
    total = manifest(tmp_path)["total"]
    assert total["truncated"] == total["tokens_in"] - total["trained"] > 0 and total["cut_documents"] == 1


def test_held_out_documents_are_only_in_eval(tokenizer_dir, tmp_path):
    rows = [{**row, "target": f"{number} {row['target']}"} for number, row in enumerate(documents(300))]
    # Equal texts stay together, wherever they are.
    write_lines(tmp_path / "in" / "rows.jsonl", [*rows, *rows[:50]])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=4096, bins=2, eval_fraction=0.3)
    prepare.prepare_pretrain(**keywords)
    held_out, first, second = (
        datasets.load_from_disk(str(tmp_path / "arrow" / name)).to_list()
        for name in ("eval", "part-00000", "part-00001")
    )
    ours, theirs = ({ids for ids, _, _ in pieces_of(samples)} for samples in (held_out, first + second))
    assert ours and theirs and not ours & theirs
    assert (tmp_path / "jsonl" / "eval.jsonl").is_file()
    categories = Counter(name for sample in held_out for name in sample["document_categories"])
    whole = Counter(row["category"] for row in [*rows, *rows[:50]])
    assert all(0.15 < categories[name] / count < 0.45 for name, count in whole.items())
    written = manifest(tmp_path)
    assert written["eval"]["name"] == "eval" and written["total"]["held_out_documents"] == sum(categories.values())


def test_held_out_documents_that_are_dropped_are_not_counted(tokenizer_dir, tmp_path):
    """A source over max_length leaves nothing to predict: such documents are not in eval/."""
    texts = enumerate(TEXTS_OF_THEIR_OWN)
    rows = [{"target": text, "source": text * 9 if number % 3 else ""} for number, text in texts]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    options = {"max_length": 64, "overlong": "truncate", "splicing": "none", "eval_fraction": 0.5}
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path, **options))
    held_out = datasets.load_from_disk(str(tmp_path / "arrow" / "eval"))
    written = manifest(tmp_path)
    assert 5 < written["total"]["held_out_documents"] == written["eval"]["samples"] == len(held_out)
    assert written["total"]["held_out_documents"] == sum(file["held_out_documents"] for file in written["inputs"])


VARIANTS = [
    lambda text: {"target": text},
    lambda text: {"target": text, "source": "Read this. "},
    lambda text: {"target": f"{text} "},
    lambda text: {"target": unicodedata.normalize("NFD", text).replace(" ", "\u00a0\n").upper()},
    lambda text: {"target": "\u200b".join(text), "category": "other"},
]


def test_copies_of_a_text_are_on_one_side(tokenizer_dir, tmp_path):
    texts = [f"{text} Ünïcode" for text in TEXTS_OF_THEIR_OWN]
    keywords = {"max_length": 4096, "splicing": "none", "eval_fraction": 0.4}
    for number, variant in enumerate(VARIANTS):
        write_lines(tmp_path / "in" / f"{number}.jsonl", map(variant, texts))
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path, **keywords))
    counts = [file["held_out_documents"] for file in manifest(tmp_path)["inputs"]]
    assert 5 < counts[0] < len(texts) - 5 and counts == [counts[0]] * len(VARIANTS)
    turns = [{"from": "human", "content": "Tell me."}, {"from": "assistant", "content": "No: "}]
    for number, (before, after) in enumerate((([], []), ([{"from": "system", "content": "Be kind."}], turns[:1]))):
        rows = [
            {"messages": [*before, turns[0], {"from": "assistant", "content": text + " " * number}, *after]}
            for text in texts
        ]
        write_lines(tmp_path / "chat" / f"{number}.jsonl", rows)
    prepare.prepare_sft(**settings([tmp_path / "chat"], tokenizer_dir, tmp_path / "sft", **keywords))
    counts = [file["held_out_documents"] for file in manifest(tmp_path / "sft")["inputs"]]
    assert 5 < counts[0] < len(texts) - 5 and counts == [counts[0]] * 2


def test_a_fraction_that_holds_out_nothing_is_refused(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", documents(2))
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", eval_fraction=1e-9)
    with pytest.raises(UserError, match="--eval_fraction 1e-09 holds out nothing of 2 documents"):
        prepare.prepare_pretrain(**keywords)
    assert not (tmp_path / "out").exists()


def test_no_jsonl(inputs, tokenizer_dir, tmp_path):
    prepare.prepare_pretrain(**settings([inputs["pretrain"]], tokenizer_dir, tmp_path / "with"))
    prepare.prepare_pretrain(**settings([inputs["pretrain"]], tokenizer_dir, tmp_path / "without"), no_jsonl=True)
    assert {path.name for path in (tmp_path / "without").iterdir()} == {"cache", "arrow"}
    part = "part-00000/data-00000-of-00001.arrow"
    assert contents(tmp_path / "with" / "arrow")[part] == contents(tmp_path / "without" / "arrow")[part]


def test_conversations_are_packed_uncut(inputs, tokenizer_dir, tmp_path):
    for splicing in ("none", "best_fit"):
        keywords = settings([inputs["sft"]], tokenizer_dir, tmp_path / splicing, max_length=1000, splicing=splicing)
        prepare.prepare_sft(**keywords)
    alone, packed = (read_jsonl(tmp_path / splicing / "jsonl") for splicing in ("none", "best_fit"))
    assert Counter(pieces_of(alone)) == Counter(pieces_of(packed))
    assert len(packed) < len(alone) and all(sample["seq_length"] <= 1000 for sample in packed)
    assert all(len(sample["labels_decode"]) == len(sample["sequence_lengths"]) for sample in packed)
    assert manifest(tmp_path / "none")["formats"] == {"role/content": 148}
    assert (tmp_path / "none" / "arrow" / "chat_template.jinja").read_text() == chat_template(prefix_after_marks=False)


BAD_LINES = {
    b'{"target": "a", "m": ' + b"[" * 256 + b"]" * 256 + b"}": "more than 256 deep",
    b'{"target": "a", "m": ' + b'{"m":' * 900 + b"1" + b"}" * 901: "more than 256 deep",
    b'{"target": "a", "m": 1' + b"0" * 400 + b"}": "not JSON",
    b'{"target": "a", ' + b"".join(b'"k%d": 1, ' % n for n in range(3000)) + b'"target": 2}': "is repeated",
    b'{"target": ': "not JSON",
    b'{"target": NaN}': '"target" is missing',
    b'{"m": NaN, "target": "\\ud800"}': "not JSON",
    b'{"target": "\xff"}': "not UTF-8",
    b'{"target": "\\ud800"}': "surrogate",
    b'{"target": 3}': '"target" must be a string',
    b'{"target": ""}': '"target" is empty',
    b'{"source": "a"}': '"target" is missing',
    b'{"target": "a", "target": "b"}': "is repeated",
    b"[1]": "a JSON list given",
    b'{"target": ' + b"[" * 100_000: "not JSON",
}


def test_bad_rows_are_skipped_and_listed(tokenizer_dir, tmp_path):
    rows = documents(len(BAD_LINES) * 4)
    lines, bad = [], []
    for number, row in enumerate(rows):
        lines.append(row)
        if number % 4 == 3:
            lines.append(list(BAD_LINES)[number // 4])
            bad.append(len(lines))
    write_lines(tmp_path / "bad" / "rows.jsonl", lines)
    write_lines(tmp_path / "good" / "rows.jsonl", rows)
    for name in ("bad", "good"):
        keywords = settings([tmp_path / name], tokenizer_dir, tmp_path / f"out-{name}", on_bad_row="skip")
        prepare.prepare_pretrain(**keywords, sizes=SMALL_UNITS)
    listed = [json.loads(line) for line in (tmp_path / "out-bad" / "arrow" / "bad_rows.jsonl").read_text().splitlines()]
    path = str(tmp_path / "bad" / "rows.jsonl")
    assert [(row["file"], row["line"]) for row in listed] == [(path, line) for line in bad]
    assert all(problem in row["problem"] for row, problem in zip(listed, BAD_LINES.values(), strict=True))
    counted = manifest(tmp_path / "out-bad")["bad_reasons"]
    assert counted == Counter(row["reason"] for row in listed)
    assert max(map(len, counted)) < 40
    skipped, clean = (Counter(pieces_of(read_jsonl(tmp_path / f"out-{name}" / "jsonl"))) for name in ("bad", "good"))
    assert skipped == clean and manifest(tmp_path / "out-bad")["bad_rows"] == len(BAD_LINES)


def test_a_huge_line_is_one_bad_row(tokenizer_dir, tmp_path):
    huge = b'{"target": "' + b"x" * MAX_LINE_BYTES + b'"}'
    path = write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "before"}, huge, {"target": "after"}])
    with pytest.raises(UserError, match=rf"{path}:2: a line of {len(huge) + 1:,} bytes, at most 32 MiB allowed"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", on_bad_row="skip")
    prepare.prepare_pretrain(**keywords)
    assert manifest(tmp_path / "out")["total"]["documents"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_compressed_data_is_reported_with_its_line(kind, tokenizer_dir, tmp_path, caplog, capsys):
    lines = b"".join(json.dumps({"target": f"{random.Random(n).random()} text"}).encode() + b"\n" for n in range(9000))
    packed = gzip.compress(lines) if kind == "gz" else pyarrow.compress(lines, codec="zstd", asbytes=True)
    path = tmp_path / "in" / f"rows.jsonl.{kind}"
    path.parent.mkdir()
    path.write_bytes(packed[: len(packed) // 2])
    # The number of bytes that can be decompressed.
    whole = 0
    stream = gzip.open(path) if kind == "gz" else pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    with contextlib.suppress(EOFError, OSError):
        while byte := stream.read(1):
            whole += byte == b"\n"
    assert whole > 500
    with pytest.raises(UserError, match=rf"{path}:{whole + 1}: the compressed data is cut short.*on_bad_file skip"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", on_bad_row="skip", splicing="none")
    for _ in range(2):  # The second finds finished output.
        with pytest.raises(RunError, match=rf"1 of the input files .* such as {path}; {tmp_path}.* is complete"):
            prepare.prepare_pretrain(**keywords)
        assert f"lost: {path}:{whole + 1}: the compressed data is cut short" in caplog.text
        assert "LOST FILES" in capsys.readouterr().out
        caplog.clear()
    prepare.prepare_pretrain(**keywords, on_bad_file="skip")
    assert "lost: " in caplog.text
    assert len(read_jsonl(tmp_path / "out" / "jsonl")) == whole
    written = manifest(tmp_path / "out")
    assert written["bad_rows"] == 0 and written["lines"] == whole
    assert [(lost["file"], lost["line"]) for lost in written["lost_files"]] == [(str(path), whole + 1)]
    assert written["inputs"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_compressed_file_with_nothing_in_it_is_refused(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", documents(2))
    (tmp_path / "in" / "more.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="more.jsonl.gz is empty; move it away"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))


def test_names_of_categories_reach_the_terminal_as_text(tokenizer_dir, tmp_path, capsys):
    names = ["\x1b[31mred\nline", "新闻", "news"]
    write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "a text", "category": name} for name in names])
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    written = capsys.readouterr().out
    assert "\x1b" not in written and "␛[31mred␊line" in written
    lines = [line for line in written.splitlines() if line.startswith(("新闻", "news "))]
    assert len(lines) == 2 and cell_len(lines[0]) == cell_len(lines[1])


@pytest.mark.slow
def test_many_categories_are_dealt_in_a_moment(tokenizer_dir, tmp_path):
    rows = [{"target": "a short text", "category": f"page {number}"} for number in range(4000)]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", bins=3))
    written = manifest(tmp_path / "out")
    assert len(written["categories"]) == 4000 and all(tally["pieces"] == 1 for tally in written["categories"].values())


@pytest.mark.parametrize("difference", ["none", "tokenizer.json", "the fast encoder"])
def test_the_sample_covers_the_input_and_decides_the_encoder(difference, tokenizer_dir, tmp_path, monkeypatch, caplog):
    """A difference that only occurs in texts late in the last file."""
    for name in "abc":
        write_lines(tmp_path / "in" / f"{name}.jsonl", [{"target": f"the {name} {number}"} for number in range(900)])
    last = [f"{'the c' if number < 700 else 'late'} {number}" for number in range(900)]
    write_lines(tmp_path / "in" / "c.jsonl", [{"target": text} for text in last])
    folder = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    if difference == "tokenizer.json":
        content = json.loads((folder / "tokenizer.json").read_bytes())
        replacing = {"type": "Replace", "pattern": {"String": "late"}, "content": "early"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [replacing]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif difference == "the fast encoder":
        own = FastEncoder.encode

        def encode(self, texts, *, dummy_prefix=True):
            return own(self, [text.replace("late", "early") for text in texts], dummy_prefix=dummy_prefix)

        monkeypatch.setattr(FastEncoder, "encode", encode)
    files = data_files.find_input_files([str(tmp_path / "in")])
    encoder, counts = choose_encoder.choose_encoder(str(folder), files, settings_of("pretrain"))
    assert encoder is (SentencePieceEncoder if difference == "the fast encoder" else FastEncoder)
    assert counts["sample_texts"] == 198 and bool(counts["sample_differing"]) is (difference == "tokenizer.json")
    assert bool(caplog.records) is (difference != "none")


def settings_of(stage: str) -> Settings:
    return Settings(
        stage=stage,
        max_length=128,
        num_bins=1,
        seed=0,
        overlong="split",
        splicing="best_fit",
        on_bad_row="fail",
        eval_fraction=0.0,
        writes_jsonl=False,
    )


def test_the_sample_holds_each_text_that_will_be_encoded_once_and_no_other(tmp_path):
    """Neither ids, URLs and names of roles, nor the content of a refused row, nor a system text once a row."""
    others = {"id": "d0", "url": "https://e.org", "lang": "en", "tags": ["a"], "category": "news"}
    deep: list = []
    for _ in range(250):
        deep = [deep]
    plain = [{"target": f"  text {number}"} for number in range(300)]
    chats = [
        {
            "id": "c",
            "system": "be kind",
            "messages": [{"from": "human", "content": f"q {number}"}, {"from": "assistant", "content": f"a {number}"}],
        }
        for number in range(30)
    ]
    refused = [{"target": 5, "source": "refused"}, {"body": "not a row"}, {"messages": [{"from": "x", "content": "y"}]}]
    samples = {}
    for name, rows in (
        ("plain", plain),
        ("meta", [{**others, **row, "deep": deep} for row in plain]),
        ("chats", chats),
        ("few", [{"target": "one"}, *refused, {"target": "one"}, {"target": "two", "source": "before"}] * 3),
    ):
        write_lines(tmp_path / name / "rows.jsonl", rows)
        stage = "sft" if name == "chats" else "pretrain"
        samples[name] = choose_encoder.sample_texts(
            data_files.find_input_files([str(tmp_path / name)]), settings_of(stage)
        )
    assert len(samples["plain"]) == len(set(samples["plain"])) == choose_encoder.SAMPLE_TEXTS
    assert len(samples["meta"]) == choose_encoder.SAMPLE_TEXTS and all(
        text.startswith("  text ") for text in samples["meta"]
    )
    assert {text for text in samples["chats"] if text[1] != " "} == {"be kind"}
    assert len(samples["chats"]) == len(set(samples["chats"])) > 20
    assert sorted(samples["few"]) == ["before", "one", "two"]


@pytest.mark.parametrize("mistake", ["empty file", "a folder named as a file", "nested folders"])
def test_input_files_that_cannot_be_read_are_refused(mistake, tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", documents(1))
    folders, words = [tmp_path / "in"], {"empty file": "is empty", "nested folders": "inside the other"}
    if mistake == "empty file":
        (tmp_path / "in" / "more.jsonl").touch()
    elif mistake == "nested folders":
        write_lines(tmp_path / "in" / "below" / "rows.jsonl", documents(1))
        folders.append(tmp_path / "in" / "below")
    else:
        (tmp_path / "in" / "more.jsonl").mkdir()
    with pytest.raises(UserError, match=words.get(mistake, "is not a regular file")):
        prepare.prepare_pretrain(**settings(folders, tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_that_json_cannot_hold_are_refused(tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "in" / os.fsdecode(b"\xd6\xd0.jsonl"), documents(2))
    with pytest.raises(UserError, match=r"is not UTF-8; rename it"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    path.rename(tmp_path / "in" / "rows.jsonl")
    with pytest.raises(UserError, match=r"--data_cache_dir: the name .* is not UTF-8"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / os.fsdecode(b"\xd6\xd0")))


def test_a_file_beside_its_compressed_self_is_refused(tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "in" / "rows.jsonl", documents(2))
    (tmp_path / "in" / "rows.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"rows.jsonl and .*rows.jsonl.gz have the same name and may be copies"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_damaged_fast_tokenizer_is_reported(stage, inputs, tokenizer_dir, tmp_path):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        COMMANDS[stage](**settings([inputs[stage]], folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_bad_row_of_a_share_leaves_the_work_of_others(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [*documents(40), b"{"])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match=r"rows.jsonl:41: .*; other shares may be running, delete .*cache when none"):
        prepare.prepare_pretrain(**keywords, shard=(1, 1), sizes=SMALL_UNITS)
    assert list((tmp_path / "out" / "cache").glob("unit-*.json"))


@pytest.mark.slow
def test_results_arrive_as_they_are_done_and_the_first_error_is_raised():
    """A slow task does not delay those behind it; of two mistakes the one earlier in the input is raised."""
    tasks = [(0, 1.0), *((number, 0.01) for number in range(1, 20))]
    done = list(run_tasks(wait_and_return, tasks, num_workers=2))
    assert sorted(done) == list(range(20)) and done[0] == 1 and done.index(0) > 5
    with pytest.raises(UserError, match="task 1"):
        list(run_tasks(wait_and_fail, [(0, 0.0), (1, 0.5), (2, 0.0), (3, 0.0)], num_workers=2))


def wait_and_return(task):
    number, seconds = task
    time.sleep(seconds)
    return number


def wait_and_fail(task):
    if wait_and_return(task):
        raise UserError(f"task {task[0]}")
    return task


def test_marks_and_roles_of_conversations(tokenizer_dir, tmp_path, caplog):
    """Masked answers in the token counts and in the bytes that are predicted; unknown roles with counts and a cure."""

    def talk(*messages, **fields) -> dict:
        return {"conversations": [{"from": role, "value": text, **mark} for role, text, mark in messages], **fields}

    masked = [("human", "q", {}), ("gpt", "BAD", {"weight": 0}), ("Human", "q", {}), ("gpt", "good", {"weight": 1})]
    rows = [
        talk(*masked),
        # The last answer is masked, so the sample does not end with a trained </s>.
        talk(*masked[2:], *masked[:2]),
        talk(*masked, train=False),
        talk(("gpt", "opening", {}), ("human", "q", {}), ("gpt", "four", {})),
        talk(("human", "q", {}), ("Bing", "an answer", {})),
        talk(("human", "q", {}), ("bing", "b", {}), ("bard", "c", {})),
    ]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    for name, flags in (("skip", {"on_bad_row": "skip"}), ("named", {"assistant_roles": ["BING", "bard"]})):
        keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / name, max_length=1000, **flags)
        prepare.prepare_sft(**keywords)
    skipped, named = manifest(tmp_path / "skip"), manifest(tmp_path / "named")
    assert skipped["bad_rows"] == 2 and skipped["unknown_roles"] == {"bard": 1, "bing": 2}
    assert "bing (2 messages), bard (1 message); if one is the assistant, name it with --assistant_roles" in caplog.text
    assert named["unknown_roles"] == {} and named["total"]["documents"] == 6
    assert skipped["notes"] == {talks.MASKED_BY_MARK: 4, talks.MASKED_OPENINGS: 1, talks.BEGINS_WITH_ANSWER: 1}
    assert skipped["total"]["dropped"][tokenization.ALL_MASKED]["documents"] == 1
    samples = read_jsonl(tmp_path / "skip" / "jsonl")
    learnt = {tuple(sample["labels_decode"]): sample["document_target_bytes"] for sample in samples}
    assert learnt == {("good</s>",): [4], ("four</s>",): [4]} and len(samples) == 3
    answers = [sample["labels_decode"] for sample in read_jsonl(tmp_path / "named" / "jsonl")]
    assert ["an answer</s>"] in answers and ["b</s>", "c</s>"] in answers
    with pytest.raises(UserError, match="--assistant_roles: user is not a role of the assistant"):
        keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "other")
        prepare.prepare_sft(**keywords, assistant_roles=["bing", "USER"])


def test_unused_fields_may_hold_nan_and_repeat_keys(tokenizer_dir, tmp_path):
    lines = [
        b'{"target": "one", "score": NaN, "limits": [Infinity, -Infinity]}',
        b'{"target": "two", "meta": {"a": 1, "a": 2, "target": 3, "target": 4}, "id": 1, "id": 2}',
        b'{"target": "three NaN", "category": 7}',
    ]
    write_lines(tmp_path / "in" / "rows.jsonl", lines)
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path, bins=1))
    assert manifest(tmp_path)["total"]["documents"] == 3 and set(manifest(tmp_path)["categories"]) == {"7", "unknown"}
    repeated = b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    write_lines(tmp_path / "sft" / "rows.jsonl", [repeated])
    with pytest.raises(UserError, match="rows.jsonl:1: the key 'content' is repeated"):
        prepare.prepare_sft(**settings([tmp_path / "sft"], tokenizer_dir, tmp_path / "out"))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_keywords_have_the_defaults_of_the_command_line(stage):
    parser = {"pretrain": command_lines.prepare_pretrain_parser, "sft": command_lines.prepare_sft_parser}[stage]()
    given = {"data_input_dirs": ["a", "b"], "tokenizer_dir": "t"}
    parsed = parser.parse_args(["--data_input_dirs", "a,b", "--tokenizer_dir", "t"])
    assert PrepareConfig.of_flags(stage, given) == PrepareConfig.of_flags(stage, vars(parsed))
    with pytest.raises(TypeError, match="tokenizer_dir"):
        PrepareConfig.of_flags(stage, {"data_input_dirs": ["a"]})
