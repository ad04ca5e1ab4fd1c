"""kitoken instead of SentencePiece: equal ids where `fastest_class` chooses it, and which tokenizers it refuses."""

import importlib.util
import io
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding.bpe_model import BpeModel, scores_below, with_pieces
from colossal_llama2.encoding.fast_encoder import FastEncoder, fastest_class
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.tokenizer.closure import plan_extension
from tests.tiny import CHINESE, english_documents

pytest.importorskip("kitoken")

WORDS = ["人工智能", "工智", "改变世界", "▁the▁", "清泉石上流"]
MARKS = ["<s>", "</s>", "<unk>", "<0x0A>", "▁", "  ", " " * 31, "\n\n", "\0", "\ufeff", "e\u0301", "👩‍🚀", "\U0010ffff"]
# A surrogate is not a character, and no text in a file contains one.
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from([*MARKS, *"the state人工智能改变世界清泉"]) | CHARACTERS, max_size=40).map("".join)


def folder_of(content: bytes, folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def model(tokenizer_dir) -> BpeModel:
    return BpeModel.read(tokenizer_dir)


@pytest.fixture(scope="module")
def extended_dir(model, tmp_path_factory) -> Path:
    """The tiny tokenizer with Chinese pieces, as init_tokenizer.py closes it."""
    plan = plan_extension(model, [word for word in WORDS if "▁" not in word], closure="complete", piece_scores="below")
    content = with_pieces(model.content, plan.pieces, plan.scores)
    return folder_of(content, tmp_path_factory.mktemp("extended") / "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tokenizer_dir", "extended_dir"])
def test_ids_are_those_of_sentencepiece(fixture, request):
    folder = request.getfixturevalue(fixture)
    assert fastest_class(folder) is FastEncoder
    slow, fast = load_encoder(folder), pickle.loads(pickle.dumps(FastEncoder(folder)))  # noqa: S301 - our own bytes
    assert isinstance(fast, FastEncoder)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(TEXTS, max_size=3), st.booleans())
    def check(texts, dummy_prefix):
        ids = fast.encode(texts, dummy_prefix=dummy_prefix)
        assert ids == slow.encode(texts, dummy_prefix=dummy_prefix)

    check()
    documents = [*english_documents()[:300], "\n".join(english_documents()[:300]), CHINESE * 200, " " * 5000, ""]
    assert fast.encode(documents) == slow.encode(documents)


def test_a_model_with_an_unreached_piece_needs_sentencepiece(model, tmp_path):
    pieces = [*dict.fromkeys(WORDS[0]), WORDS[0]]
    content = with_pieces(model.content, pieces, scores_below(model.lowest_merge, len(pieces)))
    folder = folder_of(content, tmp_path / "unreached")
    slow, fast = (kind(folder).encode([WORDS[0]], dummy_prefix=False) for kind in (SentencePieceEncoder, FastEncoder))
    assert slow != fast
    assert fastest_class(folder) is SentencePieceEncoder


@pytest.mark.parametrize(
    "pieces, scores",
    [
        (["人", "工", "人工", "智", "能", "智能"], [-1e6, -1e6, 0.0, -1e6, -1e6, 0.0]),  # two merges tie
        (["人工"], [-1e6]),  # its characters become bytes
        (["▁the▁"], [-1e6]),  # a merge across a space
    ],
)
def test_pieces_in_doubt_are_left_to_sentencepiece(pieces, scores, model, tmp_path):
    assert (
        fastest_class(folder_of(with_pieces(model.content, pieces, scores), tmp_path / "doubt")) is SentencePieceEncoder
    )


@pytest.mark.parametrize(
    "settings_of_model",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"user_defined_symbols": ["[INST]"]},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
)
def test_models_in_doubt_are_left_to_sentencepiece(settings_of_model, tmp_path):
    import sentencepiece

    plain = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    }
    classes = []
    for name, changes in (("plain", {}), ("changed", settings_of_model)):
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(english_documents()[:200]),
            model_writer=content,
            vocab_size=400,
            minloglevel=2,
            **{**plain, **changes},
        )
        classes.append(fastest_class(folder_of(content.getvalue(), tmp_path / name)))
    assert classes == [FastEncoder, SentencePieceEncoder]


def test_without_kitoken_sentencepiece_encodes(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fastest_class(tokenizer_dir) is SentencePieceEncoder
