"""Byte-level BPE tokenizers for tests: tiny ones trained on text that Python includes, and LLaMA-3's from a package."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from colossal_llama2.encoding import byte_level_cuts
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, spelled
from tests.tiny import CHINESE, english_documents

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
OTHER_SPECIALS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def split(regex: str, behavior: str = "Isolated") -> dict[str, Any]:
    """The step that divides a text at the matches of a pattern."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    """The pre-tokenizer of several steps, the last of which spells bytes."""
    return {"type": "Sequence", "pretokenizers": [*steps, {**BYTE_LEVEL, "use_regex": False}]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt2": {**BYTE_LEVEL, "use_regex": True},
    "smollm2": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    },
    "llama3": sequence(split(byte_level_cuts.LLAMA_3)),
    "qwen2": sequence(split(byte_level_cuts.QWEN_2)),
    "llama4": sequence(split(byte_level_cuts.LLAMA_4)),
    "deepseek": sequence(*map(split, (*byte_level_cuts.OF_ONE_KIND[::2], byte_level_cuts.DEEPSEEK_3))),
}


def make_byte_level(
    folder: Path,
    kind: str = "llama3",
    *,
    vocab_size: int = 600,
    bos: str | None = BEGIN,
    eos: str | None = END,
    specials_first: bool = False,
    missing: bytes = b"",
    unk: str | None = None,
) -> Path:
    """Write a tokenizer of `vocab_size` tokens, trained on English and Chinese, into a new folder.

    Args:
        specials_first: special tokens have the lowest ids, as in SmolLM2, otherwise the highest, as in LLaMA-3.
        missing: bytes without a token.
        unk: a special token to name in the configuration.
    """
    settings = json.loads(_trained(kind, vocab_size - 5))
    vocabulary = settings["model"]["vocab"]
    for byte in missing:
        del vocabulary[bytes([byte]).decode("latin-1") if byte > 0xA0 else chr(0x100 + byte)]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    specials = list(dict.fromkeys([BEGIN, END, *OTHER_SPECIALS]))
    ordered = [*specials, *tokens] if specials_first else [*tokens, *specials]
    ids = {token: index for index, token in enumerate(ordered)}
    # SmolLM2's special tokens are in its vocabulary, LLaMA-3's are not.
    settings["model"]["vocab"] = ids if specials_first else {token: ids[token] for token in tokens}
    settings["model"]["ignore_merges"] = kind == "llama3"
    settings["decoder"] = {**BYTE_LEVEL, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    settings["added_tokens"] = [{"id": ids[text], "content": text, "special": True, **flags} for text in specials]
    if kind == "llama3" and bos:
        # As in Meta's file: transformers begins a text with bos_token.
        special = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        settings["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False))
    config = {
        "bos_token": bos,
        "eos_token": {"content": eos, "__type": "AddedToken"} if eos else None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"unk_token": unk} if unk else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def extend(source: Path, folder: Path, pieces: Sequence[str], *, added: Sequence[str] = ()) -> Path:
    """Write a tokenizer with new pieces, each merged from the left, behind all ids of `source`; then added tokens."""
    model = ByteLevelModel.read(source)
    plain = model.plain_tokenizer()
    settings = json.loads((source / "tokenizer.json").read_text())
    vocabulary, merges = settings["model"]["vocab"], settings["model"]["merges"]
    size = model.size
    # Otherwise tokenizers would give them ids behind the new pieces.
    vocabulary.update(model.added)
    for piece in pieces:
        left, *others = [token.value for token in plain.model.tokenize(spelled(piece))]
        for right in others:
            if left + right not in vocabulary:
                vocabulary[left + right] = size
                merges.append([left, right])
                size += 1
            left += right
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    settings["added_tokens"] += [{"id": size + number, "content": text, **flags} for number, text in enumerate(added)]
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


@lru_cache
def _trained(kind: str, vocab_size: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    plain = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    tokenizer.pre_tokenizer = Tokenizer.from_str(
        json.dumps({**plain, "pre_tokenizer": PRE_TOKENIZERS[kind]})
    ).pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*english_documents()[:400], *[CHINESE] * 20], trainer)
    return tokenizer.to_str()


def llama3_package() -> Path:
    """The folder of LLaMA-3's tiktoken file in the package llama-models. The test is skipped without the package."""
    found = importlib.util.find_spec("llama_models")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llama-models (requirements-dev.txt)")
    return Path(found.submodule_search_locations[0]) / "llama3"


def make_llama3(folder: Path) -> Path:
    """Write LLaMA-3's tokenizer as Hugging Face has it: 128,000 tokens, and 256 special tokens behind them."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    specials = [BEGIN, END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"]
    specials += ["<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    specials += ["<|python_tag|>", "<|image|>"]
    specials += [f"<|reserved_special_token_{number}|>" for number in range(2, 2 + 256 - len(specials))]
    folder.mkdir(parents=True)
    source = shutil.copy(llama3_package() / "tokenizer.model", folder / "ranks")
    converter = TikTokenConverter(str(source), byte_level_cuts.LLAMA_3, additional_special_tokens=specials)
    converter.converted().save(str(folder / "tokenizer.json"))
    (folder / "ranks").unlink()
    config = {"bos_token": BEGIN, "eos_token": END, "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
