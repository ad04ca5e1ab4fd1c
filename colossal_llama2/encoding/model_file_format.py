"""The format of a file named tokenizer.model: SentencePiece's, tiktoken's, or a model in GGUF."""

import re
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import is_regular

# A line of a tiktoken file: the bytes of a token in base64, and its rank.
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
MOST_LINE_BYTES = 4096
GGUF_START = b"GGUF"


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins like one of tiktoken, the format of LLaMA-3's original download."""
    return TIKTOKEN_LINE.match(_start_of(path)) is not None


def is_gguf(path: Path) -> bool:
    """Whether a file begins like GGUF, which transformers saves as tokenizer.model if a tokenizer comes from one."""
    return _start_of(path).startswith(GGUF_START)


def refuse_gguf(path: Path) -> None:
    """Raise UserError for such a file: it is a whole model, and would be copied with every other one."""
    if is_gguf(path):
        raise UserError(f"{path} is a model in GGUF, which transformers has saved under this name; remove it")


def _start_of(path: Path) -> bytes:
    if not is_regular(path):
        return b""
    with path.open("rb") as file:
        return file.read(MOST_LINE_BYTES)
