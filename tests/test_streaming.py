"""Text while it is generated: never half a character, and together what `decode` returns."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.inference.streaming import TextStream
from tests import tiny
from tests.byte_level import make_byte_level

TEXTS = (
    "the state",
    "  two  spaces ",
    tiny.CHINESE,
    "混合 mixed 👩\u200d👧 🇨🇳 e\u0301 end",
    "\n\n\ttab",
    "",
    " \u00a0",
    "don 't , stop .",
)
KINDS = ("sentencepiece", "llama3", "smollm2")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tokenizer_dir, tmp_path_factory):
    if request.param == "sentencepiece":
        return load_tokenizer(tokenizer_dir)
    return load_tokenizer(make_byte_level(tmp_path_factory.mktemp(request.param) / "t", request.param))


def parts_of(tokenizer, ids) -> list[str]:
    stream = TextStream(tokenizer)
    return [*map(stream.push, ids), stream.end()]


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_the_parts_are_the_text(tokenizer, text):
    encoder = load_encoder(tokenizer.name_or_path)
    ids = encoder.encode([text])[0]
    parts = parts_of(tokenizer, ids)
    assert "".join(parts) == decoded(tokenizer, ids)
    assert not any("\ufffd" in part for part in parts) and parts[-1] == ""
    # Each character comes with its last token, the first one included.
    ends = encoder.bytes_of_tokens(text, ids).cumsum().tolist()
    for count, end in enumerate(ends, start=1):
        assert "".join(parts[:count]) == text.encode()[:end].decode(errors="ignore")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_that_are_whole_characters(tokenizer, data):
    """Runs of any tokens and of encoded texts, with special tokens between them."""
    encoder = load_encoder(tokenizer.name_or_path)
    texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=6)
    ids = []
    for text, special in data.draw(st.lists(st.tuples(texts, st.booleans()), max_size=5)):
        ids += encoder.encode([text], dummy_prefix=data.draw(st.booleans()))[0]
        ids += [encoder.eos_id] if special else []
    expected = decoded(tokenizer, ids)
    if "\ufffd" not in expected:
        assert "".join(parts_of(tokenizer, ids)) == expected


def test_bytes_that_are_no_character(tokenizer):
    """They become U+FFFD, at the latest at the end; complete characters before and after them are kept."""
    encoder = load_encoder(tokenizer.name_or_path)
    moon = encoder.encode(["明"], dummy_prefix=False)[0]
    end = encoder.encode([" end"], dummy_prefix=False)[0]
    assert len(moon) > 1
    parts = parts_of(tokenizer, [*moon, *moon[:-1]])
    assert "".join(parts[:-1]) == "明" and set(parts[-1]) == {"\ufffd"}
    parts = parts_of(tokenizer, [*moon, *moon[:-1], *end])
    assert "".join(parts).startswith("明\ufffd") and "".join(parts).endswith(" end")
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(len(tokenizer)) for _ in range(30)]
        parts = parts_of(tokenizer, ids)
        whole = decoded(tokenizer, ids)
        # A part never ends inside a character, and never takes one back.
        assert len("".join(parts).replace("\ufffd", "")) >= len(whole.replace("\ufffd", ""))
