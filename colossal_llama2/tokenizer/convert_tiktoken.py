"""Convert LLaMA-3's original tokenizer.model, a list of ranks as tiktoken reads it, to a Hugging Face folder.

    python -m colossal_llama2.tokenizer.convert_tiktoken --source_file Meta-Llama-3-8B/original/tokenizer.model \\
        --target_dir llama-3-tokenizer

Each line of the file holds a token's bytes in base64 and its rank, which is its id. The file holds neither the
pre-tokenizer nor the special tokens; they are those of LLaMA-3 (`llama_models/llama3/tokenizer.py` in Meta's package
llama-models). tiktoken merges two neighbours whenever their concatenation is a token, lowest rank first, so every split
of a token into two others is a merge. Before the folder gets its name, its ids are compared with those of a BPE by
ranks that works as tiktoken does.
"""

import base64
import binascii
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.byte_level_cuts import LLAMA_3
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, file_content, spelled_bytes
from colossal_llama2.encoding.byte_level_tokens import merges_into, text_of
from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE, SPECIAL_TOKENS_FILE
from colossal_llama2.encoding.model_file_format import is_gguf, is_tiktoken
from colossal_llama2.encoding.parity import texts_of_old_pieces
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import check_can_create, temporary_folder, write_json
from colossal_llama2.storage.input_files import MIB
from colossal_llama2.storage.json_input import read_regular
from colossal_llama2.storage.publishing import claimed, publish, remove_leftovers
from colossal_llama2.terminal_text import show_line

LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")
MAX_FILE_BYTES = 64 * MIB
LLAMA_3_RANKS = 128_000
NUM_SPECIAL = 256
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
RESERVED = "<|reserved_special_token_{}|>"
# The names of the first special tokens, and the longest text. None is the next reserved token; so are all that follow.
VERSIONS: dict[str, tuple[tuple[str | None, ...], int]] = {
    "3.0": (
        (BEGIN, END, None, None, None, None, "<|start_header_id|>", "<|end_header_id|>", None, "<|eot_id|>"),
        8_192,
    ),
    "3.1": (
        (BEGIN, END, None, None, "<|finetune_right_pad_id|>", None, "<|start_header_id|>", "<|end_header_id|>")
        + ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        131_072,
    ),
}


@dataclass(frozen=True)
class ConversionSettings:
    """The flags of convert_tiktoken.py."""

    source_file: str
    target_dir: str
    special_tokens: str


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's), convert and check."""
    args = tokenizer_flags.convert_tiktoken_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("convert_tiktoken.py"):
        convert(ConversionSettings(**vars(args)))


def convert(settings: ConversionSettings) -> None:
    """Write the tokenizer of a tiktoken file as a Hugging Face folder, completely or not at all.

    Raises:
        UserError: the file is not LLaMA-3's list of ranks, or the target exists.
        RunError: the ids of the folder are not those of the ranks.
    """
    target = Path(os.path.realpath(settings.target_dir))
    if os.path.lexists(target):
        raise UserError(f"--target_dir {target} already exists; give a new folder")
    check_can_create(target, "--target_dir")
    ranks = read_ranks(Path(settings.source_file))
    remove_leftovers(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder, claimed(folder):
        _write(ranks, folder, settings.special_tokens)
        compared = _check(ranks, ByteLevelModel.read(folder))
        publish(folder, target, replace=False)
    show_line(f"{len(ranks):,} tokens and {NUM_SPECIAL} special tokens; {compared:,} texts give the ids of the ranks")
    show_line(f"written to {target}")


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token of a file, in order. Raises UserError unless it is LLaMA-3's kind."""
    if not path.is_file():
        raise UserError(f"--source_file {path} is not a file; give the tokenizer.model of LLaMA-3's original download")
    if is_gguf(path):
        raise UserError(f"--source_file {path} is a model in GGUF; give LLaMA-3's original tokenizer.model")
    if not is_tiktoken(path):
        raise UserError(
            f"--source_file {path} is not in tiktoken's format, lines of base64 and a rank; a SentencePiece model, "
            "such as LLaMA-2's, needs no conversion"
        )
    try:
        content = read_regular(path, most_bytes=MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"--source_file {path} cannot be read ({error}); copy it again")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        # As tiktoken reads it.
        if not line:
            continue
        found = LINE.fullmatch(line)
        try:
            token = base64.b64decode(found[1], validate=True) if found else b""
        except binascii.Error:
            token = b""
        if not found or not token:
            raise UserError(f"{path}:{number}: not a token in base64 and a rank; copy the file again")
        if int(found[2]) != len(ranks) or token in ranks:
            raise UserError(
                f"{path}:{number}: {'a repeated token' if token in ranks else 'a token'} with the rank "
                f"{int(found[2])}; a new token with the rank {len(ranks)} must follow here, so copy the file again"
            )
        ranks[token] = len(ranks)
    if len(ranks) != LLAMA_3_RANKS or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(
            f"--source_file {path} has {len(ranks):,} tokens; LLaMA-3's has {LLAMA_3_RANKS:,}, with each single byte "
            "among them. The file of another model does not contain its pre-tokenizer; copy that model's tokenizer.json"
        )
    return ranks


def special_names(version: str) -> list[str]:
    """The special tokens of a version of LLaMA 3, in order of id; the first one follows the ranks."""
    listed, _ = VERSIONS[version]
    names: list[str] = []
    reserved = 0
    for name in [*listed, *[None] * (NUM_SPECIAL - len(listed))]:
        if name is None:
            name, reserved = RESERVED.format(reserved), reserved + 1
        names.append(name)
    return names


def _write(ranks: Mapping[bytes, int], folder: Path, version: str) -> None:
    import orjson

    ids = {spelled_bytes(token): rank for token, rank in ranks.items()}
    special = {name: len(ids) + index for index, name in enumerate(special_names(version))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    content = file_content(
        ids,
        merges_into(ids, ids),
        special,
        [split, byte_level],
        ignore_merges=True,
        post_processor=_begins_with(BEGIN, len(ids)),
    )
    (folder / FAST_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    marks = {"bos_token": BEGIN, "eos_token": END}
    config = {
        **marks,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": VERSIONS[version][1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / SPECIAL_TOKENS_FILE, marks)


def _begins_with(token: str, index: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text, as in the tokenizer.json that Meta publishes."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


# Checking what was written, before it gets its final name.


def _check(ranks: Mapping[bytes, int], model: ByteLevelModel) -> int:
    """Compare the ids of each token's text, and of texts of all languages in the vocabulary; returns their number."""
    alone = [text for text in map(text_of, model.vocabulary) if text is not None]
    texts = [*alone, *texts_of_old_pieces(alone), *_documentation()]
    tokenizer = model.plain_tokenizer()
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, found, strict=True):
        expected = ids_by_rank(text, ranks)
        if encoding.ids != expected:
            raise RunError(
                f"the text {text[:60]!r} has the ids {encoding.ids[:20]} by {FAST_FILE}, and {expected[:20]} by its "
                "ranks; nothing was kept"
            )
    return len(texts)


def _documentation() -> Iterator[str]:
    import pydoc_data.topics

    yield from pydoc_data.topics.topics.values()


def ids_by_rank(text: str, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids as tiktoken's `encode_ordinary` gives them, with LLaMA-3's pre-tokenizer."""
    import regex

    ids: list[int] = []
    for part in regex.findall(LLAMA_3, text):
        content = part.encode()
        if content in ranks:
            ids.append(ranks[content])
            continue
        symbols = [content[place : place + 1] for place in range(len(content))]
        while len(symbols) > 1:
            pairs = [ranks.get(left + right, sys.maxsize) for left, right in zip(symbols, symbols[1:], strict=False)]
            lowest = min(pairs)
            if lowest == sys.maxsize:
                break
            place = pairs.index(lowest)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        ids += [ranks[symbol] for symbol in symbols]
    return ids


if __name__ == "__main__":
    main()
