"""LLaMA-3's tiktoken file as a Hugging Face folder: the same ids, and one line for a file that is not of its kind."""

import base64
import json
import shutil
import subprocess
import sys

import pytest

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of, spelled_bytes
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.tokenizer import convert_tiktoken
from colossal_llama2.tokenizer.convert_tiktoken import ConversionSettings, convert, ids_by_rank, special_names
from tests.byte_level import BEGIN, llama3_package, make_byte_level, make_llama3
from tests.conftest import ROOT
from tests.plain_bpe import LLAMA_3
from tests.tiny import CHINESE, english_documents

TEXTS = [*english_documents()[:100], CHINESE, "  naïve 🤖\n\n 12345", "I'LL don't", f"Say {BEGIN}", "\u3000\u00a0 x"]


def line_of(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[bytes]:
    """The tokens of a small LLaMA-3, in order of rank: single bytes first."""
    model = ByteLevelModel.read(make_byte_level(tmp_path_factory.mktemp("ranks") / "llama3"))
    return [bytes_of(token) for token in model.vocabulary]


@pytest.fixture
def file(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_tiktoken, "LLAMA_3_RANKS", len(ranks))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(line_of(token, rank) for rank, token in enumerate(ranks)))
    return path


def test_ids_are_those_of_tiktoken(file, ranks, tmp_path, capsys):
    from transformers import AutoTokenizer

    tiktoken = pytest.importorskip("tiktoken")
    convert(ConversionSettings(str(file), str(tmp_path / "out"), "3.1"))
    assert "256 special tokens" in capsys.readouterr().out
    by_token = {token: rank for rank, token in enumerate(ranks)}
    client = tiktoken.Encoding("small", pat_str=LLAMA_3, mergeable_ranks=by_token, special_tokens={})
    expected = [client.encode_ordinary(text) for text in TEXTS]
    assert [ids_by_rank(text, by_token) for text in TEXTS] == expected
    model, fast = ByteLevelModel.read(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = model.plain_tokenizer()
    assert [plain.encode(text).ids for text in TEXTS] == expected
    assert fast(TEXTS[:-2], add_special_tokens=False)["input_ids"] == expected[:-2]
    assert fast("a")["input_ids"] == [len(ranks), by_token[b"a"]] and fast.decode(expected[0]) == TEXTS[0]
    assert (fast.bos_token, fast.eos_token, len(fast)) == (BEGIN, "<|end_of_text|>", len(ranks) + 256)


def test_line_ends_of_windows_and_blank_lines_change_nothing(file, ranks, tmp_path):
    """As tiktoken reads them; the file may then lie beside the folder's tokenizer.json."""
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    convert(ConversionSettings(str(file), str(tmp_path / "out"), "3.1"))
    shutil.copy(file, tmp_path / "out")
    assert load_encoder(tmp_path / "out").vocab_size == len(ranks) + 256


def test_special_tokens_are_those_that_meta_lists():
    old, new = special_names("3.0"), special_names("3.1")
    assert len(old) == len(set(old)) == len(new) == len(set(new)) == 256
    assert old[:2] == new[:2] and old[9] == new[9] == "<|eot_id|>" and old[6] == new[6] == "<|start_header_id|>"
    assert (old[10], old[-1]) == ("<|reserved_special_token_5|>", "<|reserved_special_token_250|>")
    assert (new[8], new[10], new[11]) == ("<|eom_id|>", "<|python_tag|>", "<|reserved_special_token_3|>")
    assert (new[4], new[-1]) == ("<|finetune_right_pad_id|>", "<|reserved_special_token_247|>")


@pytest.mark.parametrize(
    "content, words",
    [
        (
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            "not in tiktoken's format.*SentencePiece model.*no conversion",
        ),
        (b"GGUF1234", "is a model in GGUF"),
        (b"", "is empty"),
        (b"IQ== 0\nI= 1\n", "tokenizer.model:2: not a token in base64 and a rank"),
        (b"IQ== 0\nIg== one\n", "tokenizer.model:2: not a token in base64"),
        (b"IQ== 0\nIg== 2\n", "tokenizer.model:2: a token with the rank 2; a new token with the rank 1 must follow"),
        (b"IQ== 0\nIQ== 1\n", "tokenizer.model:2: a repeated token"),
        (b"IQ== 0\nIg== 1\n", "has 2 tokens; LLaMA-3's has"),
    ],
)
def test_other_files_are_refused(file, tmp_path, content, words):
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        convert(ConversionSettings(str(file), str(tmp_path / "out"), "3.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_other_paths_are_refused(file, tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        convert(ConversionSettings(str(tmp_path), str(tmp_path / "out"), "3.1"))
    with pytest.raises(UserError, match="already exists; give a new folder"):
        convert(ConversionSettings(str(file), str(tmp_path), "3.1"))


def test_other_ids_are_found(file, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_tiktoken, "merges_into", lambda tokens, ids: [("a", "n")])
    with pytest.raises(RunError, match="by tokenizer.json, and .* by its ranks; nothing was kept"):
        convert(ConversionSettings(str(file), str(tmp_path / "out"), "3.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.slow
def test_llama_3_as_transformers_converts_it(tmp_path):
    source = shutil.copy(llama3_package() / "tokenizer.model", tmp_path)
    command = [sys.executable, "-m", "colossal_llama2.tokenizer.convert_tiktoken", "--source_file", str(source)]
    done = subprocess.run([*command, "--target_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "128,000 tokens and 256 special tokens" in done.stdout, done.stderr
    ours, theirs = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (tmp_path / "out", make_llama3(tmp_path / "x"))
    )
    assert ours["model"] == {**theirs["model"], "vocab": ours["model"]["vocab"]}
    vocabulary = ours["model"]["vocab"]
    assert {token: theirs["model"]["vocab"][token] for token in vocabulary} == vocabulary
    assert vocabulary[spelled_bytes(b"!")] == 0
