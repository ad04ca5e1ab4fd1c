"""What is added so that every new piece is reached, checked with SentencePiece on random lists of pieces."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding.bpe_model import BpeModel, merges, plain_processor, scores_below, unreachable, with_pieces
from colossal_llama2.tokenizer.closure import evolve, intermediate_pieces, missing_characters, plan_extension

# Few characters, so that pieces overlap and repeat; "▁", "e" and "t" are in many merges of the source.
CHARACTERS = "et▁甲乙丙"
PIECES = st.lists(st.text(CHARACTERS, min_size=1, max_size=9), min_size=1, max_size=25)
TEXT = st.text(CHARACTERS, max_size=60)
# The same examples each time, so that a rare failure does not block another change. Remove derandomize to search.
FEW = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="session")
def model(tokenizer_dir) -> BpeModel:
    return BpeModel.read(tokenizer_dir)


def wanted_of(model, pieces):
    return [piece for piece in dict.fromkeys(pieces) if piece not in set(model.pieces)]


def content_of(model, plan):
    return with_pieces(model.content, plan.pieces, plan.scores)


def test_the_worked_example():
    scores = {"人工智能": -1.0}
    assert evolve("人工智能", scores) == ["人", "工", "智", "能"]
    added = intermediate_pieces(["人工智能"], scores)
    assert len(added) == 2
    assert evolve("人工智能", scores) == ["人工智能"]


def test_what_is_added_is_shared():
    scores = {"abc": -1.0, "abd": -2.0, "xab": -3.0}
    assert intermediate_pieces(["abc", "abd", "xab"], scores) == ["ab"]
    assert scores["ab"] < -3.0


def test_missing_characters_are_those_that_no_piece_is():
    assert missing_characters(["你好", "好", "ab"], {"a": 0.0}) == ["你", "b"]
    assert missing_characters([], {}) == []


@pytest.mark.slow
@FEW
@given(pieces=PIECES, text=TEXT)
def test_evolve_merges_as_sentencepiece(model, pieces, text):
    plan = plan_extension(model, wanted_of(model, pieces), closure="complete", piece_scores="below")
    scores = {**model.scores, **dict(zip(plan.pieces, plan.scores, strict=True))}
    known = [character for character in text if character in scores]
    expected = plain_processor(content_of(model, plan)).encode("".join(known), out_type=str)
    assert evolve(known, scores) == expected


@pytest.mark.slow
@FEW
@given(pieces=PIECES, piece_scores=st.sampled_from(["below", "zero"]))
def test_complete_reaches_every_piece(model, pieces, piece_scores):
    wanted = wanted_of(model, pieces)
    plan = plan_extension(model, wanted, closure="complete", piece_scores=piece_scores)
    assert unreachable(content_of(model, plan), plan.pieces) == []
    assert sorted(plan.pieces[: len(wanted)]) == sorted(wanted)
    assert len(plan.pieces) == len(set(plan.pieces)) == len(wanted) + plan.characters + plan.intermediates
    assert not set(plan.pieces) & set(model.pieces)
    assert plan.dropped == plan.over_budget == []
    if piece_scores == "below":
        assert plan.pieces[: len(wanted)] == wanted
        in_file = [struct.unpack("<f", struct.pack("<f", score))[0] for score in plan.scores]
        assert in_file == sorted(set(in_file), reverse=True)
        assert not in_file or in_file[0] < model.lowest_merge


def test_a_score_of_zero_is_better_than_minus_zero(model):
    """In SentencePiece; the source's first merge has -0.0, and "zero" gives new pieces 0.0."""
    assert str(model.scores["▁▁"]) == "-0.0"
    plan = plan_extension(model, ["▁丙", "e▁▁丙"], closure="complete", piece_scores="zero")
    assert unreachable(content_of(model, plan), plan.pieces) == []


@pytest.mark.slow
@FEW
@given(pieces=PIECES, budget=st.integers(1, 40))
def test_a_budget_drops_the_last_pieces_first(model, pieces, budget):
    wanted = wanted_of(model, pieces)
    for way in ("complete", "drop", "off"):
        plan = plan_extension(model, wanted, closure=way, piece_scores="below", max_added=budget)
        assert len(plan.pieces) <= budget
        if way != "off":
            assert unreachable(content_of(model, plan), plan.pieces) == []
        num_kept = len(wanted) - len(plan.over_budget)
        assert wanted[num_kept:] == plan.over_budget
        assert set(plan.dropped) | set(plan.pieces) >= set(wanted[:num_kept])
        if way == "off":
            assert plan.pieces == wanted[:budget]
        elif plan.over_budget:
            one_more = plan_extension(model, wanted[: num_kept + 1], closure=way, piece_scores="below")
            assert len(one_more.pieces) > budget


@pytest.mark.slow
@FEW
@given(pieces=PIECES)
def test_drop_leaves_out_exactly_what_is_not_reached(model, pieces):
    wanted = wanted_of(model, pieces)
    plan = plan_extension(model, wanted, closure="drop", piece_scores="below")
    everything = plan_extension(model, wanted, closure="off", piece_scores="below")
    assert everything.pieces == wanted
    missed = set(unreachable(content_of(model, everything), wanted))
    unspelled = set(missing_characters(wanted, model.scores))
    assert set(plan.dropped) == {piece for piece in wanted if piece in missed or unspelled.intersection(piece)}
    assert plan.pieces == [piece for piece in wanted if piece not in plan.dropped]
    assert plan.characters == plan.intermediates == 0
    assert unreachable(content_of(model, plan), plan.pieces) == []


def test_a_budget_is_used_up(model):
    wanted = [f"{a}{b}{c}" for a in "甲乙丙丁" for b in "子丑寅卯辰巳" for c in "东南西北中"]
    plan = plan_extension(model, wanted, closure="complete", piece_scores="below", max_added=70)
    assert 60 < len(plan.pieces) <= 70


def test_pieces_that_the_normalizer_alters_are_dropped(tmp_path):
    """NFKC turns "Ａ" into "A", so no text ever contains the first."""
    import io

    import sentencepiece

    from tests.tiny import english_documents

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_documents()[:200]),
        model_writer=content,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(content.getvalue())
    model = BpeModel.read(tmp_path)
    assert not model.has_identity_normalizer
    plan = plan_extension(model, ["ＡＢ", "甲乙", "▁甲"], closure="complete", piece_scores="below")
    assert plan.dropped == ["ＡＢ"]
    assert plan.pieces == ["甲乙", "▁甲", "甲", "乙"]


def test_pieces_as_bytes_are_what_protobuf_writes(model):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model.content)
    pieces = ["甲乙" * 32, "x" * 64, "▁é"]
    for piece in pieces:
        proto.pieces.add(piece=piece, score=-1.5)
    assert with_pieces(model.content, pieces, [-1.5] * 3) == proto.SerializeToString()
    assert with_pieces(b"", ["a"], [0.0]) == ModelProto(pieces=[{"piece": "a", "score": 0.0}]).SerializeToString()


@pytest.mark.parametrize("lowest", [0.0, -0.5, -31_740.0, -(2.0**24) + 1, -1e9])
def test_scores_differ_in_float32_wherever_they_start(lowest):
    import numpy

    scores = numpy.array(scores_below(lowest, 50_000), dtype=numpy.float32)
    assert numpy.all(numpy.diff(scores) < 0)
    assert numpy.float32(lowest) > scores[0] and scores[-1] > lowest - 1e8


def test_merges_are_those_of_transformers(model):
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = [*model.pieces, "甲", "乙", "甲乙", "甲乙甲", "乙甲", "甲乙甲乙"]
    for scores in (scores_below(-1000, 6), [0.0] * 6):
        all_scores = [*(model.scores.get(piece, 0.0) for piece in model.pieces), *scores]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        expected = generate_merges(vocabulary, list(zip(pieces, all_scores, strict=True)))
        assert merges(pieces, all_scores, [*model.scores, *pieces[len(model.pieces) :]]) == expected
