"""Records to ids and labels: where the mask falls, what is dropped, and that marks in text stay text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset import IGNORE_INDEX, tokenization
from colossal_llama2.dataset.conversation import SYSTEM_TEXT
from colossal_llama2.dataset.tokenization import (
    decode_marked,
    decode_trained,
    read_pretrain_row,
    read_sft_row,
    tokenize_pretrain,
    tokenize_sft,
)
from colossal_llama2.tokenizer import Encoder

BOS, EOS = 1, 2
TEXTS = st.text(st.sampled_from("ab <s>/人工\n"), max_size=12)
ROLES = st.sampled_from(["human", "user", "assistant", "gpt"])


@pytest.fixture(scope="module")
def encoder(tokenizer_dir) -> Encoder:
    return Encoder(tokenizer_dir)


def pretrain(encoder, **row):
    return tokenize_pretrain([read_pretrain_row(row)], encoder=encoder)[0]


def sft(encoder, *messages, max_length=10_000):
    row = {"messages": [{"from": role, "content": text} for role, text in messages]}
    return tokenize_sft([read_sft_row(row)], encoder=encoder, max_length=max_length)[0]


def test_pretrain_without_source_trains_everything(encoder):
    row = pretrain(encoder, target="The with statement")
    assert row.input_ids == [BOS, *encoder.encode(["The with statement"])[0], EOS]
    assert row.labels == row.input_ids and row.tokens_in == len(row.input_ids) and not row.drops


def test_pretrain_mask_falls_between_source_and_target(encoder):
    row = pretrain(encoder, source="The wi", target="th statement", category="riddle")
    source, target = encoder.encode(["The wi"])[0], encoder.encode(["th statement"], dummy_prefix=False)[0]
    assert row.input_ids == [BOS, *source, *target, EOS]
    assert row.labels == [IGNORE_INDEX] * (1 + len(source)) + [*target, EOS]


def test_pretrain_same_text_as_source_and_as_target(encoder):
    rows = [read_pretrain_row({"source": "in", "target": "in"}), read_pretrain_row({"target": "in"})]
    both, alone = tokenize_pretrain(rows, encoder=encoder)
    with_prefix, without = encoder.encode(["in"])[0], encoder.encode(["in"], dummy_prefix=False)[0]
    assert with_prefix != without
    assert both.input_ids == [BOS, *with_prefix, *without, EOS] and alone.input_ids == [BOS, *with_prefix, EOS]


@given(source=TEXTS, target=TEXTS.filter(bool))
@settings(max_examples=60, deadline=None)
def test_pretrain_properties(encoder, source, target):
    row = pretrain(encoder, source=source, target=target)
    assert len(row.input_ids) == len(row.labels)
    assert row.tokens_in == len(row.input_ids) + sum(drop.tokens for drop in row.drops)
    if target:
        assert row.input_ids.count(BOS) == row.input_ids.count(EOS) == 1
        kept = [label for label in row.labels if label != IGNORE_INDEX]
        assert kept == row.input_ids[len(row.input_ids) - len(kept) :]
        decoded = encoder.decode([token for token in kept if token not in (BOS, EOS)])
        assert decoded.replace(" ", "") == target.replace(" ", "")


@pytest.mark.parametrize(
    "read, row, reason",
    [
        (read_pretrain_row, {"source": "a"}, '"target" is missing'),
        (read_pretrain_row, {"target": None}, '"target" must be a string'),
        (read_pretrain_row, {"target": "a", "source": 3}, '"source" must be a string'),
        (read_pretrain_row, {"target": "a", "category": ["x"]}, '"category" must be a string'),
        (read_sft_row, {"target": "a"}, '"messages" is missing'),
        (read_sft_row, {"messages": [{"from": "human", "content": ""}], "category": 1}, '"category" must be a string'),
    ],
)
def test_refusals(read, row, reason):
    with pytest.raises(ValueError, match=reason):
        read(row)


def test_defaults_of_what_is_missing_or_null():
    assert read_pretrain_row({"target": "a", "source": None}) == ("", "a", "unknown")
    assert read_sft_row({"messages": [{"from": "human", "content": ""}]}).category == "None"


def test_sft_ids_and_mask(encoder):
    row = sft(encoder, ("human", "Hi <s> there"), ("assistant", "a </s> b"), ("human", "Bye"), ("assistant", "Bye!"))

    def continued(text):
        return encoder.encode([text], dummy_prefix=False)[0]

    head = [BOS, *encoder.encode([SYSTEM_TEXT + "\n\nHuman: "])[0], BOS, *continued("Hi <s> there"), EOS]
    first = [*continued("a </s> b"), EOS]
    middle = [*continued("Human: "), BOS, *continued("Bye"), EOS, *continued("Assistant: "), BOS]
    last = [*continued("Bye!"), EOS]
    head += [*continued("Assistant: "), BOS]
    assert row.input_ids == head + first + middle + last
    assert row.labels == [IGNORE_INDEX] * len(head) + first + [IGNORE_INDEX] * len(middle) + last
    assert decode_trained(row.labels, encoder=encoder) == ["a </s> b</s>", "Bye!</s>"]
    assert decode_marked(row.input_ids, encoder=encoder).endswith("Human: <s>Bye</s>Assistant: <s>Bye!</s>")


def test_sft_two_humans_in_a_row_and_empty_turns(encoder):
    row = sft(encoder, ("human", "one"), ("human", "two"), ("assistant", ""), ("human", ""), ("assistant", "three"))
    assert decode_trained(row.labels, encoder=encoder) == ["</s>", "three</s>"]
    assert row.input_ids.count(EOS) == 5 and not row.drops


def test_sft_keeps_whole_leading_exchanges(encoder):
    turns = [("human", "one two three"), ("assistant", "four five six")] * 3
    one, two, three = (sft(encoder, *turns[: 2 * count]) for count in (1, 2, 3))
    exact = sft(encoder, *turns, max_length=len(two.input_ids))
    assert exact.input_ids == two.input_ids and exact.labels == two.labels
    assert exact.drops == ((tokenization.LATER_EXCHANGES_TOO_LONG, len(three.input_ids) - len(two.input_ids)),)
    assert sft(encoder, *turns, max_length=len(two.input_ids) - 1).input_ids == one.input_ids
    none = sft(encoder, *turns, max_length=len(one.input_ids) - 1)
    assert none.input_ids == [] and none.drops == ((tokenization.FIRST_EXCHANGE_TOO_LONG, len(three.input_ids)),)


def test_sft_drops_what_has_no_answer(encoder):
    answered = sft(encoder, ("human", "one"), ("assistant", "two"))
    trailing = sft(encoder, ("human", "one"), ("assistant", "two"), ("human", "three"))
    assert trailing.input_ids == answered.input_ids
    assert trailing.drops == ((tokenization.UNANSWERED, trailing.tokens_in - len(answered.input_ids)),)
    alone = sft(encoder, ("human", "one"))
    assert alone.input_ids == [] and alone.drops == ((tokenization.NO_ANSWER, alone.tokens_in),)


@given(messages=st.lists(st.tuples(ROLES, TEXTS), min_size=1, max_size=8), max_length=st.integers(8, 400))
@settings(max_examples=80, deadline=None)
def test_sft_properties(encoder, messages, max_length):
    row = sft(encoder, *messages, max_length=max_length)
    assert len(row.input_ids) == len(row.labels) <= max_length
    assert row.tokens_in == len(row.input_ids) + sum(drop.tokens for drop in row.drops)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    answers = [text for role, text in messages if role in ("assistant", "gpt")]
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    # The answers kept are the leading ones, each with exactly one </s>, and never with an <s>.
    kept = answers[: trained.count(EOS)]
    expected = [token for ids in encoder.encode(kept, dummy_prefix=False) for token in [*ids, EOS]]
    assert trained == expected
