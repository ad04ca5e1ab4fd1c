"""Records to ids and labels: where the mask falls, what is dropped, and that marks in text stay text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.corpus import conversation as talks
from colossal_llama2.corpus.conversation import SYSTEM_TEXT
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write import records, tokenization
from colossal_llama2.dataset.write.records import PretrainRow, read_pretrain_row, read_sft_row
from colossal_llama2.dataset.write.tokenization import decode_marked, decode_trained, tokenize_pretrain, tokenize_sft
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.storage.row_errors import RowError

BOS, EOS = 1, 2
TEXTS = st.text(st.sampled_from("ab <s>/人工\n"), max_size=12)
ROLES = st.sampled_from(["human", "user", "assistant", "gpt"])


@pytest.fixture(scope="module")
def encoder(tokenizer_dir) -> SentencePieceEncoder:
    return load_encoder(tokenizer_dir)


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
        (read_pretrain_row, {"target": None}, '"target" is missing'),
        (read_pretrain_row, {"target": [], "body": "b", "source": "s"}, r'"target" is missing; rename .* \(body\?\)'),
        (read_pretrain_row, {"target": ["a"]}, '"target" must be a string'),
        (read_pretrain_row, {"text": 1, "target": None}, '"text" must be a string'),
        (read_pretrain_row, {"target": float("nan")}, '"target" is missing'),
        (read_pretrain_row, {"messages": [{"role": "user"}]}, "this looks like SFT data: use prepare_sft_dataset.py"),
        (read_pretrain_row, {"target": None, "instruction": "a"}, "this looks like SFT data"),
        (records.read_pretrain_document, {"text": ""}, '"text" is empty'),
        (records.read_pretrain_document, {"target": "", "text": "a"}, '"target" is empty'),
        (read_pretrain_row, {"target": "a", "source": 3}, '"source" must be a string'),
        (read_pretrain_row, {"target": "a", "category": ["x"]}, '"category" must be a string'),
        (read_sft_row, {"target": "a"}, '"messages" is missing'),
        (read_sft_row, {"target": None, "text": "a"}, "looks like pre-training data: use prepare_pretrain_dataset.py"),
        (read_sft_row, {"instruction": "a", "output": "b", "category": [1]}, '"category" must be a string'),
    ],
)
def test_refusals(read, row, reason):
    with pytest.raises(RowError, match=reason) as refusal:
        read(row)
    assert refusal.value.reason


@pytest.mark.parametrize("nothing", [None, [], {}, float("nan")])
def test_defaults_of_what_is_missing_or_null(nothing):
    row = {"target": "a", "source": nothing, "category": nothing, "text": nothing, "weight": nothing}
    assert read_pretrain_row(row) == PretrainRow("", "a", "unknown")
    assert read_sft_row({"messages": [{"from": "human", "content": ""}], "category": nothing}).category == "None"


def test_text_is_read_where_target_is_absent():
    assert read_pretrain_row({"text": "a", "source": "s"}) == read_pretrain_row({"target": "a", "source": "s"})
    assert read_pretrain_row({"target": None, "text": "a"}) == read_pretrain_row({"target": "a", "text": []})
    both = read_pretrain_row({"text": "b", "target": "a"})
    assert (both.target, both.notes) == ("a", (records.BOTH_TEXTS,))


@pytest.mark.parametrize("value, text", [(7, "7"), (-7, "-7"), (1.5, "1.5"), (True, "true"), (0, "0"), ("", "")])
def test_a_category_that_is_not_a_string_is_converted(value, text):
    assert read_pretrain_row({"target": "a", "category": value}).category == text
    assert read_sft_row({"instruction": "a", "output": "b", "category": value}).category == text


def test_a_document_that_a_mark_masks_is_dropped(encoder):
    for mark in ({"weight": 0}, {"train": False}, {"loss_mask": 0.0}):
        row = pretrain(encoder, target="The with statement", **mark)
        tokens = len(encoder.encode(["The with statement"])[0]) + 2
        assert row == ([], [], tokens, ((tokenization.MASKED_DOCUMENTS, tokens),), 0)
    assert pretrain(encoder, target="a", weight=1) == pretrain(encoder, target="a")
    # A field with another meaning, as documents may have.
    other = read_pretrain_row({"target": "a", "weight": 0.7})
    assert not other.is_masked and other.notes == (records.OTHER_MARKS,)


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


def test_sft_keeps_complete_leading_exchanges(encoder):
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


MARKS = st.sampled_from([{}, {}, {"weight": 0}, {"train": False}, {"loss": 1.0}, {"masked": True}, {"trainable": None}])


@pytest.mark.slow
@given(
    messages=st.lists(st.tuples(ROLES, TEXTS, MARKS), min_size=1, max_size=8),
    max_length=st.integers(8, 400),
    masks_opening=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_sft_properties(encoder, messages, max_length, masks_opening):
    row = {"messages": [{"from": role, "content": text, **mark} for role, text, mark in messages]}
    checked = read_sft_row(row, masks_opening=masks_opening)
    row = tokenize_sft([checked], encoder=encoder, max_length=max_length)[0]
    assert len(row.input_ids) == len(row.labels) <= max_length
    assert row.tokens_in == len(row.input_ids) + sum(drop.tokens for drop in row.drops)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    answers, is_asked = [], False
    for role, text, mark in messages:
        if role in ("assistant", "gpt"):
            is_masked = mark in ({"weight": 0}, {"train": False}, {"masked": True}) or masks_opening and not is_asked
            answers.append((text, is_masked))
        else:
            is_asked = True
    # The answers kept are the leading ones, each with exactly one </s>, and never with an <s>.
    kept = [text for text, is_masked in answers[: row.exchanges] if not is_masked]
    expected = [token for ids in encoder.encode(kept, dummy_prefix=False) for token in [*ids, EOS]]
    assert [label for label in row.labels if label != IGNORE_INDEX] == expected
    assert bool(row.input_ids) == bool(expected)
    if not row.input_ids:
        answered = [is_masked for _, is_masked in answers]
        reasons = {tokenization.FIRST_EXCHANGE_TOO_LONG, tokenization.TRAINED_TOO_LONG}
        reasons = {tokenization.ALL_MASKED} if answered and all(answered) else reasons
        assert row.drops[0].reason in (reasons if answered else {tokenization.NO_ANSWER})


def test_a_masked_answer_stays_in_the_context(encoder):
    turns = [("human", "one"), ("gpt", "two"), ("human", "three"), ("gpt", "four")]
    plain = sft(encoder, *turns)
    rows = [{"from": role, "content": text} for role, text in turns]
    rows[1]["weight"] = 0
    (masked,) = tokenize_sft([read_sft_row({"messages": rows})], encoder=encoder, max_length=1000)
    assert masked.input_ids == plain.input_ids and masked.exchanges == 2
    assert decode_trained(masked.labels, encoder=encoder) == ["four</s>"]
    # The first trained answer does not fit.
    short = tokenize_sft([read_sft_row({"messages": rows})], encoder=encoder, max_length=len(plain.input_ids) - 1)[0]
    assert short.input_ids == [] and short.drops == ((tokenization.TRAINED_TOO_LONG, len(plain.input_ids)),)


def test_an_opening_of_the_assistant_is_masked_by_default(encoder):
    turns = [("gpt", "I"), ("human", "q"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    masked, trained = (read_sft_row(row, masks_opening=masks) for masks in (True, False))
    assert masked.notes == (talks.BEGINS_WITH_ANSWER, talks.MASKED_OPENINGS)
    assert trained.notes == (talks.BEGINS_WITH_ANSWER,)
    rows = tokenize_sft([masked, trained], encoder=encoder, max_length=1000)
    assert [decode_trained(row.labels, encoder=encoder) for row in rows] == [["a</s>"], ["I</s>", "a</s>"]]
    alone = read_sft_row({"conversations": row["conversations"][:1]})
    (dropped,) = tokenize_sft([alone], encoder=encoder, max_length=1000)
    assert dropped.drops[0].reason == tokenization.ALL_MASKED
