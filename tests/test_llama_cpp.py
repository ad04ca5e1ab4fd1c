"""llama.cpp encodes with an extended byte-level BPE as its tokenizer.json does, and renders templates as transformers.

Needs xllamacpp and gguf. `python -m tests.clients` converts and asks whole models.

pip install --target ../llama-cpp --no-deps -r requirements-llama-cpp.txt
PYTHONPATH=../llama-cpp python -m pytest tests/test_llama_cpp.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from colossal_llama2.chat.templates import CHATML_TEMPLATE, LLAMA2_TEMPLATE
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from tests.byte_level import BEGIN, END, make_byte_level
from tests.clients.ask_llama_cpp import Server
from tests.clients.models import OWN_TEMPLATE
from tests.test_init_tokenizer import report_of
from tests.tiny import CHINESE, english_documents

# What llama.cpp calls the pre-tokenizers of LLaMA-3 and SmolLM2.
PRE_TOKENIZERS = {"llama3": "llama-bpe", "smollm2": "smollm"}
NORMAL, CONTROL = 1, 3
HIDDEN = 32
LINES = [
    {"piece": "人工智能"},
    {"bytes": "e88b"},
    {"bytes": "2ce4"},
    {"bytes": "0ae4"},
    {"piece": "▁γλώσσα"},
    {"piece": "ελληνική"},
    {"piece": "กิน"},
    {"piece": "ข้าว"},
    {"piece": "你好，"},
    {"piece": "é"},
    {"piece": "🤖"},
]
TEXTS = [
    "人工智能 and ελληνική γλώσσα",
    "กินข้าว, 苹果,䷀ 12345\n\n\n你好，世界!!",
    "naïve 🤖🤖 é",
    "  it's  DON'T\t",
    CHINESE,
]


def write_gguf(folder: Path, pre_tokenizer: str, path: Path, *, template: str | None = None) -> None:
    """A LLaMA of one tiny layer with zero weights, and the tokenizer of a folder."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    model = ByteLevelModel.read(folder)
    tokens = {index: token for token, index in (*model.vocabulary.items(), *model.added.items())}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN)
    writer.add_vocab_size(model.size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([tokens[index] for index in range(model.size)])
    special = set(model.added.values())
    writer.add_token_types([CONTROL if index in special else NORMAL for index in range(model.size)])
    writer.add_token_merges([" ".join(pair) for pair in model.merges])
    writer.add_bos_token_id(model.added[BEGIN])
    writer.add_eos_token_id(model.added[END])
    if template is not None:
        writer.add_chat_template(template)
    for name, shape in {
        "token_embd": (model.size, HIDDEN),
        "output_norm": (HIDDEN,),
        **dict.fromkeys((f"blk.0.{one}_norm" for one in ("attn", "ffn")), (HIDDEN,)),
        **dict.fromkeys((f"blk.0.attn_{one}" for one in ("q", "k", "v", "output")), (HIDDEN, HIDDEN)),
        **dict.fromkeys((f"blk.0.ffn_{one}" for one in ("gate", "up", "down")), (HIDDEN, HIDDEN)),
    }.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: Path) -> Server:
    """The server that xllamacpp runs in this process. The test is skipped without the package."""
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, a build of llama.cpp")
    return Server(path)


def ids_of_llama_cpp(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens."""
    server = serve(path)
    plain = {"add_special": False, "parse_special": False}
    return [server.post("tokenize", content=text, **plain)["tokens"] for text in texts]


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_llama_cpp_gives_the_same_ids(kind, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, a build of llama.cpp")
    source = make_byte_level(tmp_path / "source", kind, specials_first=kind == "smollm2")
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    expand_tokenizer(ExtensionSettings(source, tmp_path / "out", tmp_path / "pieces.jsonl"))
    model = ByteLevelModel.read(tmp_path / "out")
    assert report_of(tmp_path / "out")["added"] > 8
    texts = [*TEXTS, *english_documents()[:50]]
    write_gguf(tmp_path / "out", PRE_TOKENIZERS[kind], tmp_path / "model.gguf")
    encoded = model.plain_tokenizer().encode_batch(texts, add_special_tokens=False)
    new = set(range(ByteLevelModel.read(source).size, model.size))
    assert sum(not new.isdisjoint(one.ids) for one in encoded) > 3
    assert ids_of_llama_cpp(tmp_path / "model.gguf", texts) == [one.ids for one in encoded]


TEMPLATES = {
    "colossal": chat_template(prefix_after_marks=True, has_dummy_prefix=False),
    "llama2": LLAMA2_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
    "own": OWN_TEMPLATE,
}
TALK = [
    {"role": "system", "content": "Be brief. 简短。"},
    {"role": "user", "content": "你好, who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_renders_the_templates_with_their_markers(name, tmp_path):
    from transformers import AutoTokenizer

    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, a build of llama.cpp")
    folder = make_byte_level(tmp_path / "tokenizer")
    write_gguf(folder, "llama-bpe", tmp_path / "model.gguf", template=TEMPLATES[name])
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        TALK, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    rendered = serve(tmp_path / "model.gguf").post("apply-template", messages=TALK)["prompt"]
    # It leaves out a first bos_token, which it adds to the ids.
    assert rendered.removeprefix(BEGIN) == expected.removeprefix(BEGIN)
    assert "generation" in TEMPLATES[name]
