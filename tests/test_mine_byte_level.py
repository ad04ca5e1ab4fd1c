"""Mining for a byte-level BPE continues its merges: every new token is reached, and the list is read back as it is."""

import dataclasses
import json
import random
import re
import shutil

import pytest

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of, spelled
from colossal_llama2.encoding.byte_level_reach import unreached_tokens
from colossal_llama2.encoding.byte_level_tokens import characters_in, extended, text_of
from colossal_llama2.tokenizer import mine_byte_level, mine_tokens
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from tests.byte_level import make_byte_level
from tests.test_extend_byte_level import with_every_split
from tests.test_init_tokenizer import report_of
from tests.test_mine_tokens import chinese, mine, words_for, write_corpus  # noqa: F401 - a fixture


@pytest.fixture(scope="module", params=["llama3", "smollm2"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / request.param
    if request.param == "llama3":
        return with_every_split(make_byte_level(folder))
    return make_byte_level(folder, "smollm2", specials_first=True, missing=b"\xf1\x07")


@pytest.fixture(scope="module")
def mined(chinese, base):  # noqa: F811
    return mine(chinese, base, curve_points=5)


def test_every_prefix_is_reached_without_closure(mined, base):
    model = ByteLevelModel.read(base)
    assert len(mined.pieces) == len(set(mined.pieces)) == 600 and mined.is_byte_level and mined.unreachable == 0
    assert not model.vocabulary.keys() & set(mined.pieces)
    for size in (1, 40, 333, 600):
        assert unreached_tokens(extended(model, mined.pieces[:size]), mined.pieces[:size]) == []
    rates = [rate for _, rate in mined.curve]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.6 * rates[0]
    texts = [text for text in map(text_of, mined.pieces) if text is not None]
    assert all(re.fullmatch(f"[{mine_tokens.SCRIPTS['han']}]{{1,8}}", text) for text in texts)
    assert {"文件", "设置", "扩展"} <= set(texts) and len(texts) < 600


def test_init_tokenizer_reads_the_list_as_it_is(base, chinese, mined, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "pieces.jsonl"
    mine_tokens.main(list(map(str, words_for(chinese, base, output, num_new_tokens=600, min_count=2))))
    assert capsys.readouterr().out.splitlines()[-1] == "requested 600, mined 600"
    records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert {key for record in records for key in record} == {"piece", "bytes"}
    expand_tokenizer(ExtensionSettings(base, tmp_path / "out", output))
    report = report_of(tmp_path / "out")
    assert (report["added"], report["added_by_closure"], report["dropped"], report["unreachable"]) == (600, 0, 0, 0)
    model = ByteLevelModel.read(tmp_path / "out")
    assert list(model.vocabulary)[-600:] == mined.pieces
    # The printed figure is that of the written tokenizer.
    texts = ["设置文件", "扩展"]
    expected = sum(len(model.plain_tokenizer().encode(text).ids) for text in texts) / 6
    assert mine_byte_level.tokens_per_character(ByteLevelModel.read(base), mined.pieces, texts) == expected


def test_any_script_mines_words_with_their_space(base, tmp_path):
    words = "Grundstück Verkehrsüberwachung Straße wählen größer".split()
    texts = [" ".join(random.Random(number).choices(words, k=12)) for number in range(200)]
    found = mine(write_corpus(tmp_path / "de", texts), base, script="any", max_piece_length=12)
    pieces = {text_of(token) for token in found.pieces}
    assert {" Straße", " größer"} <= pieces and not any(text and "▁" in text for text in pieces)
    assert max(map(characters_in, map(bytes_of, found.pieces))) <= 12
    short = mine(tmp_path / "de", base, script="any", max_piece_length=3).pieces
    assert short and max(map(characters_in, map(bytes_of, short))) <= 3
    written = {mine_byte_level.record_of(token).get("piece") for token in found.pieces}
    assert "▁Straße" in written


def test_rare_and_unspelled_text_makes_no_token(base, tmp_path):
    texts = ["甲乙" * 3 + str(number) for number in range(60)] + ["丙丁", "\U00040000" * 60]
    found = mine(write_corpus(tmp_path / "zh", texts), base, script="any")
    joined = b"".join(map(bytes_of, found.pieces))
    assert spelled("甲乙") in found.pieces and "丙".encode() not in joined
    # SmolLM2's kind has no token for the first byte of U+40000.
    assert "smollm2" not in str(base) or b"\xf1" not in joined


def test_no_token_contains_an_added_token_which_init_tokenizer_refuses(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    size = ByteLevelModel.read(base).size
    content["added_tokens"].append({**content["added_tokens"][0], "content": "用户", "id": size, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    texts = [f"用户说你好吗, 今天{number}天气" for number in range(100)]
    found = mine(write_corpus(tmp_path / "zh", texts), folder)
    joined = [bytes_of(token) for token in found.pieces]
    assert spelled("天气") in found.pieces and not any("用户".encode() in token for token in joined)
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(mine_byte_level.record_of(token)) + "\n" for token in found.pieces)
    )
    expand_tokenizer(ExtensionSettings(folder, tmp_path / "out", tmp_path / "p.jsonl"))
    assert report_of(tmp_path / "out")["added"] == len(found.pieces)


def test_the_result_is_the_same_again(mined, chinese, base):  # noqa: F811
    again = mine(chinese, base, curve_points=5)
    assert dataclasses.replace(again) == mined
