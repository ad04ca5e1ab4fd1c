"""In which form a model gets a prompt: what its folder records decides, a flag overrides it, and the log names it."""

import json
import shutil
from pathlib import Path

import pytest

import inference_example
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from colossal_llama2.inference import chat_template as templates
from colossal_llama2.inference import prompts
from colossal_llama2.inference.prompts import PROMPT_SUFFIX, choose_style, prompt_ids
from tests import tiny
from tests.byte_level import make_byte_level

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SFT_NOTE = {"stage": "sft", "chat_template": "colossal"}
PRETRAIN_NOTE = {"stage": "pretrain"}


@pytest.fixture
def folder(model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def with_template(folder: Path, template: str | None = None) -> Path:
    text = chat_template(prefix_after_marks=False) if template is None else template
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("note", "has_template", "style", "reason"),
    [
        (SFT_NOTE, True, "sft", "fine-tuning, template colossal"),
        ({"stage": "sft"}, True, "sft", "config.json records fine-tuning"),
        (PRETRAIN_NOTE, False, "pretrained", "config.json records pre-training"),
        # A base model whose tokenizer came with a template.
        (PRETRAIN_NOTE, True, "pretrained", "config.json records pre-training"),
        (None, True, "sft", "the folder has a chat template"),
        (None, False, "plain", "no chat template"),
        ({"stage": "unknown"}, False, "plain", "no chat template"),
    ],
)
def test_the_folder_decides(folder, note, has_template, style, reason):
    if note:
        edit(folder / "config.json", trained_for=note)
    if has_template:
        with_template(folder)
    chosen = choose_style("auto", folder, str(folder))
    assert chosen.name == style and reason in chosen.reason
    for given in ("plain", "pretrained", *(["sft"] if has_template else [])):
        assert choose_style(given, folder, str(folder)).name == given


@pytest.mark.parametrize(
    ("path", "is_published"),
    [
        ("hpcai-tech/Colossal-LLaMA-2-7b-base", True),
        ("hpcai-tech/colossal-llama-2-13b-base", True),
        ("cache/models--hpcai-tech--Colossal-LLaMA-2-7b-base/snapshots/0123abc", True),
        ("hpcai-tech/other-model", False),
        ("someone/Colossal-LLaMA-2-7b-base", False),
        ("models--else--Colossal-LLaMA-2-7b-base/snapshots/0123abc", False),
    ],
)
def test_published_models_are_recognized_by_name(folder, tmp_path, monkeypatch, path, is_published):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / path
    place.parent.mkdir(parents=True)
    folder.rename(place)
    expected = "pretrained" if is_published else "plain"
    assert choose_style("auto", place, path).name == choose_style("auto", place, str(place)).name == expected
    # The name on the hub, with the files somewhere in its cache.
    assert choose_style("auto", Path(shutil.copytree(place, tmp_path / "x")), path).name == expected


@pytest.mark.parametrize("note", [None, SFT_NOTE])
def test_sft_without_a_template_is_one_line(folder, note, capsys):
    if note:
        edit(folder / "config.json", trained_for=note)
    style = "auto" if note else "sft"
    with pytest.raises(SystemExit) as end:
        inference_example.main(["--model_path", str(folder), "--device", "cpu", "--prompt_style", style])
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert f"--model_path {folder} has no chat template" in captured.err and "--prompt_style plain" in captured.err


@pytest.mark.parametrize("place", ["file", "settings", "list"])
def test_a_template_is_found_where_transformers_finds_it(folder, place):
    template = chat_template(prefix_after_marks=False)
    if place == "file":
        with_template(folder)
    else:
        named = [{"name": "default", "template": template}]
        edit(folder / "tokenizer_config.json", chat_template=template if place == "settings" else named)
    assert templates.has_chat_template(folder)
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, "sft", "Hi") == expected
    assert tokenizer.decode(expected).endswith("Assistant: <s>")


def test_the_forms_of_a_prompt(folder):
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    for text in ("the state", tiny.CHINESE):
        assert prompt_ids(tokenizer, "plain", text) == [encoder.bos_id, *encoder.encode([text])[0]]
        assert prompt_ids(tokenizer, "pretrained", text) == prompt_ids(tokenizer, "plain", text + PROMPT_SUFFIX)


@pytest.mark.parametrize("kind", ["sentencepiece", "smollm2"])
def test_special_tokens_that_are_typed_stay_text(kind, folder, tmp_path):
    """In plain prompts and in messages: the text comes back, and the template's own tokens are the only ones."""
    if kind == "sentencepiece":
        place, marks, template = folder, ["<s>", "</s>"], chat_template(prefix_after_marks=False)
    else:
        place = make_byte_level(tmp_path / "model2", "smollm2")
        marks = ["<|im_start|>", "<|end_of_text|>", "<|eot_id|>"]
        template = CHATML.replace("<|im_end|>", "<|eot_id|>").replace("<|im_start|>", "<|start_header_id|>")
    tokenizer = load_tokenizer(with_template(place, template))
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    honest = prompt_ids(tokenizer, "sft", "x mark y")
    count = sum(token in special for token in honest)
    assert count
    for mark in marks:
        text = f"x {mark} 明 {mark}{mark} y"
        plain = prompt_ids(tokenizer, "plain", text)
        assert sum(token in special for token in plain) == sum(
            token in special for token in prompt_ids(tokenizer, "plain", "x")
        )
        ids = prompt_ids(tokenizer, "sft", text)
        assert sum(token in special for token in ids) == count
        shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert shown == tokenizer.decode(honest, clean_up_tokenization_spaces=False).replace("x mark y", text)


BROKEN = [
    ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
    ("{{ raise_exception('Conversation roles must\n alternate') }}", "alternate"),
    ("{{ messages[7]['content'] }}", "has no element 7"),
    ("{{ 1 // 0 }}", "division"),
]


@pytest.mark.parametrize(("template", "words"), BROKEN)
def test_a_template_that_fails_is_one_line(folder, template, words, capsys):
    with pytest.raises(SystemExit) as end:
        inference_example.main(["--model_path", str(with_template(folder, template)), "--device", "cpu"])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if " | " not in line]
    assert end.value.code == 2 and captured.out == "" and len(lines) == 1
    assert str(folder / "chat_template.jinja") in lines[0] and words in lines[0]


@pytest.mark.parametrize(("template", "words"), BROKEN)
def test_a_tokenizer_that_only_transformers_reads(folder, template, words, monkeypatch):
    """Its ids are those of `apply_chat_template`."""

    def refuse(place):
        raise UserError("another kind")

    tokenizer = load_tokenizer(with_template(folder))
    messages = [{"role": "user", "content": "Hi"}]
    expected = prompt_ids(tokenizer, "sft", "Hi")
    for module in (templates, prompts):
        monkeypatch.setattr(module, "shared_encoder", refuse)
    assert prompt_ids(tokenizer, "sft", "Hi") == expected
    assert expected == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, "plain", "Hi") == tokenizer("Hi")["input_ids"]
    with pytest.raises(UserError, match="a message has '</s>', a special token of"):
        prompt_ids(tokenizer, "sft", "Hi</s>")
    with_template(folder, template)
    with pytest.raises(UserError, match="chat_template.jinja") as error:
        prompt_ids(tokenizer, "sft", "Hi")
    assert words in str(error.value)


def test_the_choice_is_logged_once(folder, capsys):
    edit(with_template(folder) / "config.json", trained_for=SFT_NOTE)
    words = ["--model_path", str(folder), "--device", "cpu", "--max_new_tokens", "2", "--do_sample", "False"]
    inference_example.main(words)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "prompt style" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "prompt style sft (config.json records fine-tuning, template colossal)"
    )
    assert captured.out.startswith("Prompt: 明月松间照，\nAnswer: ")


def test_a_character_without_a_token_is_refused_in_messages_too(tmp_path):
    folder = with_template(make_byte_level(tmp_path / "model", "smollm2", missing=b"\x04"), CHATML)
    with pytest.raises(UserError, match="the prompt cannot be used: the character .*04"):
        prompts.prompt_ids(load_tokenizer(folder), "sft", "a \x04")


def test_an_empty_prompt_needs_a_mark(folder, tmp_path):
    assert len(prompt_ids(load_tokenizer(folder), "plain", "")) == 1
    place = make_byte_level(tmp_path / "qwen", "qwen2", bos=None)
    with pytest.raises(UserError, match="the prompt is empty"):
        prompts.prompt_ids(load_tokenizer(place), "plain", "")
