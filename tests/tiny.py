"""A small LLaMA tokenizer and model, made from text that Python itself carries. Nothing is downloaded."""

import pydoc_data.topics
from functools import lru_cache
from pathlib import Path
from typing import List

CHINESE = "明月松间照，清泉石上流。人工智能正在改变世界。你好，世界！今天天气很好，我们去公园散步吧。"


@lru_cache
def english_documents() -> List[str]:
    """Paragraphs of CPython's own documentation, more than 2,000 of them."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 20]


def make_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """Train a SentencePiece BPE with LLaMA's settings on English and write a Hugging Face folder, as LLaMA-2 ships it."""
    import io

    import sentencepiece
    from transformers import LlamaTokenizerFast

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_documents()[:2000]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizerFast(
        vocab_file=str(folder / "tokenizer.model"),
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=4096,
        padding_side="right",
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_model(folder: Path, tokenizer_dir: Path, *, tie: bool = False, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a 2-layer LLaMA with random weights and the tokenizer of `tokenizer_dir` to `folder` (may be the same)."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        torch_dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if folder != tokenizer_dir:
        tokenizer.save_pretrained(folder)
    return folder
