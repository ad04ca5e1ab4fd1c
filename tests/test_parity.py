"""SentencePiece, slow and fast tokenizer give equal ids after an extension, on random pieces and random text."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding import parity
from colossal_llama2.encoding.bpe_model import BpeModel, merges, plain_processor, with_pieces
from colossal_llama2.encoding.parity import PieceFinder, Tokenizers, evenly, measure
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer.closure import plan_extension
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from colossal_llama2.tokenizer.parity_text import read_parity_text
from tests import tiny
from tests.test_closure import CHARACTERS, PIECES, TEXT, content_of, model, wanted_of  # noqa: F401 - a fixture
from tests.tiny import CHINESE, english_documents


@pytest.fixture(scope="module")
def source(tokenizer_dir):
    return Tokenizers(tokenizer_dir)


@pytest.fixture(scope="module")
def original(tokenizer_dir, tmp_path_factory):
    """The original's recipe on pieces where it fails: a character that is not a piece, equal scores, a stolen merge."""
    folder = tmp_path_factory.mktemp("original")
    pieces = ["甲乙", "乙丙", "甲乙丙", "s▁", "乙丙丁丁"]
    lines = [json.dumps({"piece": piece}) for piece in pieces]
    (folder / "pieces.jsonl").write_text("\n".join(lines))
    expand_tokenizer(
        ExtensionSettings(tokenizer_dir, folder / "out", folder / "pieces.jsonl", piece_scores="zero", closure="off")
    )
    return Tokenizers(folder / "out"), pieces


def fast_bpe(pieces, scores, can_merge):
    """Only the fast tokenizer's model, as tokenizer.json describes it."""
    from tokenizers.models import BPE

    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    pairs = merges(pieces, scores, can_merge)
    return BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(pieces=PIECES, texts=st.lists(TEXT, min_size=1, max_size=10))
def test_merges_by_rank_are_merges_by_score_after_complete(model, pieces, texts):  # noqa: F811
    plan = plan_extension(model, wanted_of(model, pieces), closure="complete", piece_scores="below")
    scores = [*(model.scores.get(piece, 0.0) for piece in model.pieces), *plan.scores]
    fast = fast_bpe([*model.pieces, *plan.pieces], scores, [*model.scores, *plan.pieces])
    processor = plain_processor(content_of(model, plan))
    for text in [*texts, *plan.pieces, "".join(plan.pieces)]:
        assert [token.id for token in fast.tokenize(text)] == processor.encode(text)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, text=TEXT)
def test_text_without_a_new_piece_keeps_its_ids(model, pieces, text):  # noqa: F811
    plan = plan_extension(model, wanted_of(model, pieces), closure="complete", piece_scores="below")
    if not PieceFinder(plan.pieces).found_in(text):
        assert plain_processor(content_of(model, plan)).encode(text) == plain_processor(model.content).encode(text)


@settings(max_examples=8, deadline=None)
@given(pieces=PIECES, texts=st.lists(st.text(CHARACTERS.replace("▁", " ") + "\n丁", max_size=40), max_size=30))
def test_the_whole_command_on_random_pieces_and_text(tokenizer_dir, source, pieces, texts):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pieces.jsonl").write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in pieces))
        # Raises if a piece is not reached, or tokenizers differ on pieces alone, in context, or on the old pieces.
        expand_tokenizer(ExtensionSettings(tokenizer_dir, folder / "out", folder / "pieces.jsonl"))
        report = json.loads((folder / "out" / "vocabulary_report.json").read_text())
        new = BpeModel.read(folder / "out").pieces[600:]
        found = measure(source, Tokenizers(folder / "out"), "random", [*texts, CHINESE], PieceFinder(new))
    assert report["unreachable"] == 0 and report["unreachable_pieces"] == []
    assert report["added"] == len(new)
    assert found.failures == 0, found


def test_what_the_original_breaks_is_counted_and_shown(source, original):
    target, pieces = original
    texts = ["x甲乙", "甲乙丙", "a\n\nb", *english_documents()[:300]]
    found = measure(source, target, "text", texts, PieceFinder(pieces))
    assert found.documents == 303 and found.fast.added >= 2
    first = found.fast.first
    assert first["text"] == "x甲乙" and first["sentencepiece"] != first["fast"]
    if tiny.has_slow_tokenizer():
        # It and SentencePiece are the same code.
        assert found.slow.added == 0 and found.slow.documents == 303
    else:
        assert found.slow is None
    assert 0 < found.without_new_piece < 303 and found.changed == 0


def test_differences_of_the_source_are_counted_separately(source):
    texts = ["  two spaces", "a <s> b", "plain"]
    found = measure(source, source, "text", texts, PieceFinder([]))
    assert (found.fast.source_differs, found.fast.target_differs, found.fast.added) == (2, 2, 0)
    assert found.without_new_piece == 3 and found.failures == 0 and found.fast.first is None


def test_old_text_that_changes_is_counted(source, tokenizer_dir, tmp_path):
    """A new merge with a higher score than the old ones, which leads to no new piece in this text."""
    import shutil

    folder = shutil.copytree(tokenizer_dir, tmp_path / "changed")
    model = BpeModel.read(folder)  # noqa: F811
    (folder / "tokenizer.model").write_bytes(with_pieces(model.content, ["h▁"], [1.0]))
    text = "with the"
    finder = PieceFinder(["no part of it"])
    found = measure(source, Tokenizers(folder), "text", [text], finder)
    assert found.changed == 1 and found.failures >= 1
    assert found.first_changed["text"] == text


def test_the_piece_finder_finds_parts():
    finder = PieceFinder(["甲乙", "▁x", "abc"])
    assert all(map(finder.found_in, ("a甲乙b", "a▁xb", "zabcd", "甲甲乙")))
    assert not any(map(finder.found_in, ("甲 乙", "ab", "x▁", "")))


def test_texts_are_thinned_evenly():
    assert evenly(["a"] * 10, 10, 100) == ["a"] * 10
    assert evenly([str(index) for index in range(10)], 4, 100) == ["0", "3", "6", "9"]
    assert len(evenly(["ab"] * 10, 10, 10)) == 5


def test_every_piece_is_in_a_context_once():
    pieces = [f"{index}甲" for index in range(100, 110)]
    texts = parity.texts_in_context(pieces)
    assert len(texts) == 4 and all(sum(piece in text for text in texts) == 1 for piece in pieces)


# The documents.


def test_documents_of_every_kind(tmp_path):
    records = [
        {"source": "问", "target": "答", "category": "x"},
        {"messages": [{"from": "human", "content": "hello"}, {"from": "assistant", "content": "there"}]},
        {"text": "a text"},
        {"content": "a content"},
    ]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, records)))
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "ignored.csv").write_text("no")
    expected = {"问答", "hello", "there", "a text", "a content", "one\ntwo", "three"}
    assert set(read_parity_text([str(tmp_path)])) == expected
    assert set(read_parity_text([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")])) == expected


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", '\n{"word": "x"}', "a.jsonl:2: no text"),
        ("a.jsonl", "[]", "a.jsonl:1: no text"),
        ("a.txt", "\n\n", "holds no text"),
    ],
)
def test_bad_documents_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_parity_text([str(tmp_path / name)])


def test_paths_without_documents_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read_parity_text([str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"no \*.jsonl or \*.txt"):
        read_parity_text([str(tmp_path)])


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_large_files_are_read_in_stretches_and_sampled(tmp_path, suffix):
    texts = [f"document {index} " + "x" * (index % 50) for index in range(5000)]
    lines = [json.dumps({"text": text}) + "\n" if suffix == "jsonl" else text + "\n\n" for text in texts]
    path = tmp_path / f"large.{suffix}"
    path.write_text("".join(lines))
    assert len(read_parity_text([str(path)])) == 5000
    limits = {"read_bytes": path.stat().st_size // 4, "stretch_bytes": 2000}
    found = read_parity_text([str(path)], **limits)
    assert set(found) <= set(texts) and 1000 < len(found) < 1600
    numbers = [int(text.split()[1]) for text in found]
    assert min(numbers) < 500 and max(numbers) > 4500
    some = read_parity_text([str(path)], sample_bytes=5000, **limits)
    assert set(some) < set(found) and 3000 < sum(map(len, some)) <= 5000
