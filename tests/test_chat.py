"""Chat templates that are rendered: ids and masks beside those of transformers, and templates that cannot be used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.chat import renderer
from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.renderer import Renderer
from colossal_llama2.chat.templates import CHATML_TEMPLATE, LLAMA2_TEMPLATE, ChatTemplate, find_template
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.dataset.inspect_data import InspectSettings, inspect_part
from colossal_llama2.dataset.layout.chat_data import ChatData, chat_data_of
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write.prepare import prepare_pretrain, prepare_sft
from colossal_llama2.dataset.write.records import read_sft_row
from colossal_llama2.dataset.write.tokenization import tokenize_sft
from colossal_llama2.encoding.registry import load_encoder, puts_prefix_after_marks
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from colossal_llama2.model.purpose import Purpose, read_purpose
from colossal_llama2.storage.row_errors import RowError
from colossal_llama2.train.checkpointing.small_files import model_files
from tests import tiny
from tests.byte_level import BEGIN, END, extend, make_byte_level, make_llama3
from tests.preparing import manifest, read_jsonl, write_lines
from tests.preparing import settings as prepare_settings

ROOT = Path(__file__).resolve().parents[1]
START, STOP = "<|start_header_id|>", "<|eot_id|>"
# Of the same form as LLaMA-3's, without {% generation %}.
LLAMA3 = """\
{% for message in messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim %}
{% if loop.first %}{{ bos_token }}{% endif %}
{{- content + '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
# chatml with tokens that the tokenizers of these tests have, with a system text of its own, and without markers.
PLAIN = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|start_header_id|>system\nBe brief.<|eot_id|>\n' }}{% endif %}
{{ '<|start_header_id|>' + message['role'] + '\n' + message['content'] + '<|eot_id|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}
"""
MARKED = CHATML_TEMPLATE.replace("<|im_start|>", START).replace("<|im_end|>", STOP)
TALK = [
    {"role": "user", "content": "Hi 你好"},
    {"role": "assistant", "content": "Hello, 明月!"},
    {"role": "user", "content": " And\n now? "},
    {"role": "assistant", "content": "Nothing.\n"},
]
TEXTS = st.text(st.sampled_from("ab  <|>/人工😀\n\t:'\"{%}1é"), max_size=10)


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory) -> Path:
    return make_byte_level(tmp_path_factory.mktemp("chat") / "tokenizer")


@pytest.fixture(scope="module")
def prefixing_dir(tokenizer_dir, tmp_path_factory) -> Path:
    """A LLaMA-2 tokenizer whose tokenizer.json puts a prefix after marks."""
    folder = shutil.copytree(tokenizer_dir, tmp_path_factory.mktemp("prefixing") / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_bytes())
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, {"type": "Replace", **replace}]}
    content["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def make(text: str, folder: Path) -> ChatTokenizer:
    template = ChatTemplate("own", text, "own.jinja")
    prefixes = puts_prefix_after_marks(folder)
    return ChatTokenizer(template, load_encoder(folder), folder, prefix_after_marks=prefixes)


def flat(tokens) -> tuple[list[int], list[list[int]]]:
    """All ids, and those of each answer."""
    ids = [token for part in tokens.parts for token in part.ids]
    return ids, [part.ids for part in tokens.parts if part.answer is not None]


CASES = [
    ("byte_level_dir", LLAMA3, STOP),
    ("byte_level_dir", PLAIN, STOP),
    ("byte_level_dir", MARKED, STOP),
    ("byte_level_dir", LLAMA2_TEMPLATE, END),
    ("tokenizer_dir", LLAMA2_TEMPLATE, "</s>"),
    ("prefixing_dir", LLAMA2_TEMPLATE, "</s>"),
    ("tokenizer_dir", chat_template(prefix_after_marks=False), "</s>"),
    ("prefixing_dir", chat_template(prefix_after_marks=True), "</s>"),
]


@pytest.mark.parametrize("fixture, template, end", CASES)
def test_ids_are_those_of_transformers_and_answers_are_trained_to_their_end(fixture, template, end, request):
    if fixture == "prefixing_dir" and not tiny.has_slow_tokenizer():
        pytest.skip("transformers 5 ignores the normalizer in a LLaMA's tokenizer.json")
    folder = request.getfixturevalue(fixture)
    chat, tokenizer = make(template, folder), load_tokenizer(folder, pad_token="eos")
    tokens = chat.tokens(TALK)
    ids, answers = flat(tokens)
    assert ids == tokenizer.apply_chat_template(TALK, chat_template=template, return_dict=False)
    assert not tokens.is_joined and tokens.num_tokens == len(ids)
    is_trimmed = "['content'] | trim" in template
    texts = [message["content"].strip() if is_trimmed else message["content"] for message in TALK[1::2]]
    decoded = [tokenizer.decode(answer, clean_up_tokenization_spaces=False) for answer in answers]
    around = " " if "INST" in template else ""
    assert [text.removeprefix(" ") for text in decoded] == [
        (around + text + around).removeprefix(" ") + end for text in texts
    ]
    assert chat.turn_ends == [answers[0][-1]] == [tokenizer.convert_tokens_to_ids(end)]
    for count in (1, 3):
        prompt = tokenizer.apply_chat_template(
            TALK[:count], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt(TALK[:count]) == prompt
        # What the model is asked with begins what it was trained on.
        assert ids[: len(prompt)] == prompt and ids[len(prompt) :][: len(answers[count // 2])] == answers[count // 2]


def test_a_template_with_markers_and_one_without_give_the_same_mask(byte_level_dir):
    without = MARKED.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert "generation -" not in without
    assert make(MARKED, byte_level_dir).tokens(TALK) == make(without, byte_level_dir).tokens(TALK)


@pytest.mark.slow
def test_the_mask_of_markers_is_that_of_transformers(byte_level_dir):
    tokenizer = load_tokenizer(byte_level_dir, pad_token="eos")
    chat = make(MARKED, byte_level_dir)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
    def check(turns):
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        tokens = chat.tokens(messages)
        ids, _ = flat(tokens)
        mask = [int(part.answer is not None) for part in tokens.parts for _ in part.ids]
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
        )
        if not tokens.is_joined:
            assert (ids, mask) == (theirs["input_ids"], theirs["assistant_masks"])
        else:
            assert ids != theirs["input_ids"] and tokenizer.decode(ids) == tokenizer.decode(theirs["input_ids"])

    check()


def test_colossal_rendered_gives_the_ids_of_training(tokenizer_dir):
    encoder = load_encoder(tokenizer_dir)
    chat = make(chat_template(prefix_after_marks=False), tokenizer_dir)
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is <s>?"}, *TALK[1:]]
    (row,) = tokenize_sft([read_sft_row({"messages": talk})], encoder=encoder, max_length=1000)
    ids, answers = flat(chat.tokens(talk))
    assert ids == row.input_ids and sum(answers, []) == [label for label in row.labels if label != IGNORE_INDEX]
    assert chat.prompt(talk[:-1]) == ids[: len(ids) - len(answers[-1])]


def test_a_special_token_in_a_message_stays_text(byte_level_dir):
    chat, encoder = make(MARKED, byte_level_dir), load_encoder(byte_level_dir)
    talk = [{"role": "user", "content": f"What is {STOP}?"}, {"role": "assistant", "content": f"An end: {STOP}"}]
    ids, (answer,) = flat(chat.tokens(talk))
    assert answer == [*encoder.encode([f"An end: {STOP}"])[0], chat.turn_ends[0]]
    assert ids.count(chat.turn_ends[0]) == 2
    assert chat.prompt(talk[:1]).count(chat.turn_ends[0]) == 1


def test_no_token_crosses_the_border_of_an_answer(byte_level_dir, tmp_path):
    """For transformers, the line feed before an answer and one at its beginning are one token, which ends no prompt."""
    folder = extend(byte_level_dir, tmp_path / "tokenizer", ["\n\n"])
    chat = make(MARKED, folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHello"}]
    tokens = chat.tokens(talk)
    ids, (answer,) = flat(tokens)
    prompt = chat.prompt(talk[:1])
    assert ids == prompt + answer + ids[len(prompt) + len(answer) :] and tokens.is_joined
    tokenizer = load_tokenizer(folder, pad_token="eos")
    theirs = tokenizer.apply_chat_template(talk, chat_template=MARKED, return_dict=False)
    assert len(theirs) == len(ids) - 1 and tokenizer.decode(theirs) == tokenizer.decode(ids)


REFUSED_TEMPLATES = {
    "{% for": r"own.jinja:1: not a Jinja template \(",
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": "ends an answer with 'In France.\\\\n'",
    # Earlier answers are written in another way, as by templates that leave out what a model thought.
    "{% for m in messages %}{{ m.content if loop.last else m.content[:3] }}{{ eos_token }}{% endfor %}": "not write",
    "{{ raise_exception('never') }}": "refuses: never",
    "{{ undefined_name.field }}": "refuses: 'undefined_name' is undefined",
    "{{ ''.__class__.__mro__ }}": "refuses: access to attribute '__class__'",
    "{{ strftime_now('%Y') }}": "refuses: 'strftime_now' is undefined; write a date in its place",
    "{{ 'a' * 10 ** 10 }}": "it needs over 1024 MiB of memory",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "calls itself without end",
    "{% generation %}{{ eos_token }}{% endgeneration %}": "marks 1 answers of a conversation with 2",
    "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}": "marks 4",
    "{% include 'a' %}": "no loader",
    MARKED.replace("+ '<|eot_id|>' -}}\n    {%- endgeneration -%}", "-}}{%- endgeneration -%}{{- '<|eot_id|>' -}}"): (
        "has <.eot_id.> behind an answer's {% endgeneration %}"
    ),
    "{{ messages[0].content * 100000 }}" * 2: "characters of messages",
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}": "does not write message 2",
}


@pytest.mark.parametrize("template, problem", REFUSED_TEMPLATES.items())
def test_a_template_that_cannot_be_used(template, problem, byte_level_dir):
    with pytest.raises(UserError, match=problem):
        assert not make(template, byte_level_dir).turn_ends


def test_a_process_that_was_killed_is_started_again(byte_level_dir):
    chat = make(MARKED, byte_level_dir)
    before = chat.prompt(TALK[:1])
    os.kill(chat._renderer._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert chat.prompt(TALK[:1]) == before


@pytest.mark.slow
def test_a_process_without_a_parent_ends():
    """It limits its own CPU time, also while it compiles: Jinja computes constants then."""
    code = (
        "import os\nfrom colossal_llama2.chat.renderer import Renderer\n"
        "r = Renderer('{{ 9 ** (9 ** 9) }}', names={}, origin='x')\n"
        "import threading\nthreading.Timer(2, lambda: os.kill(os.getpid(), 9)).start()\nr.prompt([])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    deadline = time.monotonic() + 90
    while running := [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"render_process" in read(path)]:
        owners = [(path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1] for path in running]
        if "1" not in owners:
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_special_token_of_one_character_stays_text(tmp_path):
    folder = extend(make_byte_level(tmp_path / "base"), tmp_path / "tokenizer", [], added=["☃"])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    chat, encoder = make(MARKED, folder), load_encoder(folder)
    ids = chat.prompt([{"role": "user", "content": "a☃b"}])
    assert encoder.vocab_size - 1 not in ids and "a☃b" in encoder.decode(ids)


def test_names_that_a_template_can_use(tokenizer_dir):
    text = LLAMA2_TEMPLATE.replace("{%- set first = 0 -%}", "{{- unk_token -}}{%- set first = 0 -%}")
    tokenizer = load_tokenizer(tokenizer_dir)
    ids, _ = flat(make(text, tokenizer_dir).tokens(TALK))
    assert ids == tokenizer.apply_chat_template(TALK, chat_template=text, return_dict=False) and ids[0] == 0


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(renderer, "SECONDS", 1.0)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    endless = Renderer(loops, names={}, origin="own.jinja")
    with pytest.raises(RowError, match="own.jinja takes over 1 s; correct it"):
        endless.prompt(TALK)
    # It can be used again, and ends as before.
    with pytest.raises(RowError, match="takes over"):
        endless.prompt(TALK)


def test_the_templates_of_a_folder(byte_level_dir, tmp_path):
    folder = shutil.copytree(byte_level_dir, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has no chat template.*give colossal, llama2, chatml or the path of a"):
        find_template("model", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in ("of config", [{"name": "default", "template": "of config"}, {"name": "tools", "template": "x"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": entry}))
        assert find_template("model", folder).text == "of config"
    (folder / "chat_template.jinja").write_text("of file")
    found = find_template("model", folder)
    assert (found.name, found.text, found.origin) == ("model", "of file", str(folder / "chat_template.jinja"))
    assert find_template("colossal", folder) is None
    for value, problem in {
        "chatlm": "colossal, model, llama2, chatml or the path",
        str(tmp_path / "no.jinja"): "cannot be read",
        "/dev/null.jinja": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=problem):
            find_template(value, folder)
    (folder / "chat_template.jinja").unlink()
    config["chat_template"] = [{"name": [1], "template": "x"}, {"name": "default", "template": "a\ud800"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not valid Unicode at character 1"):
        find_template("model", folder)
    (tmp_path / "latin.jinja").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="is not UTF-8 from byte 0 on"):
        find_template(str(tmp_path / "latin.jinja"), folder)


ROWS = [
    {"messages": TALK},
    {"messages": TALK[:3], "system": "Be kind."},
    {"messages": [*TALK, {"role": "user", "content": "long " * 60}, {"role": "assistant", "content": "No."}]},
    {"messages": [{**TALK[0]}, {**TALK[1], "weight": 0}, *TALK[2:]]},
    {"messages": [{"role": "user", "content": "long " * 90}, TALK[1]]},
    {"messages": TALK[:1]},
]


def test_prepared_conversations(byte_level_dir, tmp_path, caplog):
    (tmp_path / "own.jinja").write_text(PLAIN)
    write_lines(tmp_path / "in" / "rows.jsonl", ROWS)
    flags = prepare_settings([tmp_path / "in"], byte_level_dir, tmp_path, chat_template=str(tmp_path / "own.jinja"))
    prepare_sft(**flags)
    samples = sorted(read_jsonl(tmp_path / "jsonl"), key=lambda sample: sample["inputs_decode"])
    texts = [sample["inputs_decode"] for sample in samples]
    first = f"{START}system\nBe brief.{STOP}\n{START}user\nHi 你好{STOP}\n{START}assistant\nHello, 明月!{STOP}\n"
    second = f"{START}user\n And\n now? {STOP}\n{START}assistant\nNothing.\n{STOP}\n"
    kind = first.replace("brief", "kind")
    assert texts == [first + second] * 3 + [kind]
    answers = [f"Hello, 明月!{STOP}", f"Nothing.\n{STOP}"]
    trained = [sample["labels_decode"] for sample in samples]
    assert sorted(trained[:3]) == [answers, answers, answers[1:]] and trained[3] == answers[:1]
    tokenizer = load_tokenizer(byte_level_dir, pad_token="eos")
    whole = tokenizer.apply_chat_template(TALK, chat_template=PLAIN, return_dict=False)
    assert [sample["input_ids"] for sample in samples[:3]] == [whole] * 3
    written = manifest(tmp_path)
    assert written["settings"]["chat_template"] == "own.jinja" and written["settings"]["template_text"] == PLAIN
    assert written["turn_end"] == [tokenizer.convert_tokens_to_ids(STOP)]
    assert (tmp_path / "arrow" / "chat_template.jinja").read_text() == PLAIN
    reasons = {reason for entry in written["categories"].values() for reason in entry["dropped"]}
    assert len(reasons) == 4, reasons
    # The same command has nothing to do; another template is another output.
    caplog.set_level("INFO")
    prepare_sft(**flags)
    assert "nothing to do" in caplog.text
    (tmp_path / "own.jinja").write_text(PLAIN.replace("brief", "short"))
    with pytest.raises(UserError, match="the text of --chat_template is another one"):
        prepare_sft(**flags)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tokenizer_dir, tmp_path):
    rows = [{"messages": TALK}, {"messages": [TALK[0], TALK[0], TALK[1]]}, {"messages": TALK[:2]}]
    path = write_lines(tmp_path / "in" / "rows.jsonl", rows)
    flags = prepare_settings([tmp_path / "in"], tokenizer_dir, tmp_path, chat_template="llama2")
    with pytest.raises(UserError, match=f"{path}:2: .*--chat_template llama2 refuses: messages of user and assistant"):
        prepare_sft(**flags)
    prepare_sft(**flags, on_bad_row="skip")
    assert len(read_jsonl(tmp_path / "jsonl")) == 2
    written = manifest(tmp_path)
    assert written["bad_reasons"] == {"a conversation that the chat template refuses": 1}
    decoded = {sample["inputs_decode"] for sample in read_jsonl(tmp_path / "jsonl")}
    assert "<s>[INST] Hi 你好 [/INST] Hello, 明月! </s>" in decoded


@pytest.mark.parametrize("first", ["train", "mask"])
def test_a_conversation_that_begins_with_an_answer(first, byte_level_dir, tmp_path):
    """Without markers, a template that needs a question first does not show where the answer before it is."""
    needy = "{{ messages[0]['content'][:0] if add_generation_prompt else '' }}" + PLAIN
    (tmp_path / "own.jinja").write_text(needy)
    write_lines(tmp_path / "in" / "rows.jsonl", [{"messages": [TALK[1], *TALK[:2]]}])
    own = {"chat_template": str(tmp_path / "own.jinja"), "assistant_first": first}
    flags = prepare_settings([tmp_path / "in"], byte_level_dir, tmp_path, **own)
    if first == "train":
        with pytest.raises(UserError, match="does not show where answer 1, before the first question, is"):
            prepare_sft(**flags)
        return
    prepare_sft(**flags)
    (sample,) = read_jsonl(tmp_path / "jsonl")
    assert sample["inputs_decode"].count("Hello, 明月!") == 2
    assert sample["labels_decode"] == [f"Hello, 明月!{STOP}"]


def test_what_a_template_escapes_is_not_changed_in_silence(byte_level_dir):
    text = PLAIN.replace("message['content'] +", "message['content'] | tojson(ensure_ascii=True) +")
    chat = make(text, byte_level_dir)
    assert chat.tokens(TALK)
    with pytest.raises(RowError, match="escapes a message with a special token as JSON does"):
        chat.tokens([TALK[0], {"role": "assistant", "content": f"An {STOP}"}])
    with pytest.raises(RowError, match="escapes a message"):
        chat.prompt([{"role": "user", "content": f"An {STOP}"}])


def test_a_tokenizer_without_the_tokens_of_a_template(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", ROWS)
    flags = prepare_settings([tmp_path / "in"], tokenizer_dir, tmp_path, chat_template="chatml")
    with pytest.raises(UserError, match=r"--chat_template chatml ends an answer with '.*<\|im_end\|>', where"):
        prepare_sft(**flags)
    assert not (tmp_path / "arrow").exists() and not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def prepared(byte_level_dir, tmp_path_factory) -> Path:
    """The same conversations by two templates and by colossal, and plain text."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "own.jinja").write_text(PLAIN)
    write_lines(folder / "in" / "rows.jsonl", ROWS)
    for name, value in {"plain": str(folder / "own.jinja"), "llama2": "llama2", "colossal": "colossal"}.items():
        prepare_sft(**prepare_settings([folder / "in"], byte_level_dir, folder / name, chat_template=value))
    write_lines(folder / "text" / "rows.jsonl", [{"target": "Some text."}])
    prepare_pretrain(**prepare_settings([folder / "text"], byte_level_dir, folder / "text"))
    return folder


def part(folder: Path, name: str) -> str:
    return str(folder / name / "arrow" / "part-00000")


def test_conversations_of_two_templates_are_not_mixed(prepared, tmp_path):
    plain, llama2, colossal, text = (part(prepared, name) for name in ("plain", "llama2", "colossal", "text"))
    found = chat_data_of([text, plain, plain])
    assert found.name == "own.jinja" and found.text == PLAIN and len(found.turn_ends) == 1
    assert chat_data_of([text]) is None
    with pytest.raises(
        UserError, match="by the chat template llama2, those of .*plain.* by own.jinja; prepare all with"
    ):
        chat_data_of([plain, llama2])
    with pytest.raises(
        UserError, match="--eval_dataset .*by the chat template colossal, those of --dataset by own.jinja"
    ):
        chat_data_of([colossal], flag="--eval_dataset", other=found)
    # A text of the same name.
    other = shutil.copytree(prepared / "plain", tmp_path / "other")
    content = json.loads((other / "arrow" / "manifest.json").read_text())
    content["settings"]["template_text"] += " "
    (other / "arrow" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="by the chat template own.jinja with another text|template own.jinja"):
        chat_data_of([plain, part(tmp_path, "other")])
    content["turn_end"] = ["a"]
    (other / "arrow" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        chat_data_of([part(tmp_path, "other")])


def test_data_of_earlier_versions_is_colossal(model_dir, byte_level_dir, prepared, tmp_path):
    old = shutil.copytree(prepared / "colossal", tmp_path / "old")
    content = json.loads((old / "arrow" / "manifest.json").read_text())
    del content["settings"]["chat_template"], content["settings"]["template_text"], content["turn_end"]
    (old / "arrow" / "manifest.json").write_text(json.dumps(content))
    text = (old / "arrow" / "chat_template.jinja").read_text()
    assert chat_data_of([part(tmp_path, "old"), part(prepared, "colossal")]) == ChatData("colossal", text, ())
    (old / "arrow" / "chat_template.jinja").unlink()
    chat = chat_data_of([part(tmp_path, "old")])
    assert chat == ChatData("colossal", None, ())
    files = model_files(str(model_dir), str(byte_level_dir), "fp32", stage="sft", chat=chat)
    assert files["chat_template.jinja"].decode() == text


def test_a_saved_model_has_the_template_of_its_data(model_dir, byte_level_dir, prepared, tmp_path, caplog):
    """transformers reads it, with the mask of answers, and generation ends where an answer does."""
    caplog.set_level("INFO")
    folder = shutil.copytree(byte_level_dir, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 'own' }}"}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    end = load_encoder(folder).vocab_size - 1
    chat = ChatData("chatml-like", MARKED, (end,))
    files = model_files(str(model_dir), str(folder), "fp32", stage="sft", chat=chat)
    export = tmp_path / "export"
    export.mkdir()
    for name, content in files.items():
        (export / name).write_bytes(content)
    tokenizer = load_tokenizer(export, pad_token="eos")
    assert tokenizer.chat_template == MARKED
    assert not any(name.startswith("additional") for name in files)
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    applied = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    assert sum(applied["assistant_masks"]) > 4
    ends = json.loads(files["generation_config.json"])["eos_token_id"]
    assert ends[0] == end and len(ends) == 2
    saved = json.loads(files["config.json"])
    assert read_purpose(saved) == Purpose("sft", "chatml-like")
    assert "chat_template.jinja is the template of the data, chatml-like, in place of that of" in caplog.text
    assert "is now" in caplog.text and "to end answers" in caplog.text
    # Back to pre-training: the note is changed, and that is logged.
    (export / "config.json").write_bytes(files["config.json"])
    caplog.clear()
    again = model_files(str(export), str(export), "fp32", stage="pretrain")
    assert read_purpose(json.loads(again["config.json"])) == Purpose("pretrain")
    assert "trained_for was sft, and is now pretrain" in caplog.text and again["chat_template.jinja"] == MARKED.encode()
    # Another run of the same data has nothing to change.
    caplog.clear()
    assert model_files(str(export), str(export), "fp32", stage="sft", chat=chat) == files
    assert not caplog.text


@pytest.mark.slow
def test_llama_3(tmp_path):
    folder = make_llama3(tmp_path / "tokenizer")
    chat, tokenizer = make(LLAMA3, folder), load_tokenizer(folder, pad_token="eos")
    ids, answers = flat(chat.tokens(TALK))
    assert ids == tokenizer.apply_chat_template(TALK, chat_template=LLAMA3, return_dict=False)
    assert [tokenizer.decode(answer) for answer in answers] == [f"Hello, 明月!{STOP}", f"Nothing.{STOP}"]
    assert ids[0] == tokenizer.convert_tokens_to_ids(BEGIN)


def test_arrow_of_rendered_conversations_reads_back(prepared, byte_level_dir):
    samples = datasets.load_from_disk(part(prepared, "plain"))
    for sample in samples:
        trained = [label for label in sample["labels"] if label != IGNORE_INDEX]
        assert trained and sample["labels"][0] == IGNORE_INDEX
        assert sample["seq_length"] == len(sample["input_ids"]) <= 128


def test_added_tokens_behind_the_pieces_of_sentencepiece(tokenizer_dir, tmp_path):
    """As in many chat models on LLaMA-2, whose <|im_start|> and <|im_end|> have no piece."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]}
    )
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    write_lines(tmp_path / "in" / "rows.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    prepare_sft(**prepare_settings([tmp_path / "in"], folder, tmp_path, chat_template="chatml"))
    samples = read_jsonl(tmp_path / "jsonl")
    whole = max(samples, key=lambda sample: len(sample["input_ids"]))
    expected = tokenizer.apply_chat_template(TALK, chat_template=CHATML_TEMPLATE, return_dict=False)
    assert whole["input_ids"] == expected
    assert whole["labels_decode"] == ["Hello, 明月!<|im_end|>", "Nothing.\n<|im_end|>"]
    shown = InspectSettings(str(tmp_path / "arrow" / "part-00000"), str(folder), 9, 0, None)
    assert "trained | Hello, 明月!<|im_end|>" in "\n".join(inspect_part(shown, is_coloured=False))


def test_a_reserved_character_in_a_message(byte_level_dir):
    with pytest.raises(RowError, match="the character U\\+FDEF, which Unicode reserves"):
        make(MARKED, byte_level_dir).prompt([{"role": "user", "content": "a\ufdef"}])
    # The others may occur.
    talk = [{"role": "user", "content": "\ufdd0\ufdd1"}, {"role": "assistant", "content": "\ufdd2"}]
    _, (answer,) = flat(make(MARKED, byte_level_dir).tokens(talk))
    assert load_encoder(byte_level_dir).decode(answer[:-1]) == "\ufdd2"
