"""The chat template: roles, exchanges, segments, and every refusal."""

import pytest

from colossal_llama2.corpus import conversation
from colossal_llama2.corpus.conversation import (
    Message,
    Segment,
    Turn,
    message_segments,
    opening_text,
    read_conversation,
)


def turn(role: str, text: str) -> Turn:
    return Turn(role, text)


def render(turns) -> str:
    """The complete conversation as the original's prompt, with its marks as text."""
    talk = read_conversation(turns)
    groups = [*talk.exchanges, talk.unanswered]
    segments = [
        segment
        for number, group in enumerate(groups)
        for segment in message_segments(group, opening=opening_text(talk) if number == 0 else "")
    ]
    return "".join(f"<s>{segment.text}</s>" if segment.is_marked else segment.text for segment in segments)


def test_the_template_is_the_originals():
    messages = [turn("human", "Hi"), turn("assistant", "Hello!"), turn("human", "Bye"), turn("assistant", "Bye!")]
    assert render(messages) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n"
        "Human: <s>Hi</s>Assistant: <s>Hello!</s>Human: <s>Bye</s>Assistant: <s>Bye!</s>"
    )


def test_other_names_of_the_roles():
    assert render([turn("user", "Hi"), turn("gpt", "Yo")]) == render([turn("human", "Hi"), turn("assistant", "Yo")])


def test_system_message_replaces_the_system_text():
    messages = [turn("system", "You are a pirate."), turn("human", "Hi"), turn("assistant", "Arr")]
    assert render(messages) == "You are a pirate.\n\nHuman: <s>Hi</s>Assistant: <s>Arr</s>"
    messages[0] = turn("system", "")
    assert render(messages) == "Human: <s>Hi</s>Assistant: <s>Arr</s>"


def test_a_later_system_message_precedes_the_next_name():
    turns = [turn("user", "Hi"), turn("gpt", "Yo"), turn("system", "Be brief."), turn("user", "Bye"), turn("gpt", "B")]
    assert render(turns).endswith("Assistant: <s>Yo</s>Be brief.\n\nHuman: <s>Bye</s>Assistant: <s>B</s>")
    turns[2] = turn("system", "")
    assert render(turns).endswith("Assistant: <s>Yo</s>Human: <s>Bye</s>Assistant: <s>B</s>")


def test_exchanges_end_with_an_answer():
    talk = read_conversation(
        [turn("assistant", "0"), turn("human", "1"), turn("human", ""), turn("assistant", "3"), turn("human", "4")]
    )
    assert [[message.text for message in exchange] for exchange in talk.exchanges] == [["0"], ["1", "", "3"]]
    assert talk.unanswered == [Message("Human", "4")]


def test_segments_train_only_the_assistant():
    messages = [Message("Human", "Hi"), Message("Assistant", "Hello!")]
    assert message_segments(messages, opening="Be kind.\n\n") == [
        Segment("Be kind.\n\nHuman: ", is_marked=False, is_trained=False),
        Segment("Hi", is_marked=True, is_trained=False),
        Segment("Assistant: ", is_marked=False, is_trained=False),
        Segment("Hello!", is_marked=True, is_trained=True),
    ]


def test_a_system_text_apart_from_the_turns():
    turns = [turn("user", "Hi"), turn("gpt", "Yo")]
    assert opening_text(read_conversation(turns, system_text="Be kind.")) == "Be kind.\n\n"
    with pytest.raises(ValueError, match='message 1 has the role system, but the record also has a "system" field'):
        read_conversation([turn("system", "Be brief."), *turns], system_text="Be kind.")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([turn("bot", "Hi")], "message 1 is from 'bot'; roles are human, user, assistant, gpt, system"),
        ([turn("human", "Hi"), turn("system", "Be kind.")], "the last message has the role system, and nothing"),
        ([turn("human", "Hi"), turn("system", "a"), turn("system", "b")], "messages 2 and 3 both have the role system"),
        ([turn("system", "Be kind.")], "nothing else"),
    ],
)
def test_refusals(turns, reason):
    with pytest.raises(ValueError, match=reason):
        read_conversation(turns)


def test_every_role_has_a_speaker():
    assert set(conversation.ROLES.values()) == {"Human", "Assistant"}
