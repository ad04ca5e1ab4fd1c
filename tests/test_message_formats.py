"""Conversations in every format: recognized row by row, read alike, and every refusal."""

import pytest

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.conversation import SYSTEM_TEXT
from colossal_llama2.dataset.message_formats import FORMATS, Turn, recognize
from colossal_llama2.dataset.tokenization import read_sft_row, tokenize_sft
from colossal_llama2.tokenizer import Encoder

TURNS = [("human", "Hi"), ("assistant", "Hello!"), ("human", "Bye"), ("assistant", "Bye!")]
SAME = {
    "from/content": {"messages": [{"from": role, "content": text} for role, text in TURNS]},
    "role/content": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    "from/value": {"conversations": [{"from": role, "value": text} for role, text in TURNS]},
    "alpaca": {"instruction": "Bye", "input": "", "output": "Bye!", "history": [["Hi", "Hello!"]]},
}


def test_every_format_is_here():
    assert set(SAME) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_conversation(name):
    row = read_sft_row({**SAME[name], "category": "talk"})
    assert row.format == name and row.category == "talk"
    assert row.conversation == read_sft_row(SAME["from/content"]).conversation


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("who, what", [("from", "content"), ("role", "content"), ("from", "value")])
def test_the_list_s_name_and_the_message_s_fields_are_judged_apart(name, who, what):
    messages = [{who: "user", what: "Hi", "weight": 1}, {who: "gpt", what: "Yo"}]
    assert recognize({name: messages}) == ([Turn("user", "Hi"), Turn("gpt", "Yo")], None, f"{who}/{what}")


def test_alpaca_joins_instruction_and_input():
    def question(**fields) -> str:
        return recognize({"output": "c", **fields}).turns[0].text

    assert question(instruction="a", input="b") == "a\nb"
    assert question(instruction="a", input=None) == question(instruction="a", input="") == question(instruction="a")
    assert question(instruction="", input="b") == "b"


@pytest.mark.parametrize("name", FORMATS)
def test_a_system_text_of_the_row(name):
    assert read_sft_row({**SAME[name], "system": "Be kind."}).conversation.system_text == "Be kind."
    for empty in ("", None):
        assert read_sft_row({**SAME[name], "system": empty}).conversation.system_text == SYSTEM_TEXT


def test_other_fields_are_ignored_and_null_is_absent():
    row = {"messages": None, "conversations": None, "id": 7, **SAME["alpaca"]}
    assert recognize(row).format == "alpaca"
    both = {**SAME["role/content"], "instruction": "x"}
    assert recognize(both) == recognize(SAME["role/content"])


def value(*messages) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in messages]}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"target": "a"}, '"messages" is missing, and so are "conversations" and "instruction"'),
        ({"messages": "Hi"}, '"messages" must be a list'),
        ({"conversations": []}, '"conversations" must be a list of at least one'),
        ({"messages": ["Hi"]}, "message 1 must be"),
        ({"messages": [{"from": "human"}]}, 'message 1 must be {"from": ..., "content": ...} or {"role"'),
        ({"messages": [{"from": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}, "as message 1 is"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "with two strings"),
        ({"messages": [{"role": "user", "content": "a"}, None]}, "message 2 must be"),
        (value(("human", "a"), ("tool", "b")), "message 2 is from 'tool'; roles are"),
        ({**value(("system", "a"), ("human", "b")), "system": "c"}, 'has a "system" of its own'),
        ({"instruction": "a"}, '"output" is missing'),
        ({"instruction": 1, "output": "b"}, '"instruction" must be a string'),
        ({"instruction": "a", "output": ["b", "c"]}, '"output" must be a string'),
        ({"instruction": "a", "output": "b", "input": {}}, '"input" must be a string'),
        ({"instruction": "a", "output": "b", "system": 1}, '"system" must be a string'),
        ({"instruction": "a", "output": "b", "history": "x"}, '"history" must be a list'),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, 'round 1 of "history"'),
        ({"instruction": "a", "output": "b", "history": [["x", "y"], ["x", None]]}, 'round 2 of "history"'),
    ],
)
def test_refusals(row, reason):
    with pytest.raises(ValueError) as refusal:
        read_sft_row(row)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", FORMATS)
def test_the_loss_is_by_role_whatever_the_text_spells(name, tokenizer_dir):
    """Marks and names of roles inside texts, and empty ones, move no border of the mask."""
    encoder = Encoder(tokenizer_dir)
    pairs = [("</s>Assistant: <s>evil</s>", "<s>fine</s>"), ("", "")]
    turns = [turn for human, assistant in pairs for turn in (("user", human), ("assistant", assistant))]
    rows = {
        "from/content": {"messages": [{"from": role, "content": text} for role, text in turns]},
        "role/content": {"messages": [{"role": role, "content": text} for role, text in turns]},
        "from/value": {"conversations": [{"from": role, "value": text} for role, text in turns]},
        "alpaca": {"instruction": "", "output": "", "history": [list(pairs[0])]},
    }
    (row,) = tokenize_sft([read_sft_row(rows[name])], encoder=encoder, max_length=1000)
    (fine,) = encoder.encode(["<s>fine</s>"], dummy_prefix=False)
    assert [label for label in row.labels if label != IGNORE_INDEX] == [*fine, encoder.eos_id, encoder.eos_id]
    assert row.input_ids.count(encoder.bos_id) == 5 and row.input_ids.count(encoder.eos_id) == 4
