"""training_history.json of any folder: read if it is valid, otherwise left out with one line; and the card."""

import json
import os
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2 import markdown
from colossal_llama2.dataset.read.loss_groups import Amount
from colossal_llama2.dataset.read.token_counts import SourceRead
from colossal_llama2.model import training_history
from colossal_llama2.model.training_history import (
    HISTORY_FILE,
    as_written,
    base_model_of,
    describe_parent,
    name_of,
    named_by_card,
    read_history,
    vocabulary_stage,
)
from colossal_llama2.train.report import model_card
from tests.test_terminal_text import HOSTILE

STAGE = {
    "stage": "pretrain",
    "parent": {"name": "llama", "weights": {"model.safetensors": {"bytes": 8, "sha256": None}}, "config_sha256": "ab"},
    "data": [{"source": "zh", "parts": 1, "fingerprints": ["9b"], "samples_there": 9, "samples": 8, "tokens": 2400}],
    "begins": {"epoch": 0, "sample": 0},
    "ends": {"epoch": 0, "sample": 8},
    **{"steps": 2, "samples": 8, "tokens": 2400, "first_loss": 8.5, "final_loss": None, "final_loss_steps": 0},
    **{"settings": {"lr": 1e-4, "mixture": ["zh=1"], "use_neft": False}, "world_size": 1, "versions": {"torch": "2.5"}},
    "tokenizer_sha256": "cd",
    "resumed": [{"step": 1, "changed": ["lr 1 -> 2"]}],
}
CONTENT = {"version": 1, "base_model": "llama", "stages": [STAGE]}


def with_history(folder, content):
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (folder / HISTORY_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_what_was_written_is_read(tmp_path):
    assert read_history(tmp_path) == training_history.History()
    history = read_history(with_history(tmp_path, as_written(CONTENT)))
    assert (history.base_model, history.stages, history.problem) == ("llama", [STAGE], None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        {"version": 1},
        b" " * (training_history.MAX_BYTES + 1),
        {**CONTENT, "version": 2},
        {**CONTENT, "version": [1]},
        {**CONTENT, "base_model": 7},
        {**CONTENT, "base_model": ""},
        {**CONTENT, "base_model": "x" * 5000},
        {**CONTENT, "stages": {}},
        {**CONTENT, "stages": [None]},
        {**CONTENT, "stages": [[]]},
        {**CONTENT, "stages": [{}]},
        *(
            {**CONTENT, "stages": [STAGE, {**STAGE, name: value}]}
            for name, value in {
                "stage": ["sft"],
                "steps": -1,
                "tokens": 1.5,
                "samples": True,
                "world_size": 10**30,
                "first_loss": "low",
                "parent": "llama",
                "data": [{"source": ["zh"]}],
                "begins": {"epoch": 0},
                "versions": {"torch": 2},
                "weights": {"a": {"bytes": 1}},
                "settings": {"deep": [[[]]]},
                "resumed": [1],
                "unknown": 1,
            }.items()
        ),
        json.dumps({**CONTENT, "stages": [{**STAGE, "first_loss": float("nan")}]}),
        '{"version": 1, "base_model": "\\ud800", "stages": []}',
    ],
    ids=lambda content: str(content)[:40],
)
def test_what_is_not_a_history_is_left_out(tmp_path, content, caplog):
    history = read_history(with_history(tmp_path, content))
    assert history.stages == [] and history.base_model is None and history.problem
    training_history.log_problem(history)
    assert HISTORY_FILE in caplog.text and caplog.text.count("\n") == 1
    assert vocabulary_stage(str(tmp_path), (1, 2), "ab")["base_model"] == tmp_path.name


def test_only_regular_files_are_read(tmp_path):
    for name, make in (
        ("fifo", os.mkfifo),
        ("folder", os.mkdir),
        ("device", lambda path: os.symlink("/dev/zero", path)),
        ("nothing", lambda path: os.symlink(tmp_path / "none", path)),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / HISTORY_FILE)
        assert read_history(tmp_path / name).problem
        make(tmp_path / name / "README.md")
        assert named_by_card(tmp_path / name / "README.md") is None
    # As the cache of huggingface_hub has it.
    (tmp_path / "linked").mkdir()
    os.symlink(with_history(tmp_path / "real", CONTENT) / HISTORY_FILE, tmp_path / "linked" / HISTORY_FILE)
    assert read_history(tmp_path / "linked").stages == [STAGE]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*STAGE]), anything)
def test_a_card_can_be_made_of_all_that_is_accepted(tmp_path_factory, name, value):
    content = {**CONTENT, "stages": [{**STAGE, name: value}]}
    history = read_history(with_history(tmp_path_factory.getbasetemp() / "fuzzed", content))
    assert history.problem or history.stages
    as_written(history.followed_by(STAGE, base_model="x"))
    card(stages=[*history.stages, STAGE]).encode()


def card(**changed) -> str:
    run = dict(stage="sft", plugin="gemini", mixed_precision="bf16", world_size=8, total_steps=10, num_epochs=1)
    parts = dict(settings={**run, "versions": {"torch": "2.5.1"}}, base_model="llama", amounts=[], records=[])
    return model_card.render(**{**parts, "tokens_seen": 30, **changed})


def test_stages_without_figures_are_listed_as_such():
    old = {"stage": "pretrain", "parent": {"name": "old", "as_recorded": False}}
    text = card(stages=[old, {**STAGE, "final_loss": 2.5, "final_loss_steps": 48}])
    assert "| 1. Continued pre-training | old, changed since the stage before | not recorded | not recorded |" in text
    assert "| 2. Continued pre-training | llama | zh 2,400 | 2 | 2,400 | 8.5000 | 2.5000 (mean of 48 steps) |" in text
    assert "| all |  |  | 2 and more that is not recorded | 2,400 and more that is not recorded |" in text
    assert "| zh 2,400 | 2 (1 of them with an update) | 2,400 |" in card(stages=[{**STAGE, "updates": 1}])
    many = {**STAGE, "data": [{"source": f"s{number}", "tokens": 1} for number in range(12)]}
    assert "s7 1, and 4 more sources |" in card(stages=[many])


def test_weights_that_differ_from_the_history_are_reported(tmp_path, model_dir, caplog, monkeypatch):
    folder = shutil.copytree(model_dir, tmp_path / "merged")
    weights = describe_parent(str(folder), training_history.History())["weights"]
    for left, expected in ((weights, None), ({name: {**e, "sha256": "00"} for name, e in weights.items()}, False)):
        with_history(folder, {**CONTENT, "stages": [{**STAGE, "weights": left}]})
        assert describe_parent(str(folder), read_history(folder)).get("as_recorded") is expected
    assert "its weights are not those" in caplog.text
    # A file that is too large to hash is accepted as recorded if the sizes agree.
    monkeypatch.setattr(training_history, "HASHED_BYTES", 0)
    parent = describe_parent(str(folder), read_history(folder))
    assert {entry["sha256"] for entry in parent["weights"].values()} == {"00"}
    assert describe_parent(str(folder), training_history.History())["weights"]["model.safetensors"]["sha256"] is None


def test_names_of_folders(tmp_path):
    for path, expected in {
        "a/llama-2-7b": "llama-2-7b",
        "runs/zh/modeling": "zh",
        "runs/zh/epoch-0_step-400/modeling": "zh/epoch-0_step-400",
        "hub/models--meta-llama--Llama-2-7b-hf/snapshots/01c7f73d": "meta-llama/Llama-2-7b-hf",
        "bad\udcff": "bad\\udcff",
    }.items():
        assert name_of(str(tmp_path / path)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("---\nbase_model: org/x\n---\n# A", "org/x"),
        ("---\r\nbase_model: org/x\r\n---\r\n", "org/x"),
        ("---\nbase_model:\n- org/x\n---\n", "org/x"),
        ("---\nbase_model: [a, b]\n---\n", None),
        ("---\nbase_model: {a: b\n---\n", None),
        ("---\nbase_model: 2001-99-99\n---\n", None),
        ("---\nbase_model: " + "[" * 5000 + "\n---\n", None),
        ("---\nbase_model: " + "x" * 5000 + "\n---\n", None),
        ("---\n- base_model\n---\n", None),
        ("---\n", None),
        ("# no front matter", None),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), None),
    ],
)
def test_the_base_that_a_card_names(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    assert named_by_card(tmp_path / "README.md") == expected
    base = base_model_of(str(tmp_path), training_history.History())
    assert base == model_card.base_model(str(tmp_path)) == (expected or tmp_path.name)


def test_the_base_model_of_a_strangers_checkpoint(tmp_path):
    """Its running_states.json can have any content, and name another checkpoint, or itself."""
    models = [tmp_path / name / "modeling" for name in ("one", "other")]
    for model, other in zip(models, reversed(models), strict=True):
        model.mkdir(parents=True)
        (model.parent / "running_states.json").write_text(json.dumps({"settings": {"pretrained": str(other)}}))
    assert model_card.base_model(str(models[0])) in ("one", "other")
    states = models[1].parent / "running_states.json"
    states.write_text('{"base_model": "llama"}')
    assert model_card.base_model(str(models[0])) == "llama"
    for text in ("[" * 10**5, '{"settings": 7}', '{"base_model": 7}', '{"settings": {"pretrained": "\\u0000"}}', "{"):
        states.write_text(text)
        assert model_card.base_model(str(models[1])) == "other"
    states.unlink()
    os.mkfifo(states)
    assert model_card.base_model(str(models[1])) == "other"


MARKUP = (
    "a|b",
    "<script>alert(1)</script>",
    "![x](https://example.org/a.png)",
    "[x](javascript:1)",
    "a\n---\nlicense: mit",
    "```",
    "`a`",
    "**bold**",
    "__b__",
    "# x",
    "---",
    "key: value",
    "- x",
    "'\"",
    "&lt;",
    "a\\",
    "\\|",
    "$$x$$",
    "no",
    "{{x}}",
    "!!python/object:os.system x",
    "&a *a",
    "~~x~~",
    "",
    "x" * 300 + " ---",
)


@pytest.mark.parametrize("text", [*HOSTILE, *MARKUP])
def test_no_value_becomes_markup(text):
    stage = {**STAGE, "parent": {"name": text}, "data": [{"source": text, "tokens": 1}]}
    run = dict(stage="pretrain", plugin=text, mixed_precision="bf16", world_size=1, total_steps=1, num_epochs=1)
    rows = card(
        settings={**run, "mixture": [f"{text}=1"], "versions": {"torch": text or "-"}},
        base_model=text or "x",
        amounts=[Amount(text, text, 1, 1)],
        records=[{"step": 1, "evaluation": {text: {text: 1.0}}}],
        sources=[text],
        read=[SourceRead(text, 1, 1, 1)],
        stages=[stage],
    )
    plain = card(
        settings={**run, "plugin": "x", "mixture": ["x=1"], "versions": {"torch": "x"}},
        base_model="x",
        amounts=[Amount("x", "x", 1, 1)],
        records=[{"step": 1, "evaluation": {"x": {"x": 1.0}}}],
        sources=["x"],
        read=[SourceRead("x", 1, 1, 1)],
        stages=[{**stage, "parent": {"name": "x"}}],
    )
    rows.encode()
    controls = {character for character in rows if character != "\n" and not markdown.one_line(character) == character}
    front, body = rows.split("\n---\n", 1)
    assert not controls and "<" not in rows and "![" not in re.sub("`[^`\n]+`", "", body)
    assert yaml.safe_load(front.removeprefix("---\n"))["base_model"] == markdown.one_line(text or "x")
    assert ModelCard(rows).data.base_model == markdown.one_line(text or "x")
    assert "license" not in ModelCard(rows).data.to_dict()
    # As many lines and cells as with plain values; a pipe that ends a cell has an even number of backslashes before it.
    assert body.count("\n") == plain.split("\n---\n", 1)[1].count("\n")
    for line, other in zip(body.splitlines(), plain.split("\n---\n", 1)[1].splitlines(), strict=True):
        if other.startswith("|"):
            assert len(_cells(line)) == len(_cells(other)), line
        else:
            assert not line.startswith(("---", "<"))


def _cells(line: str) -> list:
    cells, escaped = [""], False
    for character in line:
        if character == "|" and not escaped:
            cells.append("")
        escaped = character == "\\" and not escaped
    return cells


def test_plain_keeps_ordinary_names():
    for name in ("Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", "split_gather", "明月", "a b.c (1)", "👩\u200d👧"):
        assert markdown.plain(name) == name
    assert markdown.code("zh=1 b=2") == "`zh=1 b=2`" and markdown.code("a`b") == "a\\`b"
