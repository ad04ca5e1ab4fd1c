"""Train a LLaMA-2 tokenizer from text alone, for rehearsals and tests without LLaMA-2's own tokenizer."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE, MODEL_FILE, SPECIAL_TOKENS_FILE
from colossal_llama2.encoding.transformers_tokenizer import PADDING_SIDE
from colossal_llama2.storage.files import write_json
from colossal_llama2.storage.unpickling_guard import unpickling_refused


def train_vocabulary(lines: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE with the settings recorded in LLaMA-2's tokenizer.model. Returns the serialized model.

    Args:
        lines: text without line breaks.
        vocab_size: number of pieces, <unk>, <s>, </s> and 256 bytes included.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(model: bytes, folder: Path, *, model_max_length: int = 4096) -> None:
    """Write a SentencePiece model as the four files that LLaMA-2 ships, with its settings, into an existing folder."""
    (folder / MODEL_FILE).write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config: dict[str, Any] = {
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": model_max_length,
        "pad_token": None,
        "padding_side": PADDING_SIDE,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    # Not written by transformers, which would add "add_prefix_space": null and read that as no leading "▁". Without the
    # key, as in LLaMA-2's files, it adds the "▁" as SentencePiece does.
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / SPECIAL_TOKENS_FILE, special)

    from transformers import AutoTokenizer

    with unpickling_refused():
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
    tokenizer.backend_tokenizer.save(str(folder / FAST_FILE))
