"""A small LLaMA tokenizer and model, made from text that Python includes. Nothing is downloaded."""

import json
import pydoc_data.topics
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

CHINESE = "明月松间照，清泉石上流。人工智能正在改变世界。你好，世界！今天天气很好，我们去公园散步吧。"
# Scaled positions are those of samples over 16 tokens, far below what LLaMA-3.1's are for.
LLAMA_3: dict[str, Any] = {
    "head_dim": 32,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@lru_cache
def english_documents() -> list[str]:
    """Paragraphs of CPython's own documentation, more than 2,000 of them."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 20]


def make_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """Train a SentencePiece BPE with LLaMA's settings on English and write a folder like that of LLaMA-2."""
    from colossal_llama2.encoding.from_text import train_vocabulary, write_tokenizer

    folder.mkdir(parents=True)
    lines = (line for document in english_documents() for line in document.splitlines() if line.strip())
    write_tokenizer(train_vocabulary(lines, vocab_size), folder)
    return folder


def make_model(
    folder: Path,
    tokenizer_dir: Path,
    *,
    tie: bool = False,
    heads: int = 4,
    head_size: int = 16,
    layers: int = 2,
    dtype: str = "float32",
    biases: bool = False,
    like_llama3: bool = False,
) -> Path:
    """Write a LLaMA with random weights and the tokenizer of `tokenizer_dir` to `folder` (may be the same).

    Args:
        like_llama3: half as many key-value heads, heads of another size than hidden_size / heads, llama3's positions.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        **(LLAMA_3 | {"num_key_value_heads": heads // 2} if like_llama3 else {"num_key_value_heads": heads}),
        vocab_size=len(tokenizer),
        hidden_size=head_size * heads,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        torch_dtype=dtype,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    for name, param in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(param, std=0.02)
    model.save_pretrained(folder)
    with_older_names(folder / "config.json")
    if folder != tokenizer_dir:
        for path in tokenizer_dir.iterdir():
            shutil.copyfile(path, folder / path.name)
    return folder


def with_new_rows(model_dir: Path, *, first: int) -> Path:
    """The folder of a model, whose config.json now lists the rows from `first` on as those of init_model.py."""
    config = json.loads((model_dir / "config.json").read_text())
    config["initialized_rows"] = [[first, config["vocab_size"]]]
    (model_dir / "config.json").write_text(json.dumps(config, indent=2))
    return model_dir


def has_slow_tokenizer() -> bool:
    """Whether this transformers has a slow LLaMA tokenizer, in Python and SentencePiece: version 5 has none."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5


def rope_of(config) -> tuple:
    """rope_theta and rope_scaling of a LlamaConfig; transformers 5 has one attribute for both."""
    if not hasattr(config, "rope_parameters"):
        return config.rope_theta, config.rope_scaling
    scaling = dict(config.rope_parameters)
    theta = scaling.pop("rope_theta")
    return theta, None if scaling == {"rope_type": "default"} else scaling


def with_older_names(config_json: Path) -> None:
    """Write a config as transformers 4 does, and as LLaMA-2's is, where transformers 5 has written it."""
    config = json.loads(config_json.read_text())
    if "rope_parameters" in config:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    config_json.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
