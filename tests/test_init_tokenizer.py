"""Expanding a tokenizer: what is added, what survives, what is refused."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from colossal_llama2.encoding.bpe_model import BpeModel, read_model, with_pieces
from colossal_llama2.encoding.file_names import REPORT_FILE
from colossal_llama2.encoding.from_text import write_tokenizer
from colossal_llama2.encoding.parity import PieceFinder
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer import extend_sentencepiece, init_tokenizer
from colossal_llama2.tokenizer.closure import plan_extension
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from tests import tiny
from tests.conftest import ROOT
from tests.tiny import CHINESE, english_documents

WORDS = ["人工智能", "你好", "世界", "人工", "智能", "天气", "公园", "你好", "and", "Hello▁world"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_pieces(path, pieces):
    path.write_text("".join(json.dumps({"piece": piece}, ensure_ascii=False) + "\n" for piece in pieces), "utf-8")
    return path


@pytest.fixture(scope="module")
def source(tokenizer_dir, tmp_path_factory):
    """A source like LLaMA-2's: every tokenizer adds a leading "▁" to a text. With two added tokens and a template."""
    from transformers import AddedToken, AutoTokenizer

    folder = shutil.copytree(tokenizer_dir, tmp_path_factory.mktemp("source") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    _unset_prefix_space(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def _unset_prefix_space(folder):
    """transformers writes null, which it reads as "no"; LLaMA-2 leaves the key out, which it reads as "yes"."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("add_prefix_space", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def target(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    expand_tokenizer(ExtensionSettings(source, folder / "new" / "zh", write_pieces(folder / "pieces.jsonl", WORDS)))
    return folder / "new" / "zh"


def pieces_of(folder):
    return [piece.piece for piece in read_model(folder).pieces]


def test_pieces_come_in_file_order_then_what_closure_adds(source, target):
    old, new = pieces_of(source), pieces_of(target)
    assert new[: len(old)] == old
    asked = list(dict.fromkeys(word for word in WORDS if word != "and"))
    characters = [character for character in dict.fromkeys("".join(asked)) if character not in old]
    added = new[len(old) :]
    assert added[: len(asked)] == asked
    assert added[len(asked) : len(asked) + len(characters)] == characters
    # What leads to "Hello▁world".
    assert len(added) > len(asked) + len(characters)
    assert all(piece in "Hello▁world" for piece in added[len(asked) + len(characters) :])


def test_new_scores_differ_and_lie_below_every_old_merge(source, target):
    import numpy

    model = read_model(target)
    old = len(pieces_of(source))
    new_scores = numpy.array([piece.score for piece in model.pieces[old:]], dtype=numpy.float32)
    merges = [piece.score for piece in model.pieces[:old] if piece.type == 1 and len(piece.piece) > 1]
    assert numpy.all(numpy.diff(new_scores) < 0)
    assert new_scores[0] < min(merges)


def test_old_text_is_tokenized_as_before(source, target):
    from transformers import AutoTokenizer

    # "Hello▁world" needs English pieces too; text that contains one of them may change.
    finder = PieceFinder(pieces_of(target)[len(pieces_of(source)) :])
    texts = [text for text in english_documents() if not finder.found_in("▁" + text.replace(" ", "▁"))]
    assert len(texts) > 1000
    assert load_encoder(source).encode(texts) == load_encoder(target).encode(texts)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    assert before(texts[:300])["input_ids"] == after(texts[:300])["input_ids"]


def test_fast_slow_and_sentencepiece_agree_on_text_with_new_pieces(target):
    from transformers import AutoTokenizer

    texts = [CHINESE, *re.split("[。，！]", CHINESE), "Hello world, 世界", "人工智能and人工 智能\n你好", "你好<0x0A>"]
    fast = AutoTokenizer.from_pretrained(target)
    slow = AutoTokenizer.from_pretrained(target, use_fast=False)
    expected = load_encoder(target).encode(texts)
    assert fast.is_fast and slow.is_fast is not tiny.has_slow_tokenizer()
    assert fast(texts, add_special_tokens=False)["input_ids"] == expected
    assert [slow.encode(text, add_special_tokens=False) for text in texts] == expected
    assert [fast.decode(ids) for ids in expected] == texts


def test_new_pieces_are_reached(target):
    encoder, pieces = load_encoder(target), pieces_of(target)
    for word in WORDS:
        (ids,) = encoder.encode([word.replace("▁", " ")], dummy_prefix=False)
        assert ids == [pieces.index(word)]


def test_everything_of_the_source_survives(source, target):
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    slow = AutoTokenizer.from_pretrained(target, use_fast=False)
    added = len(pieces_of(target)) - len(pieces_of(source))
    assert len(after) == len(slow) == len(before) + added
    assert after.special_tokens_map == before.special_tokens_map
    for token in ("<s>", "</s>", "<unk>"):
        assert after.convert_tokens_to_ids(token) == before.convert_tokens_to_ids(token)
    for token in ("<pad>", "<tool>"):
        moved = before.convert_tokens_to_ids(token) + added
        assert after.convert_tokens_to_ids(token) == slow.convert_tokens_to_ids(token) == moved
        assert after(f"a{token}b")["input_ids"].count(moved) == 1
    for name in ("chat_template", "model_max_length", "padding_side", "legacy", "add_bos_token", "add_eos_token"):
        assert getattr(after, name) == getattr(before, name), name
    for name in ("chat_template.json", "special_tokens_map.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert os.stat(target).st_mode == os.stat(source).st_mode


def test_a_source_without_tokenizer_json_with_older_files(source, tmp_path):
    """As in older LLaMA derivatives: added_tokens.json instead of added_tokens_decoder, no tokenizer_class."""
    from transformers import AutoTokenizer

    old = shutil.copytree(source, tmp_path / "old")
    (old / "tokenizer.json").unlink()
    config = json.loads((old / "tokenizer_config.json").read_text())
    # transformers 4 writes the first, and 5 does not.
    config.pop("added_tokens_decoder", None)
    del config["tokenizer_class"]
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    (old / "added_tokens.json").write_text(json.dumps({"<pad>": 600, "<tool>": 601}))
    expand_tokenizer(ExtensionSettings(old, tmp_path / "new", write_pieces(tmp_path / "pieces.jsonl", ["你好"])))
    for use_fast in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new", use_fast=use_fast)
        assert tokenizer.convert_tokens_to_ids(["你好", "<pad>", "<tool>"]) == [600, 603, 604]
        assert (
            tokenizer("你好", add_special_tokens=False)["input_ids"]
            == load_encoder(tmp_path / "new").encode(["你好"])[0]
        )


def test_merges_that_differ_from_the_model_are_logged(source, tmp_path, caplog):
    odd = shutil.copytree(source, tmp_path / "odd")
    fast = json.loads((odd / "tokenizer.json").read_text())
    fast["model"]["merges"].pop()
    (odd / "tokenizer.json").write_text(json.dumps(fast))
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])
    expand_tokenizer(ExtensionSettings(odd, tmp_path / "new", pieces))
    assert "different merges" in caplog.text and (tmp_path / "new").exists()


def test_another_order_of_the_splits_of_a_piece_is_no_difference(source, tmp_path, caplog):
    """transformers 5 writes them in the opposite order of version 4. Only one of them ever happens."""
    odd = shutil.copytree(source, tmp_path / "odd")
    fast = json.loads((odd / "tokenizer.json").read_text())
    merges = fast["model"]["merges"]
    by_piece = [list(splits) for _, splits in itertools.groupby(merges, key="".join)]
    assert any(len(splits) > 1 for splits in by_piece)
    fast["model"]["merges"] = [pair for splits in by_piece for pair in reversed(splits)]
    (odd / "tokenizer.json").write_text(json.dumps(fast))
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])
    expand_tokenizer(ExtensionSettings(odd, tmp_path / "new", pieces))
    assert "different merges" not in caplog.text
    by_piece[0], by_piece[1] = by_piece[1], by_piece[0]
    fast["model"]["merges"] = [pair for splits in by_piece for pair in splits]
    (odd / "tokenizer.json").write_text(json.dumps(fast))
    expand_tokenizer(ExtensionSettings(odd, tmp_path / "other", pieces))
    assert "different merges" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["init_tokenizer.py", "colossal_llama2/tokenizer/init_tokenizer.py"])
def test_both_spellings_from_another_folder(run_script, tokenizer_dir, tmp_path, spelling):
    write_pieces(tmp_path / "pieces.jsonl", ["你好", "and", "你好", "世界"])
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    arguments = (
        "--source_tokenizer_dir",
        tokenizer_dir,
        "--target_tokenizer_dir",
        "out",
        "--expand_tokens_file",
        "pieces.jsonl",
    )
    done = run_script(spelling, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "requested 4, added 6"
    assert pieces_of(tmp_path / "out")[600:] == ["你好", "世界", "你", "好", "世", "界"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pieces.jsonl"]


def test_as_a_module_and_one_line_for_a_mistake(run_script, assert_user_error, tokenizer_dir, tmp_path):
    (tmp_path / "pieces.jsonl").write_text('{"piece": "a b"}\n')
    arguments = [
        "--source_tokenizer_dir",
        str(tokenizer_dir),
        "--target_tokenizer_dir",
        str(tmp_path / "out"),
        "--expand_tokens_file",
        str(tmp_path / "pieces.jsonl"),
    ]
    command = [sys.executable, "-m", "colossal_llama2.tokenizer.init_tokenizer", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_user_error(done, "init_tokenizer.py: error:", "pieces.jsonl:1:", "contains a space")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"piece": "a"', "not JSON"),
        (b"[1]", "one JSON object"),
        (b'{"word": "a"}', 'no "piece"'),
        (b'{"piece": 7}', "not a string"),
        (b'{"piece": ""}', "empty"),
        (b'{"piece": "a b"}', "a space; write a space as ▁"),
        ('"你好"'.encode(), 'a JSON string; each line must be one JSON object, such as {"piece": "你好"}'),
        ('["你好", "世界"]'.encode(), 'a JSON list; .* such as {"piece": "你好"}'),
        (b"[", 'a JSON list; .* such as {"piece": "..."}'),
        ("人工智能".encode(), 'a plain list of words; .* such as {"piece": "人工智能"}'),
        (b"machine learning", 'a plain list of words; .* such as {"piece": "machine▁learning"}'),
        (b"7", "a plain list of words"),
        ("你好\t31".encode(), 'a line of a table; .* such as {"piece": "你好"}, without the other columns'),
        (b'"piece","count"', "a line of a table"),
        (b'{"token": "ab"}', 'no "piece" in this line; .* such as {"piece": "ab"}'),
        ('{"你好": 31999}'.encode(), 'no "piece" in this line; .* such as {"piece": "你好"}'),
        (b'{"piece": "a\\u0007"}', "control character"),
        (b'{"piece": "\\ud800"}', "surrogate"),
        (b'{"piece": "\xff"}', "not UTF-8"),
        (b'{"piece": "</s>"}', "special token"),
        (b'{"piece": "<0x0A>"}', "special token"),
        (b'{"piece": "<tool>"}', "special token"),
        (b'{"piece": "a<tool>b"}', "contains the special token '<tool>'"),
        (b'{"piece": "' + b"x" * 65 + b'"}', "65 characters"),
    ],
)
def test_a_bad_line_is_named(source, tmp_path, line, words):
    path = tmp_path / "pieces.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"piece": "ok"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"pieces.jsonl:3: .*{words}"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", path))
    assert [path.name for path in tmp_path.iterdir()] == ["pieces.jsonl"]


def tokenizer_of(folder: Path, pieces=(), **changes) -> Path:
    """A tokenizer of 400 pieces whose model has other settings, and `pieces` with their scores."""
    content = io.BytesIO()
    plain = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.english_documents()[:80]),
        model_writer=content,
        vocab_size=400,
        minloglevel=2,
        **{**plain, **changes},
    )
    folder.mkdir()
    write_tokenizer(with_pieces(content.getvalue(), pieces, [-1000.0 - n for n in range(len(pieces))]), folder)
    return folder


def test_whitespace_makes_pieces_that_encode_and_decode_everywhere(tmp_path):
    """Except U+0020, and those control characters that the source has a piece for."""
    from transformers import AutoTokenizer

    source = tokenizer_of(tmp_path / "source", ["\u3000", "\t"], user_defined_symbols=["[INST]"])
    words = ["\u3000\u3000", "\u00a0", "\u2003", "\u2028", "\u3000你好", "the\u00a0of", "▁\u3000", "\t\t", "你\u202f"]
    pieces = write_pieces(tmp_path / "pieces.jsonl", [*words, "\u3000", "\t", "[INST]", "▁t"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "new", pieces))
    report = json.loads((tmp_path / "new" / REPORT_FILE).read_text())
    assert (report["asked"], report["already_pieces"], report["added_from_file"]) == (len(words) + 4, 4, len(words))
    assert report["unreachable"] == report["dropped"] == 0
    encoder = load_encoder(tmp_path / "new")
    kinds = [AutoTokenizer.from_pretrained(tmp_path / "new", use_fast=use_fast) for use_fast in (True, False)]
    known = {word: index for index, word in enumerate(pieces_of(tmp_path / "new"))}
    for word in words:
        for text in (f"x{word}x", f"x {word} and{word}", f"{word}of", f"of{word}"):
            text = text.replace("▁", " ")
            (ids,) = encoder.encode([text])
            # At the start, the space before the text can be merged with the piece's first character.
            assert encoder.decode(ids) == text and (known[word] in ids or text[0] != "x" or f" {word}" in text)
            for tokenizer in kinds:
                if text[0] != " ":
                    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
                    assert tokenizer.decode(ids) == text
    write_pieces(pieces, ["\u000b"])
    with pytest.raises(UserError, match="control character"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "other", pieces))


@pytest.mark.parametrize("closure", ["complete", "off"])
def test_pieces_that_a_normalizer_never_produces_are_named(closure, tmp_path, caplog):
    source = tokenizer_of(tmp_path / "source", normalization_rule_name="nmt_nfkc")
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["\u3000\u3000", "你好", "Ａ"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "new", pieces, closure=closure))
    assert "never produces 2 of the pieces" in caplog.text and r"'\u3000\u3000', 'Ａ';" in caplog.text
    assert ("\u3000\u3000" in pieces_of(tmp_path / "new")) is (closure == "off")


def test_folders_and_files_that_are_refused(source, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])

    def refused(words, *, source=source, target=tmp_path / "out", pieces=pieces):
        with pytest.raises(UserError, match=words):
            expand_tokenizer(ExtensionSettings(source, target, pieces))

    refused("is not a file", pieces=tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("holds no pieces", pieces=tmp_path / "empty.jsonl")
    refused("already exists.*--overwrite", target=tmp_path)
    refused("already exists", target=source)
    refused("inside the source", target=source / "zh")
    refused("is not a folder", source=tmp_path / "missing")

    def changed(name, change):
        folder = shutil.copytree(source, tmp_path / name)
        change(folder)
        return folder

    refused("copy its tokenizer.model", source=changed("a", lambda folder: (folder / "tokenizer.model").unlink()))
    without = changed(
        "b", lambda folder: [(folder / name).unlink() for name in extend_sentencepiece.REQUIRED_FILES[1:]]
    )
    refused("no tokenizer_config.json and no special_tokens_map.json; LLaMA-2 ships", source=without)
    refused("not JSON", source=changed("c", lambda folder: (folder / "tokenizer_config.json").write_text("{")))
    refused("a JSON object", source=changed("d", lambda folder: (folder / "tokenizer_config.json").write_text("[]")))
    gap = json.dumps({"<late>": 700})
    refused("without a gap", source=changed("e", lambda folder: (folder / "added_tokens.json").write_text(gap)))
    other = json.dumps({"<pad>": 601})
    refused("keep one", source=changed("f", lambda folder: (folder / "added_tokens.json").write_text(other)))
    wordpiece = json.dumps({"model": {"type": "WordPiece"}})
    odd = changed("g", lambda folder: (folder / "tokenizer.json").write_text(wordpiece))
    refused("not a BPE tokenizer", source=odd)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_tokenizer_class_that_cannot_be_loaded_is_refused(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    config = {**json.loads((folder / "tokenizer_config.json").read_text()), "tokenizer_class": "NoSuchTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if not tiny.has_slow_tokenizer():
        pytest.skip("transformers 5 loads any tokenizer.json, whatever its tokenizer_class")
    with pytest.raises(UserError, match="tokenizer_class is LlamaTokenizer"):
        expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", ["你好"])))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_unigram_model_is_refused(source, tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_documents()[:200]),
        model_writer=model,
        model_type="unigram",
        vocab_size=120,
        minloglevel=2,
    )
    folder = shutil.copytree(source, tmp_path / "unigram")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="is a Unigram model"):
        expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", ["你好"])))


def test_nothing_new_still_writes_a_complete_tokenizer(source, tmp_path, capsys):
    expand_tokenizer(
        ExtensionSettings(source, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", ["and", "and"]))
    )
    assert capsys.readouterr().out.splitlines()[-1] == "requested 2, added 0"
    assert pieces_of(tmp_path / "out") == pieces_of(source)


# The original's recipe, and the other choices.


def original_recipe(content, pieces):
    """What the original's init_tokenizer.py writes for a tokenizer.model (its lines 40 to 60 and 85 to 88)."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    tokens = []
    for piece in pieces:
        if piece not in tokens:
            tokens.append(piece)
    tokens.sort(key=lambda token: len(token), reverse=False)
    model = ModelProto.FromString(content)
    known = {piece.piece for piece in model.pieces}
    for token in tokens:
        if token not in known:
            model.pieces.append(ModelProto.SentencePiece(piece=token, score=0))
    return model.SerializeToString()


def report_of(folder):
    return json.loads((folder / "vocabulary_report.json").read_text("utf-8"))


def test_zero_and_off_write_what_the_original_writes(source, tmp_path, caplog):
    expand_tokenizer(
        ExtensionSettings(
            source, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", WORDS), piece_scores="zero", closure="off"
        )
    )
    expected = original_recipe((source / "tokenizer.model").read_bytes(), WORDS)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == expected
    report = report_of(tmp_path / "out")
    assert (report["asked"], report["duplicates"], report["already_pieces"], report["added"]) == (10, 1, 1, 8)
    assert report["added_by_closure"] == 0 and report["unreachable_pieces"] == ["Hello▁world"]
    assert "not proven: 1 of 8 new pieces never reached; tokenizers have new differences" in caplog.text


def test_a_failed_proof_ends_with_code_1(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["s▁", "▁t", "es▁th"])
    with pytest.raises(SystemExit) as ended:
        init_tokenizer.main(
            [
                "--source_tokenizer_dir",
                str(source),
                "--target_tokenizer_dir",
                str(tmp_path / "out"),
                "--expand_tokens_file",
                str(pieces),
                "--piece_scores",
                "zero",
            ]
        )
    assert ended.value.code == 1 and not (tmp_path / "out").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search("nothing was written.*--piece_scores below.*--closure off", line)
    assert not list(tmp_path.glob(".*"))


def test_drop_leaves_out_what_is_not_reached(source, tmp_path, capsys):
    words = ["heth", "ther▁w", "你好", "thethe"]
    expand_tokenizer(
        ExtensionSettings(source, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", words), closure="drop")
    )
    report = report_of(tmp_path / "out")
    assert report["dropped"] + report["added"] == 4 and report["unreachable"] == report["added_by_closure"] == 0
    # The source has no piece for either character.
    assert "你好" in report["dropped_pieces"]
    assert pieces_of(tmp_path / "out")[600:] == [word for word in words if word not in report["dropped_pieces"]]
    assert capsys.readouterr().out.splitlines()[-1] == f"requested 4, added {report['added']}"


def test_a_budget_counts_what_closure_adds(source, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好", "世界", "人工智能"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, max_added_pieces=7))
    assert pieces_of(tmp_path / "out")[600:] == ["你好", "世界", "你", "好", "世", "界"]
    report = report_of(tmp_path / "out")
    assert report["given_up_pieces"] == ["人工智能"] and report["added"] == 6


def test_the_report_covers_parity_and_old_text(source, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "colossal_llama2")
    text = tmp_path / "text"
    text.mkdir()
    (text / "en.txt").write_text("\n\n".join(english_documents()[:200]))
    (text / "zh.jsonl").write_text(json.dumps({"source": "", "target": CHINESE}))
    pieces = write_pieces(tmp_path / "pieces.jsonl", WORDS)
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, parity_text=[str(text)]))
    groups = {group["group"]: group for group in report_of(tmp_path / "out")["parity"]}
    assert list(groups) == ["new pieces alone", "new pieces in context", "old pieces", "parity text"]
    found = groups["parity text"]
    assert 190 <= found["documents"] <= 201 and found["fast"]["added"] == found["changed"] == 0
    if tiny.has_slow_tokenizer():
        assert found["slow"]["documents"] == found["documents"] and found["slow"]["added"] == 0
    else:
        assert found["slow"] is None and "transformers has no slow tokenizer" in caplog.text
    assert 100 < found["without_new_piece"] < found["documents"]
    assert all(group["changed"] == group["fast"]["added"] == 0 for group in groups.values())
    out = capsys.readouterr().out
    assert re.search(r"^added by closure: characters +12$", out, re.MULTILINE)
    assert re.search(r"^parity text +\d+ +0 +(0|none) ", out, re.MULTILINE)


def test_a_source_that_spells_merges_as_text_keeps_the_spelling(source, tmp_path):
    """As in LLaMA-2's own tokenizer.json; tokenizers before 0.20 read nothing else."""
    old = shutil.copytree(source, tmp_path / "old")
    fast = json.loads((old / "tokenizer.json").read_text())
    fast["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(fast))
    expand_tokenizer(ExtensionSettings(old, tmp_path / "new", write_pieces(tmp_path / "pieces.jsonl", WORDS)))
    merges = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]["merges"]
    assert "你 好" in merges and all(isinstance(pair, str) for pair in merges)


def test_pieces_that_look_like_byte_tokens_merge_into_none(source, tmp_path):
    """transformers' own conversion would let "<0x0A" and ">" merge to the token of a line break."""
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["<0x0A", "0A>"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a<0x0A> b"
    assert fast(text, add_special_tokens=False)["input_ids"] == load_encoder(tmp_path / "out").encode([text])[0]


# Overwriting.


def test_overwrite_replaces_a_tokenizer_and_nothing_else(source, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    write_pieces(tmp_path / "pieces.jsonl", ["世界"])
    with pytest.raises(UserError, match="already exists"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    assert pieces_of(tmp_path / "out")[600:] == ["你好", "你", "好"]
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, overwrite=True))
    assert pieces_of(tmp_path / "out")[600:] == ["世界", "世", "界"]
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds model.safetensors, which is not a file of a tokenizer"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pieces.jsonl"]


def test_overwrite_spares_the_source_and_files(source, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])
    copy = shutil.copytree(source, tmp_path / "folder" / "source")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(copy)
    for target, words in (
        (copy, "is or holds"),
        (copy.parent, "is or holds"),
        (tmp_path / "link", "is or holds"),
        (tmp_path / "file", "not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            expand_tokenizer(ExtensionSettings(copy, target, pieces, overwrite=True))
    assert pieces_of(copy) == pieces_of(source)


def test_a_fault_leaves_the_old_target(source, tmp_path, monkeypatch):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["你好"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir() if path.is_file())

    def fail(*given, **named):
        raise OSError("no space left")

    monkeypatch.setattr(init_tokenizer, "write_json", fail)
    with pytest.raises(OSError, match="no space"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, overwrite=True))
    assert before == sorted((path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir() if path.is_file())
    assert not list(tmp_path.glob(".*"))


def test_many_pieces_are_not_quadratic(source):
    """Twenty thousand pieces that all need intermediate ones: no step is quadratic."""
    import time

    characters = [chr(0x4E00 + index) for index in range(141)]
    words = [f"{a}{b}甲乙" for a in characters for b in characters]
    model = BpeModel.read(source)
    start = time.process_time()
    plan = plan_extension(model, words, closure="complete", piece_scores="below")
    assert time.process_time() - start < 20
    assert len(words) < len(plan.pieces) < 2 * len(words) + 300
