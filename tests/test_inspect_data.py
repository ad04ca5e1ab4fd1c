"""inspect_data: what is shown of a bin, that nothing in it reaches the terminal raw, the manifest, and the charts."""

import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest

from colossal_llama2.charts import plots, style
from colossal_llama2.cli import data_flags
from colossal_llama2.dataset.inspect_data import InspectSettings, documents_of, inspect_part
from colossal_llama2.dataset.layout.manifest_table import manifest_lines
from colossal_llama2.dataset.write.prepare import prepare_pretrain
from colossal_llama2.dataset.write.records import read_pretrain_row, read_sft_row
from colossal_llama2.dataset.write.tokenization import tokenize_pretrain, tokenize_sft
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.errors import UserError
from colossal_llama2.terminal_text import visible, visible_line
from tests.byte_level import extend, make_byte_level
from tests.conftest import HEAVY_MODULES, ROOT
from tests.preparing import settings as prepare_settings
from tests.preparing import write_lines

NASTY = "a\x1b[31m\x07\r\n\x9b2J\u202e\u200b\ue000\x7f\x00 <s></s><U+0041>␛ 你好"
MODULE = "colossal_llama2.dataset.inspect_data"


@pytest.fixture(scope="module")
def encoder(tokenizer_dir) -> SentencePieceEncoder:
    return load_encoder(tokenizer_dir)


@pytest.fixture(scope="module")
def arrow_dir(encoder, tmp_path_factory):
    """Three bins of two samples, each of a plain document and one with a masked source; categories differ by bin."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("arrow")
    for number in range(3):
        rows = [{"target": f"{NASTY} {number}"}, {"source": " The wi", "target": " th statement", "category": "猜谜"}]
        plain, masked = tokenize_pretrain([read_pretrain_row(row) for row in rows], encoder=encoder)
        sample = {
            "input_ids": plain.input_ids + masked.input_ids,
            "labels": plain.labels + masked.labels,
            "sequence_lengths": [len(plain.input_ids), len(masked.input_ids)],
            "document_categories": [f"web\x1b{number}", "猜谜"],
        }
        datasets.Dataset.from_list([sample, sample]).save_to_disk(str(folder / f"part-{number:05d}"))
    return folder


@pytest.fixture(scope="module")
def old_bin(encoder, tmp_path_factory):
    """A bin with only input_ids and labels: one conversation."""
    import datasets

    datasets.disable_progress_bars()
    messages = [{"role": "user", "content": "Hi\nthere"}, {"role": "assistant", "content": " Hello <s>!"}]
    (row,) = tokenize_sft([read_sft_row({"messages": messages})], encoder=encoder, max_length=1000)
    folder = tmp_path_factory.mktemp("old") / "part-00000"
    datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels}]).save_to_disk(str(folder))
    return folder


def report(part, tokenizer_dir, *, num_samples=5, seed=1024, plots=None, is_coloured=False) -> str:
    settings = InspectSettings(str(part), str(tokenizer_dir), sample=num_samples, seed=seed, plots=plots)
    return "\n".join(inspect_part(settings, is_coloured=is_coloured))


# Text.


def test_no_character_reaches_the_terminal_raw():
    # Everywhere except among Han and Hangul characters, which are many.
    for code in [*range(0x3400), *range(0xD7F0, 0x20000), *range(0xE0000, 0xE1000), 0xF0000, 0x10FFFF]:
        for character in visible_line(chr(code)):
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"), hex(code)


def test_what_is_shown_is_unambiguous():
    assert visible("a\nb\x1b\x7f\x85\u202e\u2028") == "a␊\nb␛␡<U+0085><U+202E><U+2028>"
    assert visible("<s> </s> <U+202E> ␛ <b>") == "<U+003C>s> <U+003C>/s> <U+003C>U+202E> <U+241B> <b>"
    assert visible_line("a\nb") == "a␊b"
    singles = [visible(chr(code)) for code in range(0x3000)] + [visible(text) for text in ("<s>", "</s>", "<U+0000>")]
    assert len(set(singles)) == len(singles)


# Samples.


def test_trained_masked_and_borders_in_plain_text(arrow_dir, tokenizer_dir):
    lines = report(arrow_dir / "part-00001", tokenizer_dir, num_samples=1).splitlines()
    assert re.fullmatch(r".*part-00001: 2 samples of \d+ to \d+ tokens, median \d+, mean [\d.]+", lines[0])
    assert re.fullmatch(r"border  \| ==== sample [01] of 2: \d+ tokens, documents: 2", lines[2])
    assert re.fullmatch(r"border  \| ---- document 1 of 2: \d+ tokens, category web␛1", lines[3])
    assert lines[4:6] == [
        "trained | <s>a␛[31m␇␍␊",
        "trained | <U+009B>2J<U+202E><U+200B><U+E000>␡␀ <U+003C>s><U+003C>/s><U+003C>U+0041><U+241B> 你好 1</s>",
    ]
    assert lines[7:] == ["masked  | <s> The wi", "trained |  th statement</s>"]


def test_colours_are_the_only_escapes(arrow_dir, tokenizer_dir):
    text = report(arrow_dir / "part-00000", tokenizer_dir, is_coloured=True)
    assert "\x1b[2m<s> The wi\x1b[0m\x1b[32m th statement</s>\x1b[0m" in text
    assert "\x1b[1;35m---- document 2 of 2" in text
    rest = re.sub(r"\x1b\[(32|2|1;35|0)m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest)
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b") for line in text.splitlines())


def test_an_old_bin_has_no_borders_and_no_categories(old_bin, tokenizer_dir, tmp_path):
    text = report(old_bin, tokenizer_dir, plots=str(tmp_path / "charts"))
    assert "does not record where its documents end" in text and "no categories.png" in text
    assert "trained |  Hello <U+003C>s>!</s>" in text
    assert "masked  | Human: <s>Hi␊\nmasked  | there</s>Assistant: <s>" in text
    assert [path.name for path in (tmp_path / "charts").iterdir()] == ["lengths.png"]


def test_the_seed_chooses_the_samples(arrow_dir, tokenizer_dir):
    def shown(**settings) -> list:
        return re.findall(r"sample (\d) of 2", report(arrow_dir / "part-00000", tokenizer_dir, **settings))

    assert shown(num_samples=9) == ["0", "1"] and shown(num_samples=0) == []
    assert {tuple(shown(num_samples=1, seed=seed)) for seed in range(9)} == {("0",), ("1",)}
    assert shown(num_samples=1, seed=3) == shown(num_samples=1, seed=3)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"input_ids": [1, 600, 2]}, "holds the id 600, but the tokenizer has 600 pieces"),
        ({"sequence_lengths": [1, 1]}, "is damaged"),
        ({"labels": [1]}, "is damaged"),
    ],
)
def test_a_sample_that_does_not_fit_is_reported(change, reason, encoder):
    row = {"input_ids": [1, 300, 2], "labels": [1, 300, 2], "sequence_lengths": [1, 2], **change}
    with pytest.raises(UserError, match=reason):
        documents_of(row, encoder=encoder, where="sample 0 of x")


def test_a_folder_that_is_not_a_bin_is_reported(arrow_dir, tokenizer_dir, tmp_path):
    import datasets

    (tmp_path / "part-00009").mkdir()
    datasets.Dataset.from_list([{"input_ids": [1]}]).save_to_disk(str(tmp_path / "unlabelled"))
    for part, reason in [
        (tmp_path / "none", "is not a folder"),
        (tmp_path / "part-00009", "is not a prepared bin"),
        (arrow_dir, "holds 3 bins; give one of them, such as .*part-00000"),
        (tmp_path / "unlabelled", "holds no samples of input_ids and labels"),
    ]:
        with pytest.raises(UserError, match=reason):
            report(part, tokenizer_dir)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--plots .* cannot be created"):
        report(arrow_dir / "part-00000", tokenizer_dir, plots=str(tmp_path / "file"))
    (tmp_path / "charts" / "lengths.png").mkdir(parents=True)
    with pytest.raises(UserError, match="--plots .*lengths.png: is a folder, not a file"):
        report(arrow_dir / "part-00000", tokenizer_dir, plots=str(tmp_path / "charts"))


# The manifest.

MANIFEST = {
    "max_length": 2048,
    "fill": 0.99461,
    "name\x1b": "a\nb",
    "ok": True,
    "nothing": None,
    "bins": list(range(1000, 1040)),
    "sha": "0123456789abcdef" * 4,
    "files": [{"path": "d/a.jsonl", "documents": 5}, {"path": "x" * 90, "trained": 1234567}],
    "categories": {
        "猜谜语": {"documents": 7, "dropped": {"empty": {"documents": 1, "tokens": 40}}},
        "web": {"documents": 12},
    },
    "nested": {"deep": {"deeper": {"deepest": 1}, "list": [[1]]}, "words": ["a"] * 12, "empty": [], "flags": {}},
}


def test_a_manifest_of_any_shape_becomes_aligned_lines():
    lines = list(manifest_lines(MANIFEST))
    assert lines[:7] == [
        "max_length  2,048",
        "fill        0.99461",
        "name␛       a␊b",
        "ok          yes",
        "nothing     -",
        "bins        40 numbers, 1,000 to 1,039",
        "sha         0123456789ab",
    ]
    assert lines[7] == "files:" and lines[9].split() == ["0", "d/a.jsonl", "5"]
    assert lines[10].split() == ["1", "…" + "x" * 59, "1,234,567"]
    assert lines[11:] == [
        "categories:",
        "          documents                          dropped",
        "  猜谜语          7  empty: documents: 1; tokens: 40",
        "  web            12",
        "nested:",
        "  words  a, a, a, a, a, a, a, a, a, a and 2 more",
        "  empty  none",
        "  flags  none",
        "  deep:",
        "    deeper:",
        "      deepest  1",
        "    list:",
        "      0  1",
    ]
    records = {"inputs": [{"path": "数据/a.jsonl", "documents": 1234}, {"path": "b.jsonl", "documents": 5}]}
    assert list(manifest_lines(records, width=29)) == [
        "inputs:",
        "             path  documents",
        "  0  数据/a.jsonl      1,234",
        "  1       b.jsonl          5",
    ]
    assert list(manifest_lines(records, width=24)) == [
        "inputs:",
        "  0",
        "    path       数据/a.jsonl",
        "    documents  1,234",
        "  1",
        "    path       b.jsonl",
        "    documents  5",
    ]
    many = list(manifest_lines({"files": [{"path": str(number)} for number in range(25)]}))
    assert len(many) == 23 and many[-1] == "  and 5 more"


def test_the_manifest_beside_the_bin_is_shown_and_its_tokenizer_compared(
    old_bin, tokenizer_dir, tmp_path, assert_user_error
):
    os.symlink(old_bin, tmp_path / "part-00000")
    digest = fingerprint(tokenizer_dir)
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}, "max_length": 77}))
    text = report(tmp_path / "part-00000", tokenizer_dir)
    assert text.startswith(f"manifest {tmp_path}/manifest.json:\nmax_length  77\ntokenizer:\n  sha256  {digest[:12]}\n")
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "0" * 64}}))
    process = run(tmp_path / "part-00000", "--tokenizer_dir", tokenizer_dir, "--plots", tmp_path / "charts")
    assert_user_error(
        process,
        f"part-00000: prepared with another tokenizer (SHA-256 {'0' * 12}) than that of {tokenizer_dir}",
        "give --tokenizer_dir the tokenizer that the data was prepared with",
    )
    assert not process.stdout and not (tmp_path / "charts").exists()


def test_data_of_the_tokenizer_before_its_extension_is_refused_too(tmp_path):
    """The old ids are kept, but the extended tokenizer gives the same text others."""
    before = make_byte_level(tmp_path / "before")
    after = extend(before, tmp_path / "after", ["学校"])
    write_lines(tmp_path / "in" / "rows.jsonl", [{"source": "", "target": "学校 and words", "category": "a"}])
    prepare_pretrain(**prepare_settings([tmp_path / "in"], before, tmp_path / "out"))
    part = tmp_path / "out" / "arrow" / "part-00000"
    assert "学校 and words" in report(part, before)
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        report(part, after)


# The charts.


def test_both_charts_are_drawn(arrow_dir, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "CJK_FONTS", ())
    text = report(arrow_dir / "part-00000", tokenizer_dir, num_samples=0, plots=str(tmp_path / "a" / "b"))
    assert "in each of 3 bins; from the bottom: 猜谜 6, web␛0 2, web␛1 2, web␛2 2" in text
    assert "no font here has 猜谜" in text and "install a font such as Noto Sans CJK" in text
    for name in ("lengths.png", "categories.png"):
        assert (tmp_path / "a" / "b" / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_escapes_a_category_once(arrow_dir, tokenizer_dir, tmp_path):
    report(arrow_dir / "part-00000", tokenizer_dir, num_samples=0, plots=str(tmp_path))
    bins = {f"part-{number:05d}": {f"web\x1b{number}": 2, "猜谜": 2} for number in range(3)}
    plots.draw_categories(bins, tmp_path / "expected.png", title=f"{arrow_dir.name}: categories of 3 bins")
    assert (tmp_path / "categories.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


# The command.


def run(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", MODULE, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command_prints_plain_text_into_a_pipe(arrow_dir, tokenizer_dir):
    process = run(arrow_dir / "part-00000", "--tokenizer_dir", tokenizer_dir, "--sample", 1, PYTHONIOENCODING="ascii")
    assert process.returncode == 0 and process.stderr == ""
    assert "\x1b" not in process.stdout and "trained | <s>a\\u241b[31m" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("no_color, has_colours", [("", True), ("1", False)])
def test_the_command_on_a_terminal(no_color, has_colours, arrow_dir, tokenizer_dir):
    import pty

    master, slave = pty.openpty()
    words = [sys.executable, "-m", MODULE, str(arrow_dir / "part-00000"), "--tokenizer_dir", str(tokenizer_dir)]
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        output = b""
        try:
            while chunk := os.read(master, 1 << 16):
                output += chunk
        except OSError:  # Linux raises this when the other end is closed
            pass
        assert process.wait(timeout=60) == 0, process.stderr.read()
    os.close(master)
    assert (b"\x1b[32m" in output) is has_colours and (b"trained | " in output) is not has_colours
    assert b"\x1b[31m" not in output and b"\x07" not in output


@pytest.mark.slow
def test_a_reader_that_stops_early_is_not_an_error(arrow_dir, tokenizer_dir):
    command = f"{sys.executable} -m {MODULE} {arrow_dir / 'part-00000'} --tokenizer_dir {tokenizer_dir} | head -c 1"
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, timeout=60)
    assert (process.returncode, process.stderr, len(process.stdout)) == (0, b"", 1)


def test_help_and_mistakes_need_no_package(tmp_path, assert_user_error):
    for name in (*HEAVY_MODULES, "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    shown = run("--help", PYTHONPATH=str(tmp_path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: python -m {MODULE} ") and "example:" in shown.stdout
    assert_user_error(run("x", "--tokenizer_dirr", "t", PYTHONPATH=str(tmp_path)), "did you mean --tokenizer_dir?")
    assert_user_error(run("--tokenizer_dir", "t", PYTHONPATH=str(tmp_path)), "required: PART")
    assert_user_error(run("x", "--tokenizer_dir", tmp_path / "none"), MODULE, "is not a folder")


def test_the_flags():
    parsed = data_flags.inspect_data_parser().parse_args(["part-00000", "--tokenizer_dir", "t"])
    assert vars(parsed) == {"part": "part-00000", "tokenizer_dir": "t", "sample": 5, "seed": 1024, "plots": None}
