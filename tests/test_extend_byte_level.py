"""Extending a byte-level BPE: no id moves, every new piece is reached, and all clients give the same ids."""

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding.byte_level_encoder import marks_of
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of, spelled, spelled_bytes
from colossal_llama2.encoding.byte_level_parts import texts_around
from colossal_llama2.encoding.byte_level_reach import never_made, split_tokens, unreached_tokens
from colossal_llama2.encoding.byte_level_tokens import (
    can_occur,
    characters_in,
    extended,
    merges_into,
    merging,
    shown_token,
    symbols_of,
    text_of,
)
from colossal_llama2.encoding.parity import ByteLevelTokenizers, PieceFinder, measure
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import write_json
from colossal_llama2.tokenizer import byte_level_closure, extend_byte_level, init_tokenizer
from colossal_llama2.tokenizer.byte_level_closure import plan_byte_level
from colossal_llama2.tokenizer.closure import evolve
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from tests.byte_level import BEGIN, BYTE_LEVEL, END, make_byte_level, make_llama3
from tests.plain_bpe import LLAMA_3, PlainBpe, RankedBpe
from tests.test_init_tokenizer import report_of, write_pieces
from tests.tiny import CHINESE, english_documents

KINDS = ("llama3", "smollm2")
WORDS = [
    "人工智能",
    "你好",
    "世界",
    "天气",
    "人工",
    "你好",
    "▁the",
    "▁ther",
    "é",
    "naïve",
    "▁世界",
    " of",
    "🤖",
    "ค",
    "\n\n\n",
]
# Few characters, so that pieces overlap and repeat. The source merges "the"; the others are two, three and four bytes.
CHARACTERS = "the甲乙α🤖 "
PIECES = st.lists(st.text(CHARACTERS, min_size=1, max_size=7), min_size=1, max_size=20)
TEXT = st.text(CHARACTERS + "。1\n", max_size=40)
FEW = settings(max_examples=40, deadline=None, derandomize=True)


def with_every_split(folder: Path) -> Path:
    """Merges as tiktoken and LLaMA-3 have them: every split of each token."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["merges"] = merges_into(sorted(vocabulary, key=vocabulary.__getitem__), vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """LLaMA-3's kind has special tokens last, outside the vocabulary; SmolLM2's has them first, and lacks two bytes."""
    root = tmp_path_factory.mktemp("sources")
    llama3 = with_every_split(make_byte_level(root / "llama3"))
    smollm2 = make_byte_level(root / "smollm2", "smollm2", specials_first=True, missing=b"\xf1\x07")
    return {"llama3": llama3, "smollm2": smollm2}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def source(kind, folders) -> Path:
    return folders[kind]


@pytest.fixture(scope="module")
def targets(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("targets")
    pieces = write_pieces(root / "pieces.jsonl", WORDS)
    for name, folder in folders.items():
        expand_tokenizer(ExtensionSettings(folder, root / name, pieces))
    return {name: root / name for name in folders}


@pytest.fixture
def target(kind, targets) -> Path:
    return targets[kind]


def assert_refused(words: str, source: Path, target: Path, pieces: Path, **flags) -> None:
    with pytest.raises(UserError, match=words):
        expand_tokenizer(ExtensionSettings(source, target, pieces, **flags))
    assert not target.exists() and not list(target.parent.glob(".*"))


# What is written.


def test_no_id_moves_and_new_ids_follow(source, target):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    model = ByteLevelModel.read(target)
    new = list(model.vocabulary)[len(ByteLevelModel.read(source).vocabulary) :]
    asked = list(dict.fromkeys(word.replace("▁", " ") for word in WORDS))
    asked = [word for word in asked if spelled(word) not in ByteLevelModel.read(source).vocabulary]
    assert [text_of(token) for token in new][: len(asked)] == asked
    for load, vocabulary_of in (
        (lambda folder: Tokenizer.from_file(str(folder / "tokenizer.json")), lambda one: one.get_vocab()),
        (AutoTokenizer.from_pretrained, lambda one: one.get_vocab()),
    ):
        before, after = vocabulary_of(load(source)), vocabulary_of(load(target))
        assert {token: after[token] for token in before} == before
        added = sorted((index, token) for token, index in after.items() if token not in before)
        assert added == list(enumerate(new, start=len(before)))
        assert after[BEGIN] == before[BEGIN] and after["<|eot_id|>"] == before["<|eot_id|>"]


def test_everything_of_the_source_survives(source, target):
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    assert before.special_tokens_map == after.special_tokens_map and after.eos_token == END
    assert type(before) is type(after) and before.model_max_length == after.model_max_length
    text = f"Say {BEGIN}hello{END}"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocabulary_report.json"}
    assert {path.name for path in target.iterdir()} == names
    kept = [json.loads((folder / "tokenizer.json").read_text()) for folder in (source, target)]
    for content in kept:
        del content["model"]["vocab"], content["model"]["merges"]
    assert kept[0] == kept[1]


def test_templates_are_copied_and_other_files_of_the_vocabulary_are_not(source, tmp_path, caplog):
    folder = shutil.copytree(source, tmp_path / "source")
    template = "{{ messages }}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "vocab.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": END}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    caplog.set_level("INFO")
    expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "p.jsonl", ["学校"])))
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == template and written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {"eos_token": END}
    assert not (tmp_path / "out" / "vocab.json").exists()
    assert "vocab.json: not copied, tokenizer.json holds the same" in caplog.text


def test_a_folder_that_transformers_5_has_saved_is_extended_for_both_versions(source, tmp_path):
    from transformers import AutoTokenizer

    folder = shutil.copytree(source, tmp_path / "source")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|eot_id|>"], "backend": "tokenizers"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "p.jsonl", ["学校"])))
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.additional_special_tokens == ["<|eot_id|>"] and len(written.tokenize("学校")) == 1


KEPT_CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer")
# In transformers 5 each of them changes the normalizer, the pre-tokenizer, the decoder or the merges of a file.
OTHER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "CohereTokenizerFast")
OTHER_CLASSES += ("CodeLlamaTokenizerFast", "CodeGenTokenizer", "GPTNeoXTokenizerFast", "GemmaTokenizerFast")
OTHER_CLASSES += ("RobertaTokenizerFast", "WhisperTokenizer", "TokenizersBackend", "Unknown", "", None)


@pytest.mark.parametrize("name", [*KEPT_CLASSES, *OTHER_CLASSES])
def test_a_class_that_does_not_read_the_file_as_it_is_is_replaced(folders, name, tmp_path, caplog):
    """By transformers of either version, with and without the model's config.json beside it."""
    from transformers import AutoTokenizer

    caplog.set_level("INFO")
    source = shutil.copytree(folders["llama3"], tmp_path / "source")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": None, "tokenizer_class": name}))
    out = tmp_path / "out"
    out.mkdir()
    extend_byte_level._write_settings(source, out, {})
    written = json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert written == (name if name in KEPT_CLASSES else "PreTrainedTokenizerFast")
    is_logged = f"tokenizer_class {name} is replaced by PreTrainedTokenizerFast" in caplog.text
    assert is_logged == bool(name and name not in KEPT_CLASSES)
    shutil.copy(source / "tokenizer.json", out)
    expected = json.loads((out / "tokenizer.json").read_text())
    for _ in range(2):
        read = json.loads(AutoTokenizer.from_pretrained(out).backend_tokenizer.to_str())
        assert all(read[part] == expected[part] for part in ("normalizer", "pre_tokenizer", "decoder"))
        assert read["model"]["merges"] == expected["model"]["merges"] and not read["model"]["unk_token"]
        (out / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 600}))


def test_merges_keep_their_spelling(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "p.jsonl", ["学校"])))
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    old = content["model"]["merges"]
    assert (
        merges[: len(old)] == old
        and all(isinstance(pair, str) for pair in merges[len(old) :])
        and len(merges) > len(old)
    )


def test_new_pieces_are_reached_by_every_client(kind, target):
    from transformers import AutoTokenizer

    model, fast = ByteLevelModel.read(target), AutoTokenizer.from_pretrained(target)
    plain, encoder = PlainBpe(target, kind), model.plain_tokenizer()
    for word in WORDS:
        text = word.replace("▁", " ")
        expected = [model.vocabulary[spelled(text)]]
        assert plain.encode(text) == expected
        assert encoder.encode(text, add_special_tokens=False).ids == expected
        assert fast(text, add_special_tokens=False)["input_ids"] == expected and encoder.decode(expected) == text


def test_text_is_encoded_alike_everywhere(kind, source, target):
    from transformers import AutoTokenizer

    texts = [
        *english_documents()[:200],
        CHINESE,
        "学校老师, the 天堂!",
        "naïve 🤖 é 12345\n\n\n",
        "苹果 电脑",
        "苹果电脑",
    ]
    fast, plain = AutoTokenizer.from_pretrained(target), PlainBpe(target, kind)
    expected = [plain.encode(text) for text in texts]
    assert fast(texts, add_special_tokens=False)["input_ids"] == expected
    model = ByteLevelModel.read(target)
    assert [model.plain_tokenizer().decode(ids) for ids in expected] == texts
    before = PlainBpe(source, kind)
    finder = PieceFinder(list(model.vocabulary)[len(before.ids) :])
    unchanged = [text for text in texts if not finder.found_in(spelled(text))]
    assert unchanged and all(before.encode(text) == plain.encode(text) for text in unchanged)


def test_tiktoken_gives_the_same_ids_with_the_new_ranks(folders, targets):
    """LLaMA-3's clients that read ranks: a token's id is its rank, and any two neighbours may merge."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = RankedBpe(targets["llama3"], "llama3")
    client = tiktoken.Encoding("extended", pat_str=LLAMA_3, mergeable_ranks=ranks.ids, special_tokens={})
    plain = PlainBpe(targets["llama3"], "llama3")
    texts = [*english_documents()[:200], *WORDS, CHINESE, "学校老师, the 天堂!", "naïve 🤖 é 12345\n\n\n", "哈哈哈哈"]
    for text in texts:
        assert client.encode_ordinary(text) == plain.encode(text) == ranks.encode(text)


# The closure, on random pieces.


@pytest.fixture(scope="module")
def models(folders) -> dict[str, ByteLevelModel]:
    return {name: ByteLevelModel.read(folder) for name, folder in folders.items()}


def wanted_of(model: ByteLevelModel, pieces: list[str]) -> list[str]:
    return [token for token in dict.fromkeys(map(spelled, pieces)) if token not in model.vocabulary]


@FEW
@given(pieces=PIECES, text=TEXT, kind=st.sampled_from(KINDS))
def test_complete_reaches_every_piece_and_keeps_old_text(models, pieces, text, kind):
    model = models[kind]
    wanted = wanted_of(model, pieces)
    plan = plan_byte_level(model, wanted, closure="complete")
    new = extended(model, plan.pieces)
    assert unreached_tokens(new, plan.pieces) == []
    kept = [token for token in wanted if token not in plan.split]
    assert plan.pieces[: len(kept)] == kept and plan.dropped == list(plan.split)
    assert len(plan.pieces) == len(set(plan.pieces)) == len(kept) + plan.characters + plan.intermediates
    assert not model.vocabulary.keys() & set(plan.pieces)
    old_ids, new_ids = (one.plain_tokenizer().encode(text).ids for one in (model, new))
    if not PieceFinder(plan.pieces).found_in(spelled(text)):
        assert old_ids == new_ids
    assert b"".join(bytes_of(new.tokens[index]) for index in new_ids) == text.encode()


@FEW
@given(pieces=PIECES, texts=st.lists(TEXT, max_size=5), kind=st.sampled_from(KINDS))
def test_a_plain_bpe_gives_the_same_ids(models, folders, pieces, texts, kind):
    model = models[kind]
    plan = plan_byte_level(model, wanted_of(model, pieces), closure="complete")
    with tempfile.TemporaryDirectory() as name:
        extend_byte_level._write_vocabulary(model, Path(name), plan.pieces)
        written = ByteLevelModel.read(name)
        clients = [PlainBpe(Path(name), kind), *([RankedBpe(Path(name), kind)] if kind == "llama3" else [])]
    tokenizer = written.plain_tokenizer()
    for text in [*texts, *pieces, "".join(pieces)]:
        expected = tokenizer.encode(text).ids
        assert all(client.encode(text) == expected for client in clients), text


@FEW
@given(pieces=PIECES, budget=st.integers(1, 30), kind=st.sampled_from(KINDS))
def test_a_budget_drops_the_last_pieces_first(models, pieces, budget, kind):
    model = models[kind]
    wanted = wanted_of(model, pieces)
    for closure in ("complete", "drop", "off"):
        plan = plan_byte_level(model, wanted, closure=closure, max_added=budget)
        assert len(plan.pieces) <= budget
        possible = wanted if closure == "off" else [token for token in wanted if token not in plan.split]
        count = len(possible) - len(plan.over_budget)
        assert possible[count:] == plan.over_budget
        assert set(plan.dropped) | set(plan.pieces) >= set(possible[:count])
        if closure != "off":
            assert unreached_tokens(extended(model, plan.pieces), plan.pieces) == []


@FEW
@given(pieces=PIECES, kind=st.sampled_from(KINDS))
def test_drop_leaves_out_exactly_what_is_not_reached(models, pieces, kind):
    model = models[kind]
    wanted = wanted_of(model, pieces)
    plan = plan_byte_level(model, wanted, closure="drop")
    missed = unreached_tokens(extended(model, wanted), wanted)
    assert sorted(plan.dropped) == sorted(missed)
    assert plan.pieces == [token for token in wanted if token not in missed]
    assert plan.characters == plan.intermediates == 0


def test_what_is_added_is_shared_and_characters_come_first(models):
    model = models["llama3"]
    plan = plan_byte_level(model, wanted_of(model, ["甲乙丙", "甲乙丁", "戊甲乙"]), closure="complete")
    added = plan.pieces[3:]
    texts = [text_of(token) for token in added]
    assert set("甲乙丙丁戊") <= set(texts) and texts[-1] == "甲乙" and plan.intermediates == 1
    # Parts of characters are two of their three bytes.
    assert all(len(token) == 2 for token, text in zip(added, texts, strict=True) if text is None)


def test_ignore_merges_hides_nothing(models):
    """A piece without merges is one token where it stands alone, but it is not reached."""
    model = models["llama3"]
    assert model.ignore_merges
    token = spelled("甲乙丙")
    new = extended(model, [token])
    assert new.plain_tokenizer().encode("甲乙丙").ids == [model.size]
    assert unreached_tokens(new, [token]) == [token]
    assert symbols_of(merging(new).plain_tokenizer(), [token]) != [[token]]


def test_merges_are_every_split():
    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    assert merges_into(["abc", "ab"], ids) == [("a", "bc"), ("ab", "c"), ("a", "b")]
    assert merges_into(["cab", "cc"], ids) == [("c", "ab"), ("c", "c")]


# The pre-tokenizer.


@pytest.mark.parametrize(
    "name, whole, divided",
    [
        (
            "llama3",
            ["你好", "，你好", " 你好", "！！", "12", "ิน", "'s", " \n"],
            ["你好，", "3.14", "12345", "กิน", "你 好", "हिन्दी", "a1", "\n "],
        ),
        ("smollm2", ["你好", " 你好", "！！", "1", "'s", "   "], ["，你好", "12", "ิน", "กิน", "你 好", "a1", "你好。"]),
    ],
)
def test_what_the_pre_tokenizer_divides(models, name, whole, divided):
    tokenizer = models[name].plain_tokenizer()
    tokens = list(map(spelled, [*whole, *divided]))
    assert list(map(text_of, split_tokens(tokenizer, tokens))) == divided
    plan = plan_byte_level(models[name], wanted_of(models[name], [*divided, "学校"]), closure="complete")
    assert list(map(text_of, plan.split)) == divided and text_of(plan.pieces[0]) == "学校"


def test_what_is_divided_is_dropped_counted_and_named(source, tmp_path, caplog, capsys):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["学校", "学校。", "天 堂", "老师"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    report = report_of(tmp_path / "out")
    assert (report["asked"], report["dropped"], report["split"], report["added_from_file"]) == (4, 2, 2, 2)
    assert report["split_pieces"] == report["dropped_pieces"] == ["学校。", "天▁堂"]
    assert report["unreachable"] == 0 and report["kind"] == "byte-level BPE"
    examples = "'学校。' (学校|。), '天▁堂' (天|▁堂)"
    assert f"divides a text inside 2 of the pieces, so no text is encoded to them: {examples}; give" in caplog.text
    assert "; give their parts, or pieces from mine_tokens.py" in caplog.text
    printed = capsys.readouterr().out
    assert re.search("of these, divided by the pre-tokenizer +2\n", printed) and "requested 4, added" in printed
    expand_tokenizer(ExtensionSettings(source, tmp_path / "off", pieces, closure="off"))
    report = report_of(tmp_path / "off")
    assert (report["dropped"], report["split"], report["added"]) == (0, 2, 4)
    # Merges do not lead to the other two either.
    assert report["unreachable"] == 4 and "not proven: 4 of 4 new pieces never reached" in caplog.text


@FEW
@given(
    pieces=st.lists(st.text("qzx", min_size=2, max_size=7), min_size=1, max_size=12), text=st.text("qzx", max_size=30)
)
def test_the_closure_merges_as_tokenizers_does(models, pieces, text):
    """One ranks tokens, the other pairs; a token is always made by the same pair."""
    model = models["smollm2"]
    wanted = wanted_of(model, pieces)
    new = extended(model, wanted)
    scores = {token: -float(place) for place, token in enumerate(wanted, start=1)}
    for one in [*wanted, text]:
        (before,), (after,) = (symbols_of(each.plain_tokenizer(), [one]) for each in (model, new))
        assert evolve(before, scores) == after


# Tokens of the source that its merges never make, as LLaMA-3 has: " характер" is one only as a whole part of a text.


def with_unmade(model: ByteLevelModel, texts: list[str]) -> ByteLevelModel:
    new = [token for token in dict.fromkeys(map(spelled, texts)) if token not in model.vocabulary]
    unmade = {token: model.size + place for place, token in enumerate(new)}
    return dataclasses.replace(model, vocabulary={**model.vocabulary, **unmade})


def test_a_piece_around_a_token_that_is_never_made_is_joined_in_another_way(models):
    model = with_unmade(models["smollm2"], ["zqx"])
    plan = plan_byte_level(model, wanted_of(model, ["zqxv", "zqxvv", "azqx"]), closure="complete")
    assert not plan.dropped and not model.vocabulary.keys() & set(plan.pieces)
    new = extended(model, plan.pieces)
    assert unreached_tokens(new, plan.pieces) == []
    assert new.vocabulary["zqx"] == model.vocabulary["zqx"]


def test_a_piece_for_which_there_is_no_other_way_is_dropped_counted_and_named(folders, tmp_path, caplog):
    source = shutil.copytree(folders["smollm2"], tmp_path / "source")
    content = json.loads((source / "tokenizer.json").read_text())
    size = ByteLevelModel.read(source).size
    content["model"]["vocab"] |= {"zq": size, "qx": size + 1}
    (source / "tokenizer.json").write_text(json.dumps(content))
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", write_pieces(tmp_path / "p.jsonl", ["zqx", "学校"])))
    report = report_of(tmp_path / "out")
    assert (report["asked"], report["added_from_file"], report["dropped"], report["unreachable"]) == (2, 1, 1, 0)
    assert report["dropped_pieces"] == ["zqx"]
    assert "1 of the pieces can only be made through tokens that" in caplog.text and "to them: 'zqx'" in caplog.text


@pytest.mark.parametrize("piece", ["\n \n", "\r\u2028\u00a0\r\n", "\n\t\t \n"])
def test_a_piece_is_not_joined_through_what_the_pre_tokenizer_divides(models, piece):
    """LLaMA-3's leaves the white space before a line break whole, with other line breaks in it; "\n " is divided."""
    model = models["llama3"]
    assert split_tokens(model.plain_tokenizer(), [spelled(piece), spelled("\n ")]) == [spelled("\n ")]
    plan = plan_byte_level(model, [spelled(piece)], closure="complete")
    assert plan.pieces[0] == spelled(piece) and unreached_tokens(extended(model, plan.pieces), plan.pieces) == []


@FEW
@given(
    unmade=st.lists(st.text("qzx", min_size=2, max_size=4), min_size=1, max_size=8),
    pieces=st.lists(st.text("qzx", min_size=2, max_size=7), min_size=1, max_size=8),
    text=st.text("qzx", max_size=30),
)
def test_tokens_that_are_never_made_keep_their_ids_and_texts(models, unmade, pieces, text):
    model = with_unmade(models["smollm2"], unmade)
    wanted = wanted_of(model, pieces)
    plan = plan_byte_level(model, wanted, closure="complete")
    new = extended(model, plan.pieces)
    assert not model.vocabulary.keys() & set(plan.pieces) and unreached_tokens(new, plan.pieces) == []
    kept = len(plan.pieces) - plan.characters - plan.intermediates
    assert plan.pieces[:kept] == [token for token in wanted if token not in plan.dropped]
    assert kept + len(plan.dropped) == len(wanted)
    if not PieceFinder(plan.pieces).found_in(spelled(text)):
        assert model.plain_tokenizer().encode(text).ids == new.plain_tokenizer().encode(text).ids


def test_of_a_repeated_merge_the_last_rank_counts(models):
    """As in `tokenizers`. With the first one, 61c3 would be made before é, with the last one after it."""
    content = spelled_bytes(b"\xc3\xa9")
    model = extended(
        models["llama3"], [token for token in map(spelled, LATIN) if token not in models["llama3"].vocabulary]
    )
    part = spelled_bytes(b"a\xc3")
    early = dataclasses.replace(extended(model, [part]), merges=[(part[0], part[1]), *extended(model, [part]).merges])
    tokenizer = early.plain_tokenizer()
    assert [symbol.value for symbol in tokenizer.model.tokenize(part[0] + content)] == [part[0], content]
    assert never_made(early, [part]) == [part]


# Other input.


def test_bytes_without_a_token_are_added(models, folders, tmp_path):
    """U+40000 begins with F1, which SmolLM2 lacks too. Without it, the rest of the character would be a token of it."""
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["\U00040000", "你好"])
    expand_tokenizer(ExtensionSettings(folders["smollm2"], tmp_path / "out", pieces))
    model = ByteLevelModel.read(tmp_path / "out")
    new = list(model.vocabulary)[len(models["smollm2"].vocabulary) :]
    assert bytes_of(new[2]) == b"\xf1" and report_of(tmp_path / "out")["unreachable"] == 0
    assert model.plain_tokenizer().encode("x\U00040000").ids[1:] == [models["smollm2"].size]
    expand_tokenizer(ExtensionSettings(folders["smollm2"], tmp_path / "drop", pieces, closure="drop"))
    assert "\U00040000" in report_of(tmp_path / "drop")["dropped_pieces"]


def test_parts_of_characters_are_given_as_bytes(source, tmp_path):
    lines = [{"bytes": "E88B"}, {"piece": "苹"}, {"bytes": "e88bb9e69e9c"}, {"bytes": "e88b"}, {"piece": "苹果"}]
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", tmp_path / "pieces.jsonl", closure="drop"))
    report = report_of(tmp_path / "out")
    assert report["asked"] == 5 and report["duplicates"] == 2 and report["unreachable"] == 0
    new = list(ByteLevelModel.read(tmp_path / "out").vocabulary)[len(ByteLevelModel.read(source).vocabulary) :]
    assert new[:2] == [spelled_bytes(b"\xe8\x8b"), spelled("苹")]
    assert [shown_token(token) for token in new[:2]] == ["bytes e88b", "苹"]


# GPT-2's pattern divides "," from letters, but not from the symbol ䷀ (e4b780). The Arabic digit ٠ (d9a0) is a number.
# Whole in few of the characters that complete them: in ²1٠, énº and 好aＡ. "a0" is last, since it is a byte's token.
RARELY = ["b231d9", "a96ec2", "bd61efbc"]
LLAMA3_WHOLE = ["61e4", "2ce4", "2ce4bd", "a030", "a0e5a5", "e4bd", *RARELY, "a0"]
PARTS = [
    ("llama3", ["0ae4", "31e4", "e5a5bd2ce4", "a02e30"], LLAMA3_WHOLE),
    ("smollm2", ["0ae4", "31e4", "2ce4bd", "a030", "a0e5a5bd0a"], ["61e4", "2ce4", "20e4bd", *RARELY[1:], "a0"]),
]


@pytest.mark.parametrize("name, divided, whole", PARTS)
def test_bytes_across_a_division_are_divided(models, name, divided, whole):
    tokens = [spelled_bytes(bytes.fromhex(part)) for part in [*divided, *whole]]
    assert split_tokens(models[name].plain_tokenizer(), tokens) == tokens[: len(divided)]
    plan = plan_byte_level(models[name], tokens[:-1], closure="complete")
    assert plan.split == plan.dropped == tokens[: len(divided)] and not plan.joined
    assert unreached_tokens(extended(models[name], plan.pieces), plan.pieces) == []


def test_bytes_inside_a_character_are_looked_for_there(models):
    """9f98 is made in 😀 (f09f9880), also if 9f is joined to every byte that may end or begin before it."""
    texts = list(texts_around(spelled_bytes(bytes.fromhex("9f98"))))
    assert "😀" in texts and all(b"\x9f\x98" in text.encode() for text in texts)
    pairs = [f"{lead:02x}9f" for lead in (*range(0xE1, 0xF0), *range(0x80, 0xC0))]
    tokens = [spelled_bytes(bytes.fromhex(part)) for part in (*pairs, "9f98")]
    plan = plan_byte_level(models["llama3"], tokens, closure="complete")
    assert tokens[-1] in plan.pieces and tokens[-1] not in plan.joined
    assert unreached_tokens(extended(models["llama3"], plan.pieces), plan.pieces) == []


def test_lost_parts_are_found_in_few_passes_within_a_budget(models, monkeypatch):
    """61c3 to 7ac3 are never made once every character that begins with c3 is a token."""
    latin = [spelled(chr(code)) for code in range(0xC0, 0x100)]
    parts = [spelled_bytes(bytes((letter, 0xC3))) for letter in range(0x61, 0x7B)]
    passes = []
    plan_once = byte_level_closure._fitting
    monkeypatch.setattr(byte_level_closure, "_fitting", lambda *given: passes.append(given) or plan_once(*given))
    known = models["llama3"].vocabulary
    wanted = [token for token in [*latin, *parts, spelled("学校")] if token not in known]
    plan = plan_byte_level(models["llama3"], wanted, closure="complete", max_added=len(latin) + 2)
    assert set(plan.joined) == {part for part in parts if part not in known} and len(passes) <= 4
    assert len(plan.pieces) <= len(latin) + 2


def test_what_is_made_only_for_an_unreachable_token_is_unreachable(models):
    tokens = [spelled_bytes(bytes.fromhex("0ae4")), spelled_bytes("\n你".encode())]
    plan = plan_byte_level(models["llama3"], tokens, closure="off")
    assert unreached_tokens(extended(models["llama3"], plan.pieces), tokens) == tokens


def test_divided_bytes_are_dropped_counted_and_named(source, tmp_path, caplog):
    lines = [{"bytes": "0ae4"}, {"piece": "学校"}, {"bytes": "61e4"}]
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", tmp_path / "pieces.jsonl"))
    report = report_of(tmp_path / "out")
    assert (report["asked"], report["split"], report["dropped"], report["unreachable"]) == (3, 1, 1, 0)
    assert report["split_pieces"] == report["dropped_pieces"] == ["bytes 0ae4"]
    assert "divides a text inside 1 of the pieces, so no text is encoded to them: 'bytes 0ae4'" in caplog.text
    expand_tokenizer(ExtensionSettings(source, tmp_path / "off", tmp_path / "pieces.jsonl", closure="off"))
    assert "bytes 0ae4" in report_of(tmp_path / "off")["unreachable_pieces"]


LATIN = [bytes([0xC3, byte]).decode() for byte in range(0x80, 0xC0)]


@pytest.mark.parametrize("is_first", [False, True])
def test_bytes_that_other_merges_always_join_are_dropped_and_named(models, source, kind, is_first, tmp_path, caplog):
    """Whatever follows c3 makes a character that is a token, before a and c3 are merged; unless these come first."""
    lines = [{"piece": character} for character in LATIN]
    lines.insert(0 if is_first else len(lines), {"bytes": "61c3"})
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", tmp_path / "pieces.jsonl"))
    report, plain = report_of(tmp_path / "out"), PlainBpe(tmp_path / "out", kind)
    assert report["dropped_pieces"] == ([] if is_first else ["bytes 61c3"]) and report["split"] == 0
    assert ("other merges always join the first or last byte of 1 of the pieces" in caplog.text) != is_first
    made = [plain.ids.get(b"a\xc3") in plain.encode(f"a{character}") for character in LATIN if character.isalpha()]
    assert all(made) if is_first else not any(made)
    assert report["unreachable"] == 0


@FEW
@given(
    text=st.text("the甲乙é🤖 ,1\n", min_size=2, max_size=4),
    cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    kind=st.sampled_from(KINDS),
)
def test_parts_that_are_kept_are_made_in_a_text(models, text, cut, kind):
    content = text.encode()[cut[0] :]
    content = content[: len(content) - cut[1]]
    token = spelled_bytes(content)
    if not content or token in models[kind].vocabulary or text_of(token) is not None:
        return
    plan = plan_byte_level(models[kind], [token], closure="complete")
    divide = models[kind].plain_tokenizer().pre_tokenizer.pre_tokenize_str
    if any(token in part for part, _ in divide(text)):
        assert plan.pieces[0] == token and not unreached_tokens(extended(models[kind], plan.pieces), plan.pieces)


def test_a_part_of_a_long_piece_is_limited_by_characters_as_a_piece_is(source, tmp_path):
    """What mine_tokens.py writes with --max_piece_length 64 may have more than 64 bytes."""
    content = ("甲" * 30 + "乙").encode()[:-1]
    assert characters_in(content) == 31 and characters_in(b"\xbd\xa0a") == 2
    (tmp_path / "pieces.jsonl").write_text(json.dumps({"bytes": content.hex()}) + "\n")
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", tmp_path / "pieces.jsonl"))
    assert spelled_bytes(content) in ByteLevelModel.read(tmp_path / "out").vocabulary


def test_bytes_that_no_text_has():
    assert all(
        map(can_occur, (b"\xe4", b"\xbd\xa0", "你好".encode(), b"\xa0\xe5\xa5", b"\x80\x80\x80a", b"\xf1", b"a\xe4"))
    )
    assert not any(map(can_occur, (b"\xff", b"\xc0", b"a\xbd", b"\x80\x80\x80\x80", b"\xe4a", b"\xed\xa0\x80")))


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"bytes": "e4b"}', 'write bytes in hexadecimal, such as {"bytes": "e4bd"}'),
        ('{"bytes": 7}', "write bytes in hexadecimal"),
        ('{"bytes": ""}', "write bytes in hexadecimal"),
        ('{"bytes": "ff"}', "which is in no UTF-8 text; remove the line"),
        ('{"bytes": "' + "61" * 65 + '"}', "has 65 characters, at most 64 are allowed"),
        ('{"bytes": "' + b"<|eot_id|>".hex() + '"}', "a special token of the source"),
        ('{"bytes": "' + b"a<|eot_id|>".hex() + 'e4bd"}', "contains the special token '<|eot_id|>'"),
        ('{"bytes": "a00761e4"}', "the control character .* no token for it"),
        ('{"piece": "<|eot_id|>"}', "'<|eot_id|>', a special token of the source tokenizer"),
        ('{"piece": "a<|eot_id|>"}', "contains the special token '<|eot_id|>'"),
        ('{"piece": "a\\u0007"}', "the control character .* no token for it"),
        ('{"piece": ""}', "is empty"),
        ('{"word": "a"}', 'no "piece" in this line'),
        ('{"piece": "a", "bytes": "e4bd"}', 'has both "piece" and "bytes"; .* remove one of them'),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(folders, tmp_path, line, words):
    (tmp_path / "pieces.jsonl").write_text(f'{{"piece": "ok"}}\n{line}\n')
    assert_refused(f"pieces.jsonl:2: .*{words}", folders["smollm2"], tmp_path / "out", tmp_path / "pieces.jsonl")


def test_scores_and_bytes_are_for_one_kind_each(source, tokenizer_dir, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["学校"])
    words = "--piece_scores zero given, but .* is a byte-level BPE, which ranks merges and has no scores"
    assert_refused(words, source, tmp_path / "out", pieces, piece_scores="zero")
    pieces.write_text('{"piece": "学校", "bytes": "e4bd"}\n')
    assert_refused('pieces.jsonl:1: this line has both "piece" and "bytes"', tokenizer_dir, tmp_path / "out", pieces)
    pieces.write_text('{"bytes": "e4bd"}\n')
    assert_refused("pieces.jsonl:1: .* the source is a SentencePiece model", tokenizer_dir, tmp_path / "out", pieces)


def test_documents_get_other_marks_than_a_chat(tmp_path, caplog):
    from transformers import AutoTokenizer

    source = make_byte_level(tmp_path / "source", bos="<|start_header_id|>", eos="<|eot_id|>", specials_first=True)
    write_json(source / "special_tokens_map.json", {"eos_token": {"content": "<|eot_id|>"}, "pad_token": "<|eot_id|>"})
    content = json.loads((source / "tokenizer.json").read_text())
    write_json(source / "tokenizer.json", {**content, "post_processor": None})
    pieces, out = write_pieces(tmp_path / "pieces.jsonl", ["学校"]), tmp_path / "out"
    expand_tokenizer(ExtensionSettings(source, out, pieces, bos_token=END, eos_token=END))
    assert marks_of(out) == (END, END) and marks_of(source) == ("<|start_header_id|>", "<|eot_id|>")
    assert json.loads((out / "special_tokens_map.json").read_text())["pad_token"] == "<|eot_id|>"
    assert report_of(out)["eos_token"] == END
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert after.eos_token_id == after.bos_token_id == after.convert_tokens_to_ids(END) != before.eos_token_id
    assert after.pad_token == "<|eot_id|>"
    without = make_byte_level(tmp_path / "without", bos=None)
    expand_tokenizer(ExtensionSettings(without, tmp_path / "with", pieces, bos_token=BEGIN))
    assert marks_of(without) == ("", END) and marks_of(tmp_path / "with") == (BEGIN, END)
    # The flag is a cure for a source without eos_token.
    config = json.loads((without / "tokenizer_config.json").read_text())
    write_json(without / "tokenizer_config.json", {**config, "eos_token": None, "chat_template": "{{ eos_token }}"})
    assert_refused(
        "names no eos_token, which marks the end of documents; give --eos_token", without, tmp_path / "no", pieces
    )
    expand_tokenizer(ExtensionSettings(without, tmp_path / "given", pieces, eos_token=END))
    assert marks_of(tmp_path / "given") == ("", END)
    assert f"chat template of the source contains eos_token, which is {END} from now on" in caplog.text
    only_end = tmp_path / "end"
    expand_tokenizer(ExtensionSettings(source, only_end, pieces, eos_token=END))
    assert marks_of(only_end) == ("<|start_header_id|>", END)


def test_unusable_marks_are_refused(folders, tokenizer_dir, tmp_path):
    pieces, source = write_pieces(tmp_path / "pieces.jsonl", ["学校"]), folders["llama3"]
    words = "--eos_token 'the' given, but .*tokenizer.json has no such added token; it has '<|begin_of_text|>', "
    assert_refused(words.replace("|", r"\|"), source, tmp_path / "out", pieces, eos_token="the")
    words = "--bos_token .* given, but the post_processor of .*tokenizer.json puts .* around every text"
    assert_refused(words, source, tmp_path / "out", pieces, bos_token=END)
    appends = shutil.copytree(source, tmp_path / "appends")
    content = json.loads((appends / "tokenizer.json").read_text())
    processors = [{"type": "RobertaProcessing", "sep": [END, 1], "cls": [BEGIN, 0], "trim_offsets": True}]
    processors[0]["add_prefix_space"] = False
    content["post_processor"] = {"type": "Sequence", "processors": processors}
    write_json(appends / "tokenizer.json", content)
    words = "--eos_token .* given, but the post_processor of .*tokenizer.json puts .* around every text"
    assert_refused(words, appends, tmp_path / "out", pieces, eos_token="<|eot_id|>")
    whole_word = make_byte_level(tmp_path / "word")
    content = json.loads((whole_word / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": content["model"]["vocab"]["the"], "content": "the"}
    )
    write_json(whole_word / "tokenizer.json", content)
    assert_refused(
        "eos_token is 'the', a token that occurs in text", whole_word, tmp_path / "out", pieces, eos_token="the"
    )
    words = "--bos_token and --eos_token are for a byte-level BPE, and .* is a SentencePiece tokenizer"
    assert_refused(words, tokenizer_dir, tmp_path / "out", pieces, eos_token="</s>")


def test_folders_that_are_refused(source, tmp_path):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["学校"])

    def changed(change) -> Path:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        folder = shutil.copytree(source, tmp_path / "source")
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    def same_id(content):
        content["added_tokens"][1]["id"] = content["added_tokens"][0]["id"]

    def taken_id(content):
        content["added_tokens"][1]["id"] = content["model"]["vocab"]["a"]

    def other_id(content):
        content["added_tokens"].append({**content["added_tokens"][0], "id": 9_999})

    def other_gap(content):
        content["added_tokens"].append({**content["added_tokens"][0], "content": "<|far|>", "id": 601})

    def too_high_id(content):
        content["added_tokens"].append({**content["added_tokens"][0], "content": "<|far|>", "id": 10**11})

    def named(content):
        content["pre_tokenizer"] = {"type": "WhitespaceSplit"}

    def in_the_middle(content):
        content["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [{**BYTE_LEVEL, "use_regex": True}, {"type": "Digits", "individual_digits": True}],
        }

    out = tmp_path / "out"
    for change, words in [
        (same_id, "to two added tokens"),
        (taken_id, "to two tokens|two ids for the token"),
        (other_id, "two ids for the added token"),
        (other_gap, "'<.far.>' has the id 601, but transformers gives it (600|598)"),
        (too_high_id, "needs a content, which is text, and an id below 16,777,216"),
        (named, "not a byte-level BPE"),
        (in_the_middle, r'its pre-tokenizer are \["ByteLevel", "Digits"\]; ByteLevel must be the last step'),
        (lambda content: content["model"].update(type="WordPiece"), 'is a "WordPiece" model'),
        (lambda content: content["model"].update(type="Unigram"), 'is a "Unigram" model'),
        (lambda content: content.update(normalizer={"type": "NFC"}), "has a normalizer"),
    ]:
        assert_refused(words, changed(change), out, pieces)
    folder = changed(lambda content: None)
    (folder / "tokenizer_config.json").unlink()
    assert_refused("holds no tokenizer_config.json; LLaMA-3 ships", folder, out, pieces)
    folder = changed(lambda content: None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for eos, words in (
        (None, "names no eos_token, which marks the end of documents"),
        ("<|none|>", "no token '<.none.>'"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos}))
        assert_refused(words, folder, out, pieces)
    folder = changed(lambda content: None)
    (folder / "tokenizer.model").write_bytes(b"GGUF" + bytes(70 << 20))
    assert_refused("tokenizer.model is a model in GGUF", folder, out, pieces)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    (folder / "tokenizer.json").unlink()
    assert_refused("is in tiktoken's format.*convert_tiktoken", folder, out, pieces)


def test_a_new_token_with_the_name_of_an_added_token(folders, tmp_path):
    """The vocabulary spells "é" as "Ã©", and has each name once. So it does for what the closure adds."""
    folder = shutil.copytree(folders["llama3"], tmp_path / "source")
    content = json.loads((folder / "tokenizer.json").read_text())
    for number, text in enumerate(("é", "校")):
        content["added_tokens"].append({**content["added_tokens"][0], "content": spelled(text), "id": 600 + number})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for piece, text in (("é", "é"), ("学校", "校")):
        pieces = write_pieces(tmp_path / "pieces.jsonl", [piece])
        assert_refused(f"the new piece '{text}' is spelled '{spelled(text)}' in", folder, tmp_path / "out", pieces)


def test_truncation_and_padding_in_the_file_do_not_hide_differences(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", write_pieces(tmp_path / "p.jsonl", ["学校"])))
    groups = report_of(tmp_path / "out")["parity"]
    assert groups and all(group["fast"]["source_differs"] == 0 for group in groups)


def test_a_token_that_only_transformers_adds_is_named(folders, tmp_path):
    """Its class gives LLaMA-3's tokenizer a token <unk>, with the id that the first new piece gets."""
    folder = shutil.copytree(folders["llama3"], tmp_path / "source")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|pad|>"}))
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["学校"])
    assert_refused(
        r"transformers adds the token '<\|pad\|>' with the id 600.*set it to null", folder, tmp_path / "out", pieces
    )


def test_overwrite_and_a_failed_proof(source, tmp_path, monkeypatch):
    pieces = write_pieces(tmp_path / "pieces.jsonl", ["学校"])
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    write_pieces(pieces, ["老师"])
    with pytest.raises(UserError, match="already exists"):
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces))

    def without_merges(model, tokens):
        return dataclasses.replace(extended(model, tokens), merges=model.merges)

    # Without the merges of the new pieces, nothing leads to them.
    with monkeypatch.context() as patch, pytest.raises(RunError, match="never reached.*Use --closure complete, or"):
        patch.setattr(extend_byte_level, "extended", without_merges)
        patch.setattr(extend_byte_level, "merges_into", lambda tokens, ids: [])
        expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, overwrite=True))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", pieces, overwrite=True))
    assert spelled("老师") in ByteLevelModel.read(tmp_path / "out").vocabulary
    assert spelled("学校") not in ByteLevelModel.read(tmp_path / "out").vocabulary


def test_the_command_reports_parity_on_text(source, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join([*english_documents()[:50], CHINESE, f"Say {END}"]))
    pieces = write_pieces(tmp_path / "pieces.jsonl", WORDS)
    words = [
        "--source_tokenizer_dir",
        source,
        "--target_tokenizer_dir",
        tmp_path / "out",
        "--expand_tokens_file",
        pieces,
    ]
    init_tokenizer.main([*map(str, words), "--parity_text", str(tmp_path / "text.txt")])
    groups = {group["group"]: group for group in report_of(tmp_path / "out")["parity"]}
    assert list(groups) == ["new pieces alone", "new pieces in context", "old pieces", "parity text"]
    found = groups["parity text"]
    # A special token that is spelled out is one token for AutoTokenizer, before and after.
    assert found["fast"]["source_differs"] == 1 and found["fast"]["added"] == found["changed"] == 0
    assert found["documents"] == 52 and found["without_new_piece"] > 10 and found["slow"] is None
    assert "ids that differ from tokenizer.json's merges" in capsys.readouterr().out


def test_differences_and_changes_are_counted(source, target, tmp_path):
    """Compared with a target whose new merges rank before the old ones."""
    folder = shutil.copytree(target, tmp_path / "changed")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    one, other = (ByteLevelTokenizers(path, ByteLevelModel.read(path)) for path in (source, folder))
    found = measure(one, other, "text", english_documents()[:50], PieceFinder(["甲"]))
    assert found.changed > 10 and found.fast.added == 0 and found.first_changed


# LLaMA-3's own tokenizer.


@pytest.mark.slow
def test_llama_3_itself(tmp_path):
    from transformers import AutoTokenizer

    tiktoken = pytest.importorskip("tiktoken")
    source = make_llama3(tmp_path / "llama3")
    words = ["人工智能技术", "深度学习框架", "ελληνική", "▁γλώσσα", "กิน", "你好，", "龘龘", "𠮷野家"]
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", write_pieces(tmp_path / "pieces.jsonl", words)))
    report = report_of(tmp_path / "out")
    assert report["split_pieces"] == ["กิน", "你好，"] and report["unreachable"] == 0
    assert report["vocabulary_before"] == 128_256
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    old, new = before.get_vocab(), after.get_vocab()
    assert {token: new[token] for token in old} == old
    ranks = RankedBpe(tmp_path / "out", "llama3").ids
    client = tiktoken.Encoding("extended", pat_str=LLAMA_3, mergeable_ranks=ranks, special_tokens={})
    texts = [
        *english_documents()[:500],
        CHINESE,
        "人工智能技术 and ελληνική γλώσσα 龘龘",
        "𠮷野家の深度学习框架",
        "กินข้าว",
    ]
    assert [client.encode_ordinary(text) for text in texts] == after(texts, add_special_tokens=False)["input_ids"]
