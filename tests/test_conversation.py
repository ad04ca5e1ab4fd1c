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


def said(role: str, text: str) -> Turn:
    return Turn(role, text)


def render(turns) -> str:
    """The whole conversation as the original's prompt, with its marks as text."""
    talk = read_conversation(turns)
    groups = [*talk.exchanges, talk.unanswered]
    segments = [
        segment
        for number, group in enumerate(groups)
        for segment in message_segments(group, opening=opening_text(talk) if number == 0 else "")
    ]
    return "".join(f"<s>{segment.text}</s>" if segment.is_marked else segment.text for segment in segments)


def test_the_template_is_the_originals():
    messages = [said("human", "Hi"), said("assistant", "Hello!"), said("human", "Bye"), said("assistant", "Bye!")]
    assert render(messages) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\n"
        "Human: <s>Hi</s>Assistant: <s>Hello!</s>Human: <s>Bye</s>Assistant: <s>Bye!</s>"
    )


def test_other_names_of_the_roles():
    assert render([said("user", "Hi"), said("gpt", "Yo")]) == render([said("human", "Hi"), said("assistant", "Yo")])


def test_system_message_replaces_the_system_text():
    messages = [said("system", "You are a pirate."), said("human", "Hi"), said("assistant", "Arr")]
    assert render(messages) == "You are a pirate.\n\nHuman: <s>Hi</s>Assistant: <s>Arr</s>"
    messages[0] = said("system", "")
    assert render(messages) == "Human: <s>Hi</s>Assistant: <s>Arr</s>"


def test_a_later_system_message_stands_before_the_name_that_follows():
    turns = [said("user", "Hi"), said("gpt", "Yo"), said("system", "Be brief."), said("user", "Bye"), said("gpt", "B")]
    assert render(turns).endswith("Assistant: <s>Yo</s>Be brief.\n\nHuman: <s>Bye</s>Assistant: <s>B</s>")
    turns[2] = said("system", "")
    assert render(turns).endswith("Assistant: <s>Yo</s>Human: <s>Bye</s>Assistant: <s>B</s>")


def test_exchanges_end_with_an_answer():
    talk = read_conversation(
        [said("assistant", "0"), said("human", "1"), said("human", ""), said("assistant", "3"), said("human", "4")]
    )
    assert [[message.text for message in exchange] for exchange in talk.exchanges] == [["0"], ["1", "", "3"]]
    assert talk.unanswered == [Message("Human", "4")]


def test_segments_train_the_assistant_alone():
    messages = [Message("Human", "Hi"), Message("Assistant", "Hello!")]
    assert message_segments(messages, opening="Be kind.\n\n") == [
        Segment("Be kind.\n\nHuman: ", is_marked=False, is_trained=False),
        Segment("Hi", is_marked=True, is_trained=False),
        Segment("Assistant: ", is_marked=False, is_trained=False),
        Segment("Hello!", is_marked=True, is_trained=True),
    ]


def test_a_system_text_apart_from_the_turns():
    turns = [said("user", "Hi"), said("gpt", "Yo")]
    assert opening_text(read_conversation(turns, system_text="Be kind.")) == "Be kind.\n\n"
    with pytest.raises(ValueError, match='message 1 has the role system, but the record also has a "system" field'):
        read_conversation([said("system", "Be brief."), *turns], system_text="Be kind.")


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([said("bot", "Hi")], "message 1 is from 'bot'; roles are human, user, assistant, gpt, system"),
        ([said("human", "Hi"), said("system", "Be kind.")], "the last message has the role system, and nothing"),
        ([said("human", "Hi"), said("system", "a"), said("system", "b")], "messages 2 and 3 both have the role system"),
        ([said("system", "Be kind.")], "nothing else"),
    ],
)
def test_refusals(turns, reason):
    with pytest.raises(ValueError, match=reason):
        read_conversation(turns)


def test_every_role_has_a_speaker():
    assert set(conversation.ROLES.values()) == {"Human", "Assistant"}
