"""The Jinja template against tokenize_sft: the same ids and the same mask, on real conversations and on odd ones."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.corpus.conversation import ROLES, chat_template, speakers_of
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write.prepare import prepare_sft
from colossal_llama2.dataset.write.records import read_sft_row
from colossal_llama2.dataset.write.tokenization import tokenize_sft
from colossal_llama2.encoding.file_names import TEMPLATE_FILE
from colossal_llama2.encoding.registry import load_encoder, puts_prefix_after_marks
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from tests import tiny
from tests.preparing import read_jsonl, write_lines
from tests.preparing import settings as prepare_settings
from tests.tiny import CHINESE

TEXTS = st.text(st.sampled_from("ab  <s>/人工😀\n\t▁:'\"{%}"), max_size=10)


@pytest.fixture(scope="module")
def chinese_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """The tiny tokenizer with Chinese characters and words, as init_tokenizer.py writes it, with the template."""
    folder = tmp_path_factory.mktemp("chinese")
    pieces = [CHINESE[start : start + 2] for start in range(0, 40)] + ["人工智能"]
    (folder / "new.jsonl").write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in pieces))
    expand_tokenizer(ExtensionSettings(tokenizer_dir, folder / "tokenizer", folder / "new.jsonl"))
    (folder / "tokenizer" / TEMPLATE_FILE).write_text(chat_template(prefix_after_marks=False))
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def prefixing_dir(chinese_dir, tmp_path_factory) -> Path:
    """The same with the normalizer of the tokenizer.json that LLaMA-2 ships, which prefixes the text after a mark."""
    folder = shutil.copytree(chinese_dir, tmp_path_factory.mktemp("prefixing") / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_bytes())
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, {"type": "Replace", **replace}]}
    content["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / TEMPLATE_FILE).write_text(chat_template(prefix_after_marks=True))
    return folder


@pytest.fixture(scope="module")
def chinese(chinese_dir) -> tuple:
    return load_encoder(chinese_dir), load_tokenizer(chinese_dir)


def ours(encoder, messages, prefix_after_marks=False, **reading) -> tuple:
    rows = [read_sft_row({"messages": messages}, **reading)]
    (row,) = tokenize_sft(rows, encoder=encoder, max_length=100_000, prefix_after_marks=prefix_after_marks)
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


@pytest.mark.slow
@pytest.mark.parametrize("language, count", [("chinese", 467), ("english", 2026)])
@pytest.mark.parametrize("kind, prefixes", [("tokenizer", False), ("chinese", False), ("prefixing", True)])
def test_every_conversation_of_chatterbot_corpus(language, count, kind, prefixes, request):
    folder = request.getfixturevalue(f"{kind}_dir")
    encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
    assert puts_prefix_after_marks(folder) is prefixes
    tokenizer.chat_template = chat_template(prefix_after_marks=prefixes)
    talks = conversations(language)
    assert len(talks) == count and all(talks)
    for messages in talks:
        assert theirs(tokenizer, messages) == ours(encoder, messages, prefixes), messages


LOSS_MARKS = st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1.0}, {"train": False}, {"loss": None}, {"masked": 1}])


@pytest.mark.slow
@given(
    system=st.none() | TEXTS,
    turns=st.lists(st.tuples(st.sampled_from([*ROLES, "system", "Human ", "GPT"]), TEXTS, LOSS_MARKS), max_size=5),
    answer=TEXTS,
    masks_opening=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_conversation_that_ends_with_an_answer(chinese, system, turns, answer, masks_opening):
    encoder, tokenizer = chinese
    messages = [{"role": role, "content": text, **mark} for role, text, mark in [*turns, ("gpt", answer, {})]]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    roles = [message["role"] for message in messages]
    if ("system", "system") in zip(roles[1:], roles[2:], strict=False):
        return
    if any(mark in message["content"] for message in messages for mark in ("<s>", "</s>", "<unk>")):
        return
    template = chat_template(prefix_after_marks=False, masks_opening=masks_opening)
    expected = ours(encoder, messages, masks_opening=masks_opening)
    rendered = theirs(tokenizer, messages, chat_template=template)
    # A conversation without a trained answer is dropped.
    assert rendered == expected if expected[0] else not any(rendered[1])


def test_the_template_has_the_roles_of_the_assistant(chinese):
    encoder, tokenizer = chinese
    messages = [{"role": "user", "content": "q"}, {"role": "Bing", "content": "a"}]
    template = chat_template(prefix_after_marks=False, speakers=speakers_of(["bing"]))
    rendered = theirs(tokenizer, messages, chat_template=template)
    assert rendered == ours(encoder, messages, speakers=speakers_of(["bing"]))
    assert rendered == ours(encoder, [messages[0], {"role": "assistant", "content": "a"}])


def test_a_mark_that_a_text_spells_out_is_the_one_difference(chinese):
    """transformers reads "<s>" in a rendered text as the mark, even if a message contains it; training does not."""
    encoder, tokenizer = chinese
    messages = [{"role": "user", "content": "What is <s>?"}, {"role": "assistant", "content": "A mark."}]
    assert ours(encoder, messages)[0].count(encoder.bos_id) == 3
    assert theirs(tokenizer, messages)[0].count(encoder.bos_id) == 4


def test_the_generation_prompt_is_what_comes_before_an_answer(chinese):
    encoder, tokenizer = chinese
    question = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    whole, mask = ours(encoder, [*question, {"role": "assistant", "content": "你好，世界！"}])
    assert prompt == whole[: mask.index(1)]


def test_the_slow_tokenizer_gives_the_same_ids(chinese_dir):
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(chinese_dir, use_fast=False)
    messages = [{"role": "user", "content": "  你好 a"}, {"role": "assistant", "content": " 人工智能\n"}]
    assert slow.apply_chat_template(messages, return_dict=False) == ours(load_encoder(chinese_dir), messages)[0]


def test_prepared_samples_follow_the_folder_s_tokenizer(prefixing_dir, tmp_path):
    if not tiny.has_slow_tokenizer():
        pytest.skip("transformers 5 ignores the normalizer in a LLaMA's tokenizer.json")
    messages = [{"role": "user", "content": "你好 a"}, {"role": "assistant", "content": "人工智能"}]
    write_lines(tmp_path / "in" / "a.jsonl", [{"messages": messages}])
    prepare_sft(**prepare_settings([tmp_path / "in"], prefixing_dir, tmp_path))
    (sample,) = read_jsonl(tmp_path / "jsonl")
    template = (tmp_path / "arrow" / TEMPLATE_FILE).read_text()
    assert template == (prefixing_dir / TEMPLATE_FILE).read_text()
    assert sample["input_ids"] == load_tokenizer(prefixing_dir).apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_without_tokenizer_json_the_config_decides(chinese_dir, tmp_path, legacy):
    for name in ("tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(chinese_dir / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
    assert puts_prefix_after_marks(tmp_path) is legacy
    messages = [{"role": "user", "content": "你好 a"}, {"role": "assistant", "content": "人工智能"}]
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = chat_template(prefix_after_marks=legacy)
    assert theirs(tokenizer, messages) == ours(load_encoder(tmp_path), messages, legacy)


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "tool", "content": "a"}], "message 1 is from tool; roles are human, user, assistant, gpt, system"),
        (
            [{"role": role, "content": "a"} for role in ("user", "system", "system", "user")],
            "messages 2 and 3 both have the role system; make them one",
        ),
    ],
)
def test_the_template_refuses_what_training_refuses(chinese, messages, reason):
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=reason):
        chinese[1].apply_chat_template(messages)
    with pytest.raises(ValueError, match="message"):
        read_sft_row({"messages": messages})
