"""The Jinja template against tokenize_sft: the same ids and the same mask, on real conversations and on odd ones."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.conversation import CHAT_TEMPLATE, ROLES
from colossal_llama2.dataset.prepare import CHAT_TEMPLATE_FILE
from colossal_llama2.dataset.tokenization import read_sft_row, tokenize_sft
from colossal_llama2.tokenizer import Encoder, load_tokenizer
from colossal_llama2.tokenizer.init_tokenizer import expand_tokenizer
from tests.tiny import CHINESE

TEXTS = st.text(st.sampled_from("ab  <s>/人工😀\n\t▁:'\"{%}"), max_size=10)


@pytest.fixture(scope="module")
def chinese_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """The tiny tokenizer with Chinese characters and words, as init_tokenizer.py makes it, and with the template."""
    folder = tmp_path_factory.mktemp("chinese")
    pieces = [CHINESE[start : start + 2] for start in range(0, 40)] + ["人工智能"]
    (folder / "new.jsonl").write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in pieces))
    expand_tokenizer(tokenizer_dir, folder / "tokenizer", folder / "new.jsonl")
    (folder / "tokenizer" / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATE)
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def chinese(chinese_dir) -> tuple:
    return Encoder(chinese_dir), load_tokenizer(chinese_dir)


def ours(encoder, messages, max_length=100_000) -> tuple:
    (row,) = tokenize_sft([read_sft_row({"messages": messages})], encoder=encoder, max_length=max_length)
    return row.input_ids, [int(label != IGNORE_INDEX) for label in row.labels]


def theirs(tokenizer, messages, **settings) -> tuple:
    applied = tokenizer.apply_chat_template(
        messages, tokenize=True, return_assistant_tokens_mask=True, return_dict=True, **settings
    )
    return applied["input_ids"], applied["assistant_masks"]


def conversations(language: str) -> list:
    """All conversations of chatterbot-corpus in one language; a last turn without an answer is left out."""
    import yaml

    files = [file.locate() for file in metadata.files("chatterbot-corpus") if file.match(f"data/{language}/*.yml")]
    talks = [turns for file in sorted(files) for turns in yaml.safe_load(Path(file).read_bytes())["conversations"]]
    pairs = [turns[: len(turns) // 2 * 2] for turns in talks]
    roles = ("user", "assistant")
    return [[{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)] for turns in pairs]


@pytest.mark.parametrize("language, count", [("chinese", 467), ("english", 2026)])
@pytest.mark.parametrize("is_expanded", [False, True], ids=["bytes", "pieces"])
def test_every_conversation_of_chatterbot_corpus(language, count, is_expanded, chinese_dir, tokenizer_dir):
    folder = chinese_dir if is_expanded else tokenizer_dir
    encoder, tokenizer = Encoder(folder), load_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    talks = conversations(language)
    assert len(talks) == count and all(talks)
    for messages in talks:
        assert theirs(tokenizer, messages) == ours(encoder, messages), messages


@given(
    system=st.none() | TEXTS,
    turns=st.lists(st.tuples(st.sampled_from(list(ROLES)), TEXTS), max_size=5),
    answer=TEXTS,
)
@settings(max_examples=150, deadline=None)
def test_any_conversation_that_ends_with_an_answer(chinese, system, turns, answer):
    encoder, tokenizer = chinese
    messages = [{"role": role, "content": text} for role, text in [*turns, ("gpt", answer)]]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    if any(mark in message["content"] for message in messages for mark in ("<s>", "</s>", "<unk>")):
        return
    assert theirs(tokenizer, messages) == ours(encoder, messages)


def test_a_mark_that_a_text_spells_out_is_the_one_difference(chinese):
    """transformers reads "<s>" in a rendered text as the mark, wherever it comes from; training does not."""
    encoder, tokenizer = chinese
    messages = [{"role": "user", "content": "What is <s>?"}, {"role": "assistant", "content": "A mark."}]
    assert ours(encoder, messages)[0].count(encoder.bos_id) == 3
    assert theirs(tokenizer, messages)[0].count(encoder.bos_id) == 4


def test_the_generation_prompt_is_what_comes_before_an_answer(chinese):
    encoder, tokenizer = chinese
    question = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    whole, mask = ours(encoder, [*question, {"role": "assistant", "content": "你好，世界！"}])
    assert prompt == whole[: mask.index(1)]


def test_the_slow_tokenizer_gives_the_same_ids(chinese_dir):
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(chinese_dir, use_fast=False)
    messages = [{"role": "user", "content": "  你好 a"}, {"role": "assistant", "content": " 人工智能\n"}]
    assert slow.apply_chat_template(messages) == ours(Encoder(chinese_dir), messages)[0]


@pytest.mark.parametrize(
    "messages, reason",
    [
        (
            [{"role": "tool", "content": "a"}],
            "message 1 is from tool; roles are human, user, assistant, gpt, and system",
        ),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "message 2 is from system"),
    ],
)
def test_the_template_refuses_what_training_refuses(chinese, messages, reason):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=reason):
        chinese[1].apply_chat_template(messages)
    with pytest.raises(ValueError, match="message"):
        read_sft_row({"messages": messages})
