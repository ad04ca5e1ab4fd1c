"""What --dataset and --mixture name: parts, sources and buckets, only from the names of folders."""

import json
import os

import pytest

from colossal_llama2.dataset.read.prepared_data import load_tokenized_dataset
from colossal_llama2.dataset.read.sources import Part, parse_mixture, resolve_data, resolve_parts
from colossal_llama2.errors import UserError


def make(root, *parts, manifest=None):
    """Folders that look like parts, and an eval folder beside each."""
    for part in (*parts, *{os.path.join(os.path.dirname(part), "eval") for part in parts}):
        folder = root / part
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("dataset_info.json", "state.json"):
            (folder / name).write_text("{}")
    if manifest is not None:
        content = {"settings": {}, "tokenizer": {}, "bins": [{"name": name} for name in manifest]}
        (root / os.path.dirname(parts[0]) / "manifest.json").write_text(json.dumps(content))
    return root


def test_the_example_of_the_module(tmp_path, monkeypatch):
    make(tmp_path, "arrow_zh/part-00000", "arrow_zh/part-00001", manifest=["part-00000", "part-00001"])
    make(tmp_path, "old/arrow/part-00000", "old/arrow/part-00001")
    monkeypatch.chdir(tmp_path)
    assert resolve_parts(["arrow_zh", "en=old/arrow/part-00000", "en=old/arrow/part-00001"]) == [
        Part("arrow_zh", "arrow_zh/part-00000", 0),
        Part("arrow_zh", "arrow_zh/part-00001", 1),
        Part("en", "old/arrow/part-00000", 0),
        Part("en", "old/arrow/part-00001", 1),
    ]


def test_parts_keep_the_given_order_and_folders_are_read_by_number(tmp_path):
    make(tmp_path, *(f"a/part-{number}" for number in (0, 2, 10)))
    listed = [str(tmp_path / "a" / f"part-{number}") for number in (10, 0)]
    assert [(part.path, part.bucket) for part in resolve_parts(listed)] == [(listed[0], 0), (listed[1], 1)]
    inside = [os.path.basename(part.path) for part in resolve_parts([f"{tmp_path}/a/"])]
    assert inside == ["part-0", "part-2", "part-10"]


def test_a_folder_of_the_name_is_a_path_and_links_are_one_source(tmp_path, monkeypatch):
    make(tmp_path, "a=b/part-00000", "c/part-00000", "c/part-00001")
    (tmp_path / "d").symlink_to(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    parts = resolve_parts(["a=b/part-00000", "c/part-00000", "d/part-00001"], names_matter=True)
    assert [(part.source, part.bucket) for part in parts] == [("a=b", 0), ("c", 0), ("c", 1)]
    monkeypatch.chdir(tmp_path / "c")
    assert resolve_parts(["part-00000"])[0].source == "c"


def test_one_name_for_two_folders(tmp_path):
    make(tmp_path, "zh/arrow/part-00000", "en/arrow/part-00000", "zh/arrow/part-00001")
    given = [str(tmp_path / part) for part in ("zh/arrow", "en/arrow")]
    names = [part.source for part in resolve_parts(given)]
    assert names == ["zh/arrow", "zh/arrow", "en/arrow"]
    with pytest.raises(UserError, match=r"two sources have the name arrow.*NAME="):
        resolve_data(given, bucketed=True)
    # A source that already has a name cannot get another one's.
    with pytest.raises(UserError, match="have the name arrow"):
        resolve_data([f"arrow={given[0]}", given[1]], bucketed=True)
    assert [part.source for part in resolve_data([f"zh={given[0]}", given[1]], bucketed=True).parts] == [
        "zh",
        "zh",
        "arrow",
    ]
    joined = resolve_data([f"all={given[0]}", f"all={given[1]}"], bucketed=True)
    assert [(part.source, part.bucket) for part in joined.parts] == [("all", 0), ("all", 1), ("all", 2)]


def test_all_mistakes_are_reported_at_once(tmp_path):
    make(tmp_path, "short/part-00000", manifest=["part-00000", "part-00001"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut" / "part-00000").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        resolve_parts([*(str(tmp_path / name) for name in ("short", "empty", "cut")), "zh=nowhere"])
    problems = str(error.value).split("; and ")
    assert "part-00001 is missing (1 of the 2" in problems[0]
    assert "not a prepared part-* folder" in problems[1] and "prepare_pretrain_dataset.py" in problems[1]
    assert "part-00000 in it is not a complete part-* folder" in problems[2]
    assert "--dataset zh=nowhere: no such folder" in problems[3] and "NAME=PATH" in problems[3]
    with pytest.raises(UserError, match="^--dataset arrow/part-00000: no such folder; give part-"):
        # With a single "/" it is not taken for a name on a hub, where there is no prepared data.
        resolve_parts(["arrow/part-00000"])
    with pytest.raises(UserError, match="^--eval_dataset en nowhere: no such folder"):
        load_tokenized_dataset(["nowhere"], flag="--eval_dataset en")


def test_shares_of_a_mixture():
    mixture = parse_mixture(["zh=80", "en=20"], "stop", ["en", "zh", "zh"])
    assert list(mixture.shares.items()) == [("zh", 0.8), ("en", 0.2)] and mixture.end == "stop"
    assert parse_mixture(None, "repeat", ["zh"]) is None
    for words, reason in {
        "zh=1": "en has no weight",
        "zh=1 en=1 fr=1": "there is no source fr",
        "zh=1 en=1 zh=2": "zh is named twice",
    }.items():
        with pytest.raises(UserError, match=f"{reason}.*name each source of --dataset once: zh, en"):
            parse_mixture(words.split(), "repeat", ["zh", "en"])
