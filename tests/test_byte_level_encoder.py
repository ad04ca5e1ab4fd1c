"""The encoder of byte-level BPE tokenizers: ids, bytes, marks, cuts of long texts, and every wrong folder."""

import base64
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of
from colossal_llama2.encoding.parity import load_with_transformers
from colossal_llama2.encoding.registry import fingerprint, kind_of, load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.transformers_tokenizer import load_fast, load_tokenizer
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer.compare import compare
from colossal_llama2.tokenizer.compare import load as load_compared
from tests.byte_level import BEGIN, END, PRE_TOKENIZERS, make_byte_level, make_llama3, sequence, split
from tests.launching import ROOT
from tests.tiny import CHINESE, english_documents

SPELLED = [BEGIN, END, "<|eot_id|>", "it's", "IT'S", "'ſ", "  ", " \n", "\n\n", "\r\n", "\t", "1234", "\0", "\u2028"]
LETTERS = [*"ab人工é，。、；：！？.,'\" \n", "\u0301", "ſ", "\u180e", "\u200b", "\x1c", "½", "٣", "👩‍🚀", "\U0010ffff"]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from([*SPELLED, *LETTERS]) | CHARACTERS, max_size=60).map("".join)
DOCUMENTS = [*english_documents()[:60], CHINESE * 3, f"Say {BEGIN} and {END}.", "naïve café 😀", "", " ", "\n"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("byte_level")
    return {kind: make_byte_level(root / kind, kind, specials_first=kind == "smollm2") for kind in PRE_TOKENIZERS}


@pytest.fixture(params=list(PRE_TOKENIZERS))
def folder(request, folders) -> Path:
    return folders[request.param]


def changed(folder: Path, target: Path, change, name: str = "tokenizer.json") -> Path:
    """A copy of a folder with a change of one of its files."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content))
    return target


def test_ids_are_those_of_transformers_with_special_tokens_as_text(folder):
    from transformers import AutoTokenizer

    encoder = load_encoder(folder)
    assert type(encoder) is ByteLevelEncoder
    fast = AutoTokenizer.from_pretrained(folder)
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    expected = [fast(text, **as_text)["input_ids"] for text in DOCUMENTS]
    assert encoder.encode(DOCUMENTS) == encoder.encode(DOCUMENTS, dummy_prefix=False) == expected
    assert (encoder.bos_id, encoder.eos_id) == (fast.bos_token_id, fast.eos_token_id)
    assert (encoder.bos_text, encoder.eos_text) == (BEGIN, END)
    assert encoder.vocab_size == len(fast) and encoder.unk_id < 0
    assert not {encoder.bos_id, encoder.eos_id} & {token for ids in expected for token in ids}
    assert not ByteLevelEncoder.puts_prefix_after_marks(folder)


def test_every_text_comes_back_and_its_bytes_are_counted(folder):
    encoder, tokens = load_encoder(folder), ByteLevelModel.read(folder).tokens

    @settings(max_examples=80, deadline=None)
    @given(TEXTS)
    def check(text):
        (ids,) = encoder.encode([text])
        assert encoder.decode(ids) == text
        sizes = encoder.bytes_of_tokens(text, ids)
        assert sizes.dtype == np.int32 and sizes.tolist() == [len(bytes_of(tokens[token])) for token in ids]
        assert sizes.sum() == len(text.encode())

    check()
    assert encoder.decode([encoder.bos_id, *encoder.encode(["Hi"])[0], encoder.eos_id]) == "Hi"


def test_parts_of_a_long_text_have_the_ids_of_the_whole(folder):
    whole = ByteLevelEncoder(folder)

    @settings(max_examples=150, deadline=None)
    @given(TEXTS, st.integers(1, 12))
    def check(text, part_characters):
        parts = ByteLevelEncoder.__new__(ByteLevelEncoder)
        parts.__dict__.update(whole.__dict__, _part_characters=part_characters)
        (expected,) = whole.encode([text])
        assert parts.encode_long(text).tolist() == expected
        assert parts.encode([text, "", text]) == [expected, [], expected]

    check()
    text = "\n".join([*english_documents()[:200], CHINESE * 30])
    parts = list(whole._cuts.parts_of(text, 100))
    assert "".join(parts) == text and len(parts) > 200
    assert ByteLevelEncoder(folder, 100).encode_long(text).tolist() == whole.encode([text])[0]


def test_an_unknown_pattern_is_never_cut(folders, tmp_path):
    def lengthen(content):
        content["pre_tokenizer"] = sequence(split(r"\p{L}+ \p{L}+|\s+|[^\s\p{L}]+"))

    encoder = ByteLevelEncoder(changed(folders["llama3"], tmp_path / "long", lengthen), 10)
    assert list(encoder._cuts.parts_of("two words " * 20, 10)) == ["two words " * 20]


def test_it_pickles_as_its_path_and_needs_no_transformers(folders):
    encoder = ByteLevelEncoder(folders["llama3"], 1000)
    content = pickle.dumps(encoder)
    assert len(content) < 500
    copy = pickle.loads(content)  # noqa: S301 - our own bytes
    assert copy.encode(DOCUMENTS) == encoder.encode(DOCUMENTS) and copy.is_long("a" * 1001)
    code = (
        "import os, sys, threading; from colossal_llama2.encoding.registry import load_encoder;"
        "encoder = load_encoder(sys.argv[1]); encoder.encode(['a b'] * 5000);"
        "assert not {'transformers', 'torch'} & set(sys.modules);"
        "assert len(os.listdir('/proc/self/task')) == 1, os.listdir('/proc/self/task')"
    )
    subprocess.run([sys.executable, "-c", code, str(folders["llama3"])], cwd=ROOT, check=True)


def test_a_lone_surrogate_is_no_text(folders):
    encoder = load_encoder(folders["llama3"])
    for encode in (lambda text: encoder.encode([text]), encoder.encode_long, encoder.problem_of):
        with pytest.raises(UnicodeEncodeError):
            encode("a\ud800")


def test_a_byte_without_a_token_is_never_dropped(tmp_path):
    encoder = load_encoder(make_byte_level(tmp_path / "lacking", missing=b"\x04\xf1"))
    assert encoder.problem_of(CHINESE) is None
    for text, words in (("a\x04", r"'\\x04' \(U\+0004\).* byte 04"), ("é\U00040000", r"\(U\+40000\).* byte F1")):
        for encode in (lambda text: encoder.encode([text]), encoder.encode_long):
            with pytest.raises(ValueError, match=words):
                encode(text)


@pytest.mark.parametrize("bos, eos, ids", [(None, END, (-1, 596)), (END, END, (596, 596))])
def test_marks_may_be_missing_at_the_beginning_or_the_same(bos, eos, ids, tmp_path):
    folder = make_byte_level(tmp_path / "marks", bos=bos, eos=eos)
    encoder = load_encoder(folder)
    assert (encoder.bos_id, encoder.eos_id) == ids
    assert (encoder.bos_text, encoder.eos_text) == (bos or "", eos)


@pytest.mark.parametrize(
    "config, marks",
    [
        ({}, (BEGIN, END)),
        ({"eos_token": "<|eot_id|>"}, (BEGIN, END)),
        ({"eos_token": "<|eot_id|>", "added_tokens_decoder": {}}, ("", "<|eot_id|>")),
        ({"bos_token": END, "eos_token": "<|eot_id|>", "added_tokens_decoder": {}}, (END, "<|eot_id|>")),
    ],
)
def test_special_tokens_map_decides_where_it_does_in_transformers(config, marks, tmp_path):
    from transformers import AutoTokenizer

    folder = make_byte_level(tmp_path / "map")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": BEGIN}, "eos_token": END}))
    encoder, tokenizer = load_encoder(folder), AutoTokenizer.from_pretrained(folder)
    assert (encoder.bos_text, encoder.eos_text) == marks == (tokenizer.bos_token or "", tokenizer.eos_token)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"eos_token": None}, "names no eos_token"),
        ({"eos_token": ""}, "names no eos_token"),
        ({"eos_token": 7}, "eos_token is 7; a string"),
        ({"eos_token": {"special": True}}, "a string, or an object with"),
        ({"eos_token": "</s>"}, "has no token '</s>', the eos_token of its tokenizer_config.json"),
        ({"bos_token": "<s>"}, "has no token '<s>', the bos_token"),
        ({"eos_token": "Ġthe"}, "eos_token is 'Ġthe', a token that occurs in text; give a special token"),
        ({"bos_token": "!"}, "bos_token is '!', a token that occurs in text"),
    ],
)
def test_marks_that_cannot_be_used(config, words, folders, tmp_path):
    folder = changed(
        folders["llama3"], tmp_path / "wrong", lambda content: content.update(config), "tokenizer_config.json"
    )
    for load in (load_encoder, fingerprint):
        with pytest.raises(UserError, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def added(content: dict, text: str, index: int) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "content": text, "id": index})


def test_an_added_token_that_text_contains_too_stays_a_token_of_text(folders, tmp_path):
    """LLaMA-3's token "!" is often its pad_token, and transformers writes that as an added token."""
    from transformers import AutoTokenizer

    vocabulary = ByteLevelModel.read(folders["llama3"]).vocabulary
    change = lambda content: [added(content, text, vocabulary[text]) for text in ("!", "ing")]  # noqa: E731
    folder = changed(folders["llama3"], tmp_path / "added", change)
    text = "Is it raining! Sing, sing"
    ids = load_encoder(folder).encode([text])
    assert ids == load_encoder(folders["llama3"]).encode([text])
    assert load_encoder(folder).decode(ids[0]) == text
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["!", "ing"]) == [
        vocabulary["!"],
        vocabulary["ing"],
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: added(content, "<x>", 650), "'<x>' has the id 650, but transformers gives it 600"),
        (
            lambda content: content["model"]["vocab"].update({"Ġzzz": 700}),
            "has the id 595, but transformers gives it 596",
        ),
        (lambda content: added(content, "\ud800", 600), "needs a content, which is text"),
        (lambda content: added(content, "<x>", 10**18), "an id below 16,777,216"),
        (lambda content: content["model"]["vocab"].update({"Ġzzz": 2**32}), "no vocabulary of tokens with ids below"),
    ],
)
def test_ids_that_transformers_would_not_give(change, words, folders, tmp_path):
    """`tokenizers` numbers added tokens itself, so the model would be trained with another end of text."""
    folder = changed(folders["llama3"], tmp_path / "wrong", change)
    for load in (load_encoder, fingerprint):
        with pytest.raises(UserError, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def rewritten(folder: Path, target: Path, name: str, write) -> Path:
    shutil.copytree(folder, target)
    (target / name).write_bytes(write((target / name).read_bytes()))
    return target


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("tokenizer.json", lambda content: b"\xef\xbb\xbf" + content, "begins with a byte order mark"),
        ("tokenizer.json", lambda content: content.replace(b'"truncation": null', b'"truncation": NaN'), "NaN"),
        ("tokenizer.json", lambda content: content.replace(b'"1.0"', b'"2.0"'), "cannot be loaded .*version '2.0'"),
        ("tokenizer_config.json", lambda content: b"\xef\xbb\xbf" + content, "begins with a byte order mark"),
        ("tokenizer_config.json", lambda content: content.replace(b"4096", b"NaN"), "NaN is not a JSON number"),
        ("tokenizer_config.json", lambda content: content.replace(b"4096", b'"long"'), "a positive number is allowed"),
    ],
)
def test_files_that_transformers_could_not_read_later(name, write, words, folders, tmp_path):
    """Otherwise data would be prepared with them, and training would end where it begins."""
    folder = rewritten(folders["llama3"], tmp_path / "wrong", name, write)
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content["model"].update(ignore_merges="false"), 'string "false", expected a boolean'),
        (lambda content: content["model"].update(unk_token=7), "expected a string"),
        (lambda content: content["model"].update(dropout=False), "boolean `false`, expected f32"),
        (lambda content: content["added_tokens"][0].pop("lstrip"), "missing field `lstrip`"),
        (lambda content: content.update(normalizer={}), "cannot be loaded"),
        (lambda content: content.update(post_processor="none"), "cannot be loaded"),
        (lambda content: content.update(truncation={"max_length": -3}), "cannot be loaded"),
        (lambda content: content["model"]["merges"].append("t h"), 'the merge "t h" at rank .* is not written as'),
    ],
)
def test_values_that_tokenizers_does_not_read(change, words, folders, tmp_path):
    folder = changed(folders["llama3"], tmp_path / "wrong", change)
    for load in (load_encoder, fingerprint):
        with pytest.raises(UserError, match=words) as caught:
            load(folder)
        assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"chat_template": [{"name": "default"}]}, 'objects with "name" and "template", is allowed'),
        ({"extra_special_tokens": [7]}, "an object or a list of tokens is allowed"),
        ({"model_input_names": 7}, "a list of strings is allowed"),
    ],
)
def test_entries_with_which_transformers_fails(entry, words, folders, tmp_path):
    folder = changed(
        folders["llama3"], tmp_path / "wrong", lambda config: config.update(entry), "tokenizer_config.json"
    )
    with pytest.raises(UserError, match=words):
        load_encoder(folder)


def test_a_panic_of_tokenizers_is_an_error_as_others(folders, tmp_path):
    """Its BPE cuts the prefix off each token, and panics at one that is shorter."""
    change = lambda content: content["model"].update(continuing_subword_prefix="####")  # noqa: E731
    folder = changed(folders["llama3"], tmp_path / "panic", change)
    for load, words in (
        (load_encoder, 'continuing_subword_prefix is "####"; null is needed'),
        (load_tokenizer, "no tokenizer can be loaded .*out of bounds"),
        (lambda path: load_fast(path / "tokenizer.json"), "cannot be read .*out of bounds"),
        (lambda path: load_with_transformers(path, is_byte_level=True), "transformers cannot load .*out of bounds"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
    rows, left_out = compare([str(folder), str(folders["llama3"])], ["Hello"])
    assert len(rows) == 1 and "out of bounds" in left_out[0].error


def test_a_folder_that_transformers_5_has_saved(folders, tmp_path):
    """It names its plain class TokenizersBackend, and writes additional special tokens as a list of extra ones."""
    entries = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|eot_id|>", {"content": END}]}
    folder = changed(folders["llama3"], tmp_path / "v5", lambda one: one.update(entries), "tokenizer_config.json")
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    ids = tokenizer(DOCUMENTS[:60], add_special_tokens=False)["input_ids"]
    assert encoder.encode(DOCUMENTS[:60]) == ids and (tokenizer.bos_token, tokenizer.eos_token) == (BEGIN, END)
    assert tokenizer.additional_special_tokens == ["<|eot_id|>", END] and len(tokenizer) == encoder.vocab_size
    found = load_compared(folder)
    assert found.vocabulary_size == encoder.vocab_size and found.encode(DOCUMENTS[:60]) == ids


@pytest.mark.parametrize(
    "entries",
    [
        {"tokenizer_class": None},
        {"tokenizer_class": "ModelOfItsOwnTokenizer"},
        {"tokenizer_class": "OwnTokenizerFast", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizerFast"]}},
        {"tokenizer_class": "LlamaTokenizer"},
        # Then config.json names it.
        {"tokenizer_class": None, "model_max_length": 100},
    ],
)
def test_a_class_that_transformers_lacks_is_not_needed(entries, folders, tmp_path):
    folder = changed(folders["llama3"], tmp_path / "own", lambda one: one.update(entries), "tokenizer_config.json")
    (folder / "own.py").write_text("raise SystemExit('its code was run')")
    if "model_max_length" in entries:
        own = {"model_type": "llama", "tokenizer_class": "OwnTokenizer"}
        (folder / "config.json").write_text(json.dumps(own))
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    assert encoder.encode(DOCUMENTS[:20]) == tokenizer(DOCUMENTS[:20], add_special_tokens=False)["input_ids"]


def test_ids_with_holes_are_those_of_transformers(folders, tmp_path):
    from transformers import AutoTokenizer

    def change(content):
        for number, token in enumerate(content["added_tokens"]):
            token["id"] = content["model"]["vocab"][token["content"]] = 700 + 2 * number

    folder = changed(folders["llama3"], tmp_path / "holes", change)
    encoder, fast = load_encoder(folder), AutoTokenizer.from_pretrained(folder)
    assert (encoder.bos_id, encoder.eos_id) == (fast.bos_token_id, fast.eos_token_id) == (700, 702)
    assert encoder.decode(encoder.encode([CHINESE])[0]) == CHINESE


def test_a_space_before_every_text_is_refused(folders, tmp_path):
    folder = changed(
        folders["gpt2"],
        tmp_path / "space",
        lambda config: config.update(add_prefix_space=True),
        "tokenizer_config.json",
    )
    with pytest.raises(UserError, match="tokenizer_config.json: add_prefix_space puts a space before every text"):
        load_encoder(folder)


def test_the_fingerprint_is_that_of_the_ids_not_of_the_layout(folders, tmp_path):
    folder = folders["llama3"]
    expected = fingerprint(folder)
    assert load_encoder(folder).fingerprint == expected and len(expected) == 64

    def rearrange(content):
        content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
        content["decoder"] = None

    assert fingerprint(changed(folder, tmp_path / "same", rearrange)) == expected
    assert (
        fingerprint(changed(folder, tmp_path / "other", lambda content: content["model"]["merges"].pop())) != expected
    )
    digits = sequence(split(r"\p{N}"), *PRE_TOKENIZERS["llama3"]["pretokenizers"][:1])
    assert (
        fingerprint(changed(folder, tmp_path / "split", lambda content: content.update(pre_tokenizer=digits)))
        != expected
    )
    marks = changed(
        folder, tmp_path / "marks", lambda content: content.update(eos_token="<|eot_id|>"), "tokenizer_config.json"
    )
    assert fingerprint(marks) != expected
    # A file that has changed is read again.
    shutil.copy(folder / "tokenizer_config.json", marks)
    assert fingerprint(marks) == expected


def tiktoken_lines(folder: Path) -> bytes:
    ranks = ByteLevelModel.read(folder).vocabulary
    lines = (base64.b64encode(bytes_of(token)) + b" %d\n" % rank for token, rank in ranks.items())
    return b"".join(lines)


def test_what_lies_beside_tokenizer_json(folders, tokenizer_dir, tmp_path):
    folder = shutil.copytree(folders["llama3"], tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(tiktoken_lines(folder))
    assert type(load_encoder(folder)) is ByteLevelEncoder and fingerprint(folder) == fingerprint(folders["llama3"])
    (folder / "tokenizer.model").write_bytes(tiktoken_lines(folders["gpt2"]))
    with pytest.raises(UserError, match="are of different tokenizers: .* remove the file"):
        load_encoder(folder)
    (folder / "tokenizer.model").write_bytes(b"GGUF\3\0\0\0")
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(UserError, match="is a model in GGUF.*remove it"):
            load(folder)
    assert "tokenizer.model" not in load_encoder(folders["gpt2"]).files
    # A SentencePiece model decides, as before.
    assert kind_of(tokenizer_dir).encoder is SentencePieceEncoder


def test_folders_of_neither_kind(folders, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer.model .* and no tokenizer.json .*; copy"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        load_encoder(tmp_path / "missing")
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(folders["llama3"]))
    with pytest.raises(UserError, match="tiktoken's format; convert it .*convert_tiktoken"):
        load_encoder(tmp_path)


def test_a_converted_sentencepiece_model_needs_its_original(tokenizer_dir, tmp_path):
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="was converted from a SentencePiece model; copy its tokenizer.model"):
        load_encoder(tmp_path)


@pytest.mark.slow
def test_llama3(tmp_path):
    folder = make_llama3(tmp_path / "llama3")
    encoder = load_encoder(folder)
    assert (encoder.bos_id, encoder.eos_id, encoder.vocab_size) == (128000, 128001, 128256)
    assert encoder.encode(["Hello world", "人工智能"]) == [[9906, 1917], [17792, 49792, 118034]]
    text = "\n".join([*english_documents()[:400], CHINESE * 100])
    (whole,) = encoder.encode([text])
    assert encoder.decode(whole) == text
    assert ByteLevelEncoder(folder, 500).encode_long(text).tolist() == whole
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from colossal_llama2.encoding.byte_level_cuts import LLAMA_3
    from tests.byte_level import llama3_package

    ranks = load_tiktoken_bpe(str(llama3_package() / "tokenizer.model"))
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA_3, mergeable_ranks=ranks, special_tokens={})
    assert reference.encode_ordinary(text) == whole
